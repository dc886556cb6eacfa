"""Routes of the application: results, limits, malformed requests, escaping."""

import base64
import io
import re
import shutil

import numpy as np
from PIL import Image
import pytest

import ov_data
import ov_serve
from ov_serve import app as app_module
from ov_serve.app import create_app
from ov_serve.guard import Limits
from ov_serve.testing.client import Client
from ov_serve.testing.models import encoded, jpeg, png, write_images, write_model

LIMITS = Limits(body_bytes=200_000, pixels=1_000_000, texts=8, characters=100, results=30)
EVIL = '<img src=x onerror=alert(1)>"&'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("served")
  model = ov_serve.Model.load(write_model(folder / "model"))
  images = write_images(folder / "photos", range(20))
  (images / "001.jpg").rename(images / f"{EVIL}.jpg")
  (folder / "secret.txt").write_text("classified")
  ov_serve.embed(model, ov_serve.open_images(str(images)), folder / "index", batch_size=8)
  return folder


@pytest.fixture(scope="module")
def model(folder):
  return ov_serve.Model.load(folder / "model")


@pytest.fixture(scope="module")
def index(folder):
  return ov_serve.Index.open(folder / "index")


@pytest.fixture(scope="module")
def client(model, index):
  return Client(create_app(model, index, limits=LIMITS))


def rows(answer):
  assert answer.status == 200, answer.body
  return [match["row"] for match in answer.json["results"]]


def test_search_by_text_equals_python(client, model, index):
  answer = client.post("/api/search", {"text": "a red square", "k": 7})
  [hits] = index.search(model.embed_texts(["a red square"]), 7)
  assert rows(answer) == [hit.row for hit in hits]
  scores = [match["score"] for match in answer.json["results"]]
  assert scores == pytest.approx([hit.score for hit in hits], abs=1e-5)


def test_search_by_image_in_every_form(client):
  name = next(m["key"] for m in client.image("/api/search", jpeg(7)).json["results"])
  assert name == "007.jpg"
  by_body = rows(client.image("/api/search", jpeg(7), k=5))
  assert len(by_body) == 5
  assert rows(client.post("/api/search", {"image": encoded(jpeg(7)), "k": 5})) == by_body
  url = f"data:image/jpeg;base64,{encoded(jpeg(7))}"
  assert rows(client.post("/api/search", {"image": url, "k": 5})) == by_body
  assert rows(client.post("/api/search", {"row": by_body[0], "k": 5})) == by_body


def test_classify_equals_python(client, model):
  vector = model.embed_images(model.decode(jpeg(3))[None])
  labels = ["red square", "blue star", EVIL]
  want = dict(zip(labels, model.classify(vector, labels)[0].tolist()))
  for answer in (
    client.image("/api/classify", jpeg(3), labels=labels),
    client.post("/api/classify", {"image": encoded(jpeg(3)), "labels": labels}),
  ):
    found = {entry["label"]: entry["probability"] for entry in answer.json["labels"]}
    assert found == pytest.approx(want, abs=1e-5)
    assert [*found.values()] == sorted(found.values(), reverse=True)


def test_caption_and_embedding_equal_python(client, model):
  pixels = model.decode(jpeg(3))[None]
  [caption] = model.caption(pixels)
  answer = client.image("/api/caption", jpeg(3)).json
  assert (answer["caption"], answer["tokens"]) == (caption.text, caption.tokens)
  vector = client.image("/api/embed", jpeg(3)).json["embedding"]
  np.testing.assert_allclose(vector, model.embed_images(pixels)[0], atol=1e-6)


def test_embeddings_of_the_openai_api(client, model):
  texts = ["a red square", "a blue star"]
  url = f"data:image/jpeg;base64,{encoded(jpeg(3))}"
  answer = client.post("/v1/embeddings", {"model": "any", "input": [texts[0], url, texts[1]]}).json
  assert (answer["object"], [d["index"] for d in answer["data"]]) == ("list", [0, 1, 2])
  found = np.array([entry["embedding"] for entry in answer["data"]])
  np.testing.assert_allclose(found[[0, 2]], model.embed_texts(texts), atol=1e-6)
  np.testing.assert_allclose(
    found[1], model.embed_images(model.decode(jpeg(3))[None])[0], atol=1e-6
  )
  ids, mask = model.processor.tokenizer.encode_batch(texts, 16)
  assert answer["usage"]["prompt_tokens"] == mask.sum()
  binary = client.post("/v1/embeddings", {"input": texts[0], "encoding_format": "base64"}).json
  numbers = np.frombuffer(base64.b64decode(binary["data"][0]["embedding"]), "<f4")
  np.testing.assert_allclose(numbers, found[0], atol=1e-6)
  assert client.get("/v1/models").json["data"][0]["id"] == model.name


