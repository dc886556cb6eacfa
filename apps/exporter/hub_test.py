"""Tests of uploads against a fake hub on this machine, with the HTTP requests of an upload."""

import base64
import hashlib
import http.server
import json
import socket
import threading

import huggingface_hub.constants
import numpy as np
import pytest

from apps.exporter import hub

TOKEN = "hf_" + "A1b2C3d4" * 4
REPO = "my-org/model"


class Hub(http.server.ThreadingHTTPServer):
  """Repositories in memory.

  Attributes:
    repos: {repository: {file: content}} as committed.
    requests: (method, path, token in the header or None, body) of every request.
    refuse: {part of a path: (status, message)}; the first that fits answers.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repos, self.private, self.large, self.requests, self.refuse = {}, {}, {}, [], {}

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_GET(self):
    self._handle()

  do_POST = do_PUT = do_GET

  def _handle(self):
    hub_, path = self.server, self.path.partition("?")[0]
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    authorization = self.headers.get("Authorization")
    hub_.requests.append((self.command, self.path, authorization, dict(self.headers), body))
    for part, (status, message) in hub_.refuse.items():
      if part in path:
        return self._answer(status, {"error": message})
    if self.command == "PUT":  # storage, without authorization
      hub_.large[path.rsplit("/", 1)[1]] = body
      return self._answer(200, {})
    if authorization != f"Bearer {TOKEN}":
      return self._answer(401, {"error": "Invalid username or password."})
    content = None if "/commit/" in path else json.loads(body or b"{}")
    if path == "/api/repos/create":
      name = f"{content['organization']}/{content['name']}"
      known = name in hub_.repos
      hub_.repos.setdefault(name, {})
      hub_.private.setdefault(name, content["visibility"])
      return self._answer(409 if known else 200, {"url": f"{hub_.url}/{name}"})
    if path == "/api/validate-yaml":
      return self._answer(200, {"errors": [], "warnings": []})
    if "/preupload/" in path:
      modes = [
        {
          "path": f["path"],
          "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
          "shouldIgnore": False,
        }
        for f in content["files"]
      ]
      return self._answer(200, {"files": modes})
    if path.endswith("/info/lfs/objects/batch"):
      objects = [
        {**o, "actions": {"upload": {"href": f"{hub_.url}/storage/{o['oid']}", "header": {}}}}
        for o in content["objects"]
      ]
      return self._answer(200, {"transfer": "basic", "objects": objects})
    if "/commit/" in path:
      return self._commit(path, [json.loads(line) for line in body.splitlines()])
    return self._answer(404, {"error": f"nothing at {path}"})

  def _commit(self, path, lines):
    hub_, name = self.server, path.removeprefix("/api/models/").partition("/commit/")[0]
    for line in lines:
      value = line["value"]
      if line["key"] == "file":
        hub_.repos[name][value["path"]] = base64.b64decode(value["content"])
      elif line["key"] == "lfsFile":
        hub_.repos[name][value["path"]] = hub_.large[value["oid"]]
    return self._answer(
      200, {"commitUrl": f"{hub_.url}/{name}/commit/1", "commitOid": "1", "success": True}
    )

  def _answer(self, status, content):
    data = json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
  # Disable Xet, whose protocol the fake does not implement; the library reads this setting when it
  # is imported.
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
  for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  server = Hub()
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  monkeypatch.setenv("HF_ENDPOINT", server.url)
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  yield server
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "timm"
  (folder / "text").mkdir(parents=True)
  (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Größe\n", "utf-8")
  (folder / "config.json").write_text("{}\n")
  (folder / "text" / "vocab.txt").write_bytes(b"")
  weights = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
  (folder / "model.safetensors").write_bytes(weights.tobytes())
  (folder / "text" / "model.safetensors").write_bytes(weights[::-1].tobytes())
  return folder


def _content(folder):
  return {
    p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
  }


def test_every_file_arrives_byte_for_byte_in_a_private_repository(server, folder):
  lines = []
  hub.push({"timm": folder}, REPO, dry_run=False, log=lines.append)
  assert server.repos == {REPO: _content(folder)}
  assert server.private == {REPO: "private"}
  large = folder.rglob("*.safetensors")  # sent to the storage by hash
  assert set(server.large) == {hashlib.sha256(f.read_bytes()).hexdigest() for f in large}
  assert f"uploaded {server.url}/{REPO}/commit/1" in lines


def test_several_formats_get_a_repository_each_that_may_exist(server, folder, tmp_path):
  other = tmp_path / "onnx"
  other.mkdir()
  (other / "image.onnx").write_bytes(b"graph")
  server.repos[f"{REPO}-onnx"] = {"old.txt": b"kept"}
  hub.push({"timm": folder, "onnx": other}, REPO, dry_run=False, log=lambda line: None)
  assert server.repos[f"{REPO}-timm"] == _content(folder)
  assert server.repos[f"{REPO}-onnx"] == {"old.txt": b"kept", "image.onnx": b"graph"}


def test_the_token_is_in_the_authorization_header_only(server, folder):
  lines = []
  hub.push({"timm": folder}, REPO, dry_run=False, log=lines.append)
  assert not any(TOKEN in line for line in lines)
  for method, path, authorization, headers, body in server.requests:
    assert TOKEN not in path
    assert TOKEN.encode() not in body
    assert not any(TOKEN in v for name, v in headers.items() if name.lower() != "authorization")
    # The storage gets no token: its URLs are signed.
    assert authorization == (None if method == "PUT" else f"Bearer {TOKEN}")


def test_a_dry_run_lists_the_files_and_uploads_nothing(server, folder, monkeypatch):
  monkeypatch.delenv("HF_TOKEN")
  lines = []
  hub.push({"timm": folder}, REPO, dry_run=True, log=lines.append)
  assert server.requests == []
  assert lines[0].startswith(f"{REPO}: 5 files, 200.0 kB")
  assert [line.split()[-1] for line in lines[1:-1]] == sorted(_content(folder))
  assert "    100.0 kB  model.safetensors" in lines
  assert "nothing was uploaded" in lines[-1]


@pytest.mark.parametrize(
  "where, status, expected",
  [
    ("/api/repos/create", 401, "HF_TOKEN was rejected"),
    ("/api/", 403, "has no write access there"),
    ("/api/repos/create", 500, "(500, "),
    ("/commit/", 412, "the repository is being modified"),
    ("/batch", 403, "has no write access there"),
    ("/storage/", 403, "has no write access there"),
  ],
)
def test_errors_of_the_hub_are_one_line(server, folder, where, status, expected):
  server.refuse[where] = (status, f"You shall not pass.\nNot with {TOKEN}")
  with pytest.raises(ValueError) as raised:
    hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  message = str(raised.value)
  assert f"{REPO} was not uploaded to {server.url} ({status}, " in message
  assert expected in message
  assert "\n" not in message and TOKEN not in message
  assert "You shall not pass. Not with (token)" in message
  assert raised.value.__cause__ is None  # whose text may hold headers


def test_uploads_before_a_failure_are_reported(server, folder):
  server.refuse[f"{REPO}-b/commit"] = (400, "no")
  with pytest.raises(ValueError, match=f"{REPO}-b was not .* Uploaded before: {REPO}-a"):
    hub.push({"a": folder, "b": folder}, REPO, dry_run=False, log=lambda line: None)
  assert server.repos[f"{REPO}-a"] == _content(folder)
  assert server.repos[f"{REPO}-b"] == {}


def test_an_unreachable_hub_is_one_line(server, folder, monkeypatch):
  with socket.socket() as taken:  # bound, but not listening
    taken.bind(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ValueError, match=r"ConnectError: .*refused") as raised:
      hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  assert "\n" not in str(raised.value)


def test_a_hub_that_never_answers_is_given_up(server, folder, monkeypatch):
  monkeypatch.setattr(hub, "_SILENCE", 0.3)
  released = threading.Event()
  monkeypatch.setattr(_Handler, "_handle", lambda self: released.wait(20))
  with pytest.raises(ValueError, match=r"ReadTimeout"):
    hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  released.set()


@pytest.mark.parametrize("token", ["", "  ", "hf_a b", "hf_a\nHost: x", "hf_ä"])
def test_an_invalid_token_is_rejected_without_printing_it(server, folder, monkeypatch, token):
  monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(ValueError, match="HF_TOKEN") as raised:
    hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  assert not token.strip() or token not in str(raised.value)
  assert server.requests == []


def test_a_token_is_never_sent_unencrypted(server, folder, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1.example.org")
  with pytest.raises(ValueError, match="expected https://"):
    hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)


@pytest.mark.parametrize(
  "repo", ["", "model", "a/b/c", "org/", "/model", "org/../x", "org/a--b", "org/a b", "org/x.git",
           "-org/x", "org/" + "x" * 100, "https://host/org/x"],
)  # fmt: skip
def test_invalid_repository_names_are_rejected(server, folder, repo):
  with pytest.raises(ValueError, match="expected org/name"):
    hub.push({"timm": folder}, repo, dry_run=False, log=lambda line: None)
  assert server.requests == []


def test_upload_errors_are_reported_before_the_export(server, monkeypatch):
  hub.check(["timm", "onnx"], REPO, dry_run=False)
  with pytest.raises(ValueError, match="expected org/name"):
    hub.check(["timm"], "model", dry_run=True)
  with pytest.raises(ValueError, match="at most 96"):  # with the format behind it
    hub.check(["timm", "onnx"], "org/" + "x" * 90, dry_run=True)
  monkeypatch.setenv("HF_ENDPOINT", "http://example.org")
  with pytest.raises(ValueError, match="HF_ENDPOINT"):
    hub.check(["timm"], REPO, dry_run=False)
  monkeypatch.delenv("HF_TOKEN")
  hub.check(["timm"], REPO, dry_run=True)
  monkeypatch.delenv("HF_ENDPOINT")
  with pytest.raises(ValueError, match="HF_TOKEN is not set; set it to a token"):
    hub.check(["timm"], REPO, dry_run=False)
  assert server.requests == []


def _secret(name):
  def add(folder):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")

  return add


@pytest.mark.parametrize(
  "add, expected",
  [
    (_secret(".env"), "could contain a secret"),
    (_secret("text/Server.PEM"), "could contain a secret"),
    (_secret("id_rsa"), "could contain a secret"),
    (_secret(".git/config"), "could contain a secret"),
    (_secret(".aws/config"), "could contain a secret"),
    (lambda f: (f / "notes.txt").write_text(f"use {TOKEN}"), "contains the token"),
    (lambda f: (f / "passwd").symlink_to("/etc/passwd"), "is a link"),
    (lambda f: (f / "up").symlink_to("..", target_is_directory=True), "is a link"),
  ],
)
def test_secrets_and_links_are_rejected_before_any_upload(server, folder, add, expected):
  add(folder)
  with pytest.raises(ValueError, match=expected) as raised:
    hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  assert TOKEN not in str(raised.value)
  assert server.requests == []


def test_missing_and_empty_folders_are_rejected(server, tmp_path):
  for there in (False, True):
    folder = tmp_path / "nothing"
    if there:
      folder.mkdir()
    with pytest.raises(ValueError, match="export the model first"):
      hub.push({"timm": folder}, REPO, dry_run=False, log=lambda line: None)
  with pytest.raises(ValueError, match="no exported folders"):
    hub.push({}, REPO, dry_run=False, log=lambda line: None)


def test_file_names_of_exports_are_not_secrets(folder):
  for name in (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
    "tokenizer/text_processor.json", "tokenizer/packing.json", "open_clip_config.json",
    "image.onnx.data", "export.json", "openvision_torch.py", "parity.json", "words.json",
  ):  # fmt: skip
    _secret(name)(folder)
  hub.push({"timm": folder}, REPO, dry_run=True, log=lambda line: None)