def test_concurrent_requests_share_batches_and_keep_their_answers(client):
  words = [f"a red square, {number}" for number in range(24)]
  answers = client.together(*(("/v1/embeddings", {"input": text}) for text in words))
  alone = [client.post("/v1/embeddings", {"input": text}).json for text in words]
  for answer, want in zip(answers, alone, strict=True):
    np.testing.assert_allclose(
      answer.json["data"][0]["embedding"], want["data"][0]["embedding"], atol=1e-6
    )
  text = client.get("/metrics").body.decode()
  batches = int(float(re.search(r'ov_batch_size_count\{kind="text"\} (\S+)', text)[1]))
  items = int(float(re.search(r'ov_batch_size_sum\{kind="text"\} (\S+)', text)[1]))
  assert items > batches + 20  # 24 concurrent requests did not make 24 batches


def test_thumbnails(client, index):
  answer = client.get("/images/3", size=64)
  assert answer.headers["content-type"] == "image/jpeg"
  assert max(Image.open(io.BytesIO(answer.body)).size) == 48  # never enlarged
  assert "private" in answer.headers["cache-control"]
  again = client.send(
    "GET", "/images/3", {"size": 64}, headers={"if-none-match": answer.headers["etag"]}
  )
  assert (again.status, again.body) == (304, b"")
  assert client.get("/images/20").status == 404
  assert client.get("/images/3", size=5000).status == 400
  assert client.get("/images/3", size="big").status == 400


@pytest.mark.parametrize(
  "path",
  [
    "/images/../secret.txt", "/images/..%2fsecret.txt", "/images/%2e%2e/%2e%2e/secret.txt",
    "/images/-1", "/images/1.jpg", "/images/1/../../secret.txt", "/static/../app.py",
    "/static/..%2fapp.py", "/static//etc/passwd", "/static/%00", "/static/", "//secret.txt",
  ],
)  # fmt: skip
def test_no_path_leads_outside(client, path):
  for raw in (True, False):
    answer = client.send("GET", path, {}, raw=raw)
    assert answer.status == 404
    assert b"classified" not in answer.body and b"import" not in answer.body


def test_a_changed_image_is_not_shown(model, folder, tmp_path):
  images = write_images(tmp_path / "photos", range(3))
  ov_serve.embed(model, ov_serve.open_images(str(images)), tmp_path / "index")
  client = Client(create_app(model, ov_serve.Index.open(tmp_path / "index")))
  assert [client.get(f"/images/{row}").status for row in range(3)] == [200, 200, 200]
  (images / "001.jpg").write_bytes(jpeg(99))
  (images / "002.jpg").unlink()
  assert [client.get(f"/images/{row}").status for row in range(3)] == [200, 410, 410]


def test_names_and_captions_are_json_and_never_markup(client):
  answer = client.post("/api/search", {"text": "a", "k": 20})
  assert f"{EVIL}.jpg" in [match["key"] for match in answer.json["results"]]
  assert answer.headers["content-type"] == "application/json"
  assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_self_contained_and_builds_no_markup_from_text(client):
  page = client.get("/")
  assert page.headers["content-type"].startswith("text/html")
  html, script = page.body.decode(), client.get("/static/app.js").body.decode()
  style = client.get("/static/style.css").body.decode()
  for text in (html, script, style):
    assert not re.search(r"(?<!xmlns=\")https?://|//cdn", text)
  assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
  assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=", html)
  files = re.findall(r'(?:src|href)="(/static/[^"]+)"', html)
  assert len(files) == 3
  assert all(client.get(file).status == 200 for file in files)
  policy = page.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy


def test_health_info_and_description(client, model):
  assert client.get("/health").json["status"] == "ok"
  info = client.get("/api/info").json
  assert (info["images"], info["text_search"], info["captions"]) == (20, True, True)
  paths = client.get("/openapi.json").json["paths"]
  assert set(paths) == {path for path, *_ in app_module.api.OPERATIONS}
  assert {client.post(path, {}).status for path in paths} == {400}  # each has a handler
  client.post("/api/search", {"text": "a"})
  text = client.get("/metrics").body.decode()
  assert 'ov_requests_total{route="/api/search",status="200"}' in text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"])
def test_loopback_hosts_are_accepted(model, index, host):
  assert Client(create_app(model, index), host).get("/health").status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io"])
def test_other_hosts_are_refused(model, index, host):
  answer = Client(create_app(model, index), host).get("/api/info")
  assert answer.status == 421 and "Host" in answer.message
  named = Client(create_app(model, index, hosts=("evil.example",)), "evil.example:80")
  assert named.get("/health").status == 200


def test_other_origins_get_no_permission(client):
  headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
  for method in ("GET", "OPTIONS"):
    answer = client.send(method, "/api/info", {}, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
  ("value", "status", "message"),
  [
    (b"{", 400, "invalid JSON"),
    (b"\xff\xfe", 400, "invalid JSON"),
    (b"[" * 100_000, 400, "invalid JSON"),
    (b"null", 400, "invalid JSON"),
    ({}, 400, "exactly one of text, image and row"),
    ({"text": "a", "row": 1}, 400, "exactly one of"),
    ({"text": 1}, 400, "invalid JSON"),
    ({"txt": "a"}, 400, "unknown field `txt`"),
    ({"text": "a", "k": 0}, 400, "expected 1 to 30"),
    ({"text": "a", "k": 31}, 400, "expected 1 to 30"),
    ({"text": "a", "k": 10**30}, 400, "expected 1 to 30"),
    ({"text": "a" * 101}, 400, "101 characters; at most 100"),
    ({"row": 20}, 404, "rows 0 to 19"),
    ({"row": -1}, 404, "rows 0 to 19"),
    ({"image": "%%%"}, 400, "not base64"),
    ({"image": "data:image/png,abc"}, 400, "data URL"),
    ({"image": encoded(b"not an image")}, 422, "image"),
    ({"image": encoded(jpeg(1)[:300])}, 422, "image"),
    ({"image": encoded(png(1_000_000, 1_000))}, 413, "image"),
    ({"image": encoded(png(2_000, 1_000))}, 413, "too many pixels: 2000 x 1000"),
    ({"image": "A" * 200_000}, 413, "at most 200000"),
  ],
  ids=range(21),
)
def test_malformed_searches(client, value, status, message):
  answer = client.post("/api/search", value)
  assert answer.status == status, answer.body
  assert message in answer.message


@pytest.mark.parametrize(
  ("path", "value", "status"),
  [
    ("/api/classify", {"image": encoded(jpeg(1)), "labels": []}, 400),
    ("/api/classify", {"image": encoded(jpeg(1)), "labels": ["a"] * 9}, 400),
    ("/api/classify", {"image": encoded(jpeg(1)), "labels": ["a"], "template": "b"}, 400),
    ("/api/classify", {"labels": ["a"]}, 400),
    # 50 copies of 90 characters: each text is short enough, but not the prompt.
    (
      "/api/classify",
      {"image": encoded(jpeg(1)), "labels": ["a" * 90], "template": "{}" * 50},
      400,
    ),
    ("/api/caption", {}, 400),
    ("/v1/embeddings", {"input": []}, 400),
    ("/v1/embeddings", {"input": ["a"] * 9}, 400),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400),
    ("/v1/embeddings", {"input": "data:image/jpeg;base64,AAAA"}, 422),
    ("/nowhere", {}, 404),
    ("/health", {}, 405),
  ],
)
def test_malformed_requests(client, path, value, status):
  answer = client.post(path, value)
  assert answer.status == status, answer.body
  assert answer.json["error"]["type"] == "invalid_request_error"


def test_long_prompts_are_refused_before_they_are_built(client, monkeypatch):
  monkeypatch.setattr(ov_serve.Model, "classify", None)
  for label, template in (("a" * 101, "{}"), ("a", "{}" + "b" * 100), ("a" * 90, "{}" * 50)):
    answer = client.image("/api/classify", jpeg(1), labels=[label], template=template)
    assert answer.status == 400 and "at most 100 are accepted" in answer.message


def test_as_many_labels_as_texts_are_accepted(client):
  assert client.image("/api/classify", jpeg(1), labels=["a"] * LIMITS.texts).status == 200


@pytest.mark.parametrize("path", ["/images/" + "9" * 5000, "/images/" + "9" * 15, "/images/1x"])
def test_numbers_of_any_length_are_no_images(client, path):
  assert client.get(path).status == 404


def test_a_length_of_any_number_of_digits_is_refused(client):
  answer = client.send(
    "POST", "/api/search", {}, b"{}", "application/json", {"content-length": "9" * 5000}
  )
  assert answer.status == 413


def test_an_image_that_is_too_extreme_for_a_thumbnail_is_refused(model, tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "line.png").write_bytes(png(2000, 1))
  dataset = ov_serve.open_images(str(tmp_path / "photos"))
  limits = ov_data.decode.Limits(max_aspect=5000)
  ov_serve.embed(model, dataset, tmp_path / "index", limits=limits)
  client = Client(create_app(model, ov_serve.Index.open(tmp_path / "index")))
  answer = client.get("/images/0")
  assert answer.status == 422 and "aspect ratio" in answer.message


def test_a_damaged_record_of_the_index_is_an_error_with_a_remedy(model, folder, tmp_path):
  shutil.copytree(folder / "index", tmp_path / "index")
  [file] = (tmp_path / "index").glob("records-*")
  file.write_bytes(file.read_bytes().replace(b'"record"', b'"rec\xff\xfed"'))
  client = Client(create_app(model, ov_serve.Index.open(tmp_path / "index")))
  for answer in (client.post("/api/search", {"text": "a"}), client.get("/images/0")):
    assert answer.status == 500 and "embed the images again" in answer.message


def test_messages_have_the_value_and_the_remedy(model, client):
  answer = Client(create_app(model), "evil.example").get("/api/info")
  assert "evil.example" in answer.message and "--allow_host" in answer.message
  answer = client.post("/v1/embeddings", {"input": "a", "dimensions": 3})
  assert "dimensions=3" in answer.message and "omit" in answer.message
  assert "/openapi.json" in client.get("/nowhere").message
  answer = client.get("/api/search")
  assert "GET" in answer.message and "POST" in answer.message
  assert "POST" in answer.headers["allow"]
  small = Client(create_app(model, limits=Limits(body_bytes=200_000, buffered_bytes=1000)))
  answer = small.post("/api/embed", {"image": "A" * 2000})
  assert answer.status == 503 and "1000 bytes" in answer.message and "again" in answer.message


def test_limits_accept_at_least_one_full_request():
  with pytest.raises(ValueError, match="waiting=8: expected at least texts=256"):
    Limits(waiting=8)


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/xml"])
def test_other_content_types_are_refused(client, kind):
  # A page of another site can send these without asking for permission.
  answer = client.send("POST", "/api/search", {}, b'{"text": "a"}', kind)
  assert answer.status == 415


def test_images_of_the_body_take_options_of_the_query_only(client):
  assert client.image("/api/search", jpeg(1), image="x").status == 400
  assert client.image("/api/search", jpeg(1), k="many").status == 400
  assert client.image("/api/search", jpeg(1), unknown="x").status == 400
  assert client.image("/v1/embeddings", jpeg(1)).status == 415


def test_bodies_are_released(model, index):
  app = create_app(model, index, limits=LIMITS)
  client = Client(app)
  for value in ({"text": "a"}, {"image": "%%%"}, {"image": "A" * 300_000}, b"{"):
    client.post("/api/search", value)
  assert "ov_buffered_bytes 0.0" in client.get("/metrics").body.decode()


def test_a_server_without_index_or_towers(tmp_path, model):
  client = Client(create_app(model))
  assert client.post("/api/search", {"text": "a"}).status == 404
  assert client.image("/api/embed", jpeg(1)).status == 200
  blind = ov_serve.Model.load(write_model(tmp_path, text=False, caption=True))
  client = Client(create_app(blind))
  assert client.post("/v1/embeddings", {"input": "a"}).status == 501
  assert client.image("/api/classify", jpeg(1), labels=["a"]).status == 501
  mute = ov_serve.Model.load(write_model(tmp_path / "mute", caption=False))
  assert Client(create_app(mute)).image("/api/caption", jpeg(1)).status == 501


def test_an_index_of_another_model_is_refused(tmp_path, index):
  other = ov_serve.Model.load(write_model(tmp_path, caption=False))
  with pytest.raises(ValueError, match="belongs to model"):
    create_app(other, index)
