"""Recaptioning against a server that fails: nothing lost, nothing repeated, no key in any file."""

import io
import itertools
import json
import logging
import os
import pathlib
import signal
import time

import numpy as np
from PIL import Image
import pytest

from ov_data import decode, hashing
from ov_data.annotations import CAPTION_COLUMNS, Annotations
from ov_data.bad_records import TooManyBadRecords
from ov_data.sources import Dataset, Source
from ov_data.writer import ShardWriter
from tools.data import caption_server, captions
from tools.data.caption_server import Client, Limits, Request
from tools.data.captions import FolderCaptioner, ServerCaptioner, recaption
from tools.data.captions_testing import FakeServer, image_of, prompt_of, serving

KEY = "sk-not-a-real-key-0123456789/ab"
COUNTS = (9, 0, 12)
NO_TEXT, BAD, LARGE = 4, 13, 2


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(caption_server, "_FIRST_WAIT", 0.01)
  monkeypatch.setattr(caption_server, "_LONGEST_WAIT", 0.05)


@pytest.fixture
def data(tmp_path):
  numbers = itertools.count()
  (tmp_path / "d").mkdir()
  for shard, count in enumerate(COUNTS):
    with ShardWriter(str(tmp_path / "d" / f"{shard}.tfrecord")) as writer:
      for number in itertools.islice(numbers, count):
        file = io.BytesIO()
        size = (300, 200) if number == LARGE else (20, 30)
        Image.new("RGB", size, (number * 9, 0, 0)).save(file, "PNG")
        image = b"no image" if number == BAD else file.getvalue()
        writer.write({"jpg": image, "txt": " " if number == NO_TEXT else f"alt {number} {{x}}"})
  return Dataset(Source(str(tmp_path / "d")))


def _captioner(server, key=KEY, request=None, max_side=128, **limits):
  options = {"captions": 2, "seed": 3, **(request or {})}
  asked = Request("model", "text: {caption}", "no text", **options)
  defaults = {"concurrent": 4, "timeout": 20.0, "attempts": 5}
  return ServerCaptioner(Client(server.url, asked, Limits(**(defaults | limits)), key), max_side)


def _rows(out):
  found = Annotations.open(str(out))
  rows = []
  for shard in range(len(COUNTS)):
    columns = found.read(shard, CAPTION_COLUMNS)
    rows += zip(*(columns[name] for name in CAPTION_COLUMNS), strict=True)
  return rows


def _bytes(out):
  return {file.name: file.read_bytes() for file in pathlib.Path(out).glob("*.parquet")}


def test_requests_and_rows(data, tmp_path):
  with serving() as server:
    request = {"temperature": 0.5, "top_k": 50, "top_p": 0.9, "max_tokens": 40}
    summary = recaption(data, tmp_path / "c", _captioner(server, request=request))
  assert (summary.records, summary.captioned, summary.bad) == (21, 21, {"unknown format": 1})
  assert (summary.prompt_tokens, summary.completion_tokens, summary.unknown) == (2000, 280, 0)
  rows = _rows(tmp_path / "c")
  assert [row[0] for row in rows] == list(range(21))
  assert all(len(row[3]) == 2 and row[1] is None for row in rows if row[0] != BAD)
  assert rows[BAD][1:4] == ("unknown format", data.location(BAD), None)
  assert rows[BAD][4] is np.ma.masked
  assert rows[0][3][0].startswith("caption ") and rows[0][3][1].endswith(" 1")  # stripped
  assert set(server.keys) == {f"Bearer {KEY}"} and server.most_concurrent <= 4
  by_prompt = {prompt_of(body): body for body in server.bodies}
  assert "no text" in by_prompt and "text: alt 5 {x}" in by_prompt
  body = by_prompt["text: alt 5 {x}"]
  assert image_of(body) == data.read(5).image  # unchanged
  assert {name: body[name] for name in (*request, "n", "model", "seed")} == {
    **request, "n": 2, "model": "model", "seed": hashing.key(3, 5, 0, 0) >> 33,
  }  # fmt: skip
  resized = Image.open(io.BytesIO(image_of(by_prompt[f"text: alt {LARGE} {{x}}"])))
  assert resized.size == (128, 85) and resized.format == "JPEG"


def _garbage(number):
  bodies = [
    b"{", b"[]", b'{"choices": []}', b'{"choices": 3}', b'{"choices": [null]}', b"\xff\xfe", b"",
    b'{"choices": [{"message": {"content": "  "}}]}', b"[" * 100_000, b"1" * 5000,
    b'{"choices": [{"message": {"content": [1]}}], "usage": {"prompt_tokens": -1}}',
  ]  # fmt: skip
  return bodies[number % len(bodies)]


def _faults(image, attempt):
  """Fail up to four times per image, in every way."""
  if attempt >= image % 5:
    return None
  match (image >> 8) + attempt & 3:
    case 0:
      return 429, {"Retry-After": "0.05"}, b'{"error": {"message": "slow down"}}'
    case 1:
      return 500 + attempt, {}, b"<html>"
    case 2:
      return 1.0  # longer than the time-out
    case _:
      return 200, {}, _garbage((image >> 16) + attempt)


def test_failures_lose_and_repeat_nothing(data, tmp_path):
  with serving() as server:
    recaption(data, tmp_path / "good", _captioner(server))
  with serving(_faults) as server:
    recaption(data, tmp_path / "c", _captioner(server, timeout=0.4, concurrent=8, attempts=20))
    assert sum(server.attempts.values()) > 40
    # A late response is a success of the server only; the client has asked again.
    assert len(server.successes) == 20
  good, rows = _rows(tmp_path / "good"), _rows(tmp_path / "c")
  assert [row[:3] for row in rows] == [row[:3] for row in good]
  assert all(len(row[3]) == 2 for row in rows if row[0] != BAD)
  # After garbage the next seed is used; other failures change nothing.
  same = sum(a[3] == b[3] for a, b in zip(good, rows, strict=True))
  assert 8 <= same < 21


def test_records_that_always_fail_are_null_with_reason_and_location(data, tmp_path):
  def fault(image, attempt):
    match image % 3:
      case 0:
        return 200, {}, b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}'
      case 1:
        return 400, {}, b'{"error": {"message": "too many pixels"}}'
    return None

  with serving(fault) as server:
    captioner = _captioner(server, attempts=3)
    summary = recaption(data, tmp_path / "c", captioner, max_bad_fraction=1)
  rows = _rows(tmp_path / "c")
  reasons = {"response without caption": 3, "rejected with status 400": 1}
  failed = [row for row in rows if row[1] in reasons]
  assert {row[1] for row in failed} == {*reasons}
  assert all(row[2] == data.location(row[0]) and row[3] is None for row in failed)
  assert {summary.bad[reason] for reason in reasons} == {
    sum(row[1] == reason for row in failed) for reason in reasons
  }
  assert all(row[4] == 15 and row[5] == 3 for row in failed if row[1] in [*reasons][:1])
  assert sorted({server.attempts[image] for image in server.attempts}) == [1, 3]


def test_a_server_that_always_fails_ends_the_run(data, tmp_path):
  with serving(lambda image, attempt: (503, {}, b"")) as server, pytest.raises(TooManyBadRecords):
    recaption(data, tmp_path / "c", _captioner(server, attempts=1), max_bad_fraction=0.0)
  # Failed records are tried again.
  with serving() as server:
    recaption(data, tmp_path / "c", _captioner(server))
  assert all(row[3] for row in _rows(tmp_path / "c") if row[0] != BAD)


def test_servers_that_return_one_caption_are_asked_again(data, tmp_path):
  with serving(supports_n=False) as server:
    recaption(data, tmp_path / "c", _captioner(server, request={"captions": 3}))
  rows = [row for row in _rows(tmp_path / "c") if row[0] != BAD]
  assert all(len(set(row[3])) == 3 and row[4] == 300 for row in rows)
  assert len(server.bodies) == 60 and {body["n"] for body in server.bodies} == {1, 2, 3}


@pytest.mark.parametrize("stop_after", [1, 7, 15])
def test_a_killed_run_resumes_by_record(data, tmp_path, stop_after):
  with serving() as server:
    recaption(data, tmp_path / "whole", _captioner(server))
  with serving(lambda image, attempt: 0.05) as server:
    if (pid := os.fork()) == 0:
      recaption(data, tmp_path / "c", _captioner(server, concurrent=2))
      os._exit(1)
    while sum(server.successes.values()) < stop_after:
      time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    time.sleep(0.2)  # until responses in flight are counted
    killed = sum(server.successes.values())
    for journal in (tmp_path / "c").glob("*.journal"):
      with open(journal, "ab") as file:
        file.write(b'0badc0de [12, ["torn')  # a line that was written in part
    summary = recaption(data, tmp_path / "c", _captioner(server))
    assert _bytes(tmp_path / "c") == _bytes(tmp_path / "whole")
    # Only the requests in flight are repeated.
    assert 20 <= sum(server.successes.values()) <= 22
    assert summary.captioned < 21 - (killed - 2) + 1
  assert not [*(tmp_path / "c").glob("*.journal")]
  trained = Dataset(Source(data.source.path, recaptions=str(tmp_path / "c")))
  for record, row in enumerate(_rows(tmp_path / "c")):
    texts = trained.read(record, ("recaption",)).texts.get("recaption", [])
    assert [text.decode() for text in texts] == (row[3] or [])


def test_other_settings_do_not_resume(data, tmp_path):
  def fault(image, attempt):
    return (404, {}, b"{}") if len(server.bodies) > 5 else None

  with serving(fault) as server:
    with pytest.raises(ValueError, match=r"status 404; check --server and --served_model"):
      recaption(data, tmp_path / "c", _captioner(server, concurrent=1))
    assert (tmp_path / "c" / "00000.journal").exists()
    for change in ({"request": {"seed": 4}}, {"max_side": 64}):
      with pytest.raises(ValueError, match="was written for other data, another model or other"):
        recaption(data, tmp_path / "c", _captioner(server, **change))
    server.fault = lambda image, attempt: None
    summary = recaption(data, tmp_path / "c", _captioner(server))
    assert summary.captioned == 16


def test_rate_and_retry_after(data, tmp_path):
  with serving() as server:
    recaption(data, tmp_path / "c", _captioner(server, requests_per_second=50))
    # 20 requests take 19 intervals; a loaded machine can delay the first arrival.
    assert server.times[-1] - server.times[0] >= 0.6 * 19 / 50

  def fault(image, attempt):
    return (429, {"Retry-After": "1"}, b"") if len(server.bodies) == 1 else None

  with serving(fault) as server:
    recaption(data, tmp_path / "d2", _captioner(server, concurrent=1))
    assert server.times[1] - server.times[0] >= 0.95
  message = r"Retry-After: 3,600 seconds, more than max_wait=600; repeat the command later"
  later = lambda image, attempt: (503, {"Retry-After": "3600"}, b"")
  with serving(later) as server, pytest.raises(OSError, match=message):
    recaption(data, tmp_path / "e", _captioner(server))


@pytest.mark.parametrize(
  ("value", "low", "high"),
  [
    ("7", 7, 7), ("Fri, 01 Jan 2100 00:00:00 GMT", 1e9, 1e10), ("soon", 0, 0), ("-3", 0, 0),
    ("inf", 0, 0), ("nan", 0, 0), (None, 0, 0), ("Fri, 01 Jan 1999 00:00:00 GMT", 0, 0),
  ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value, low, high):
  assert low <= caption_server._retry_after(value) <= high


class _Drip(FakeServer):
  """Sends one byte of the response at a time."""

  def finish_request(self, request, client_address):
    request.recv(1 << 16)
    try:
      for letter in itertools.cycle(b"HTTP/1.1 200 OK\r\nX: y"):
        request.sendall(bytes([letter]))
        time.sleep(0.05)
    except OSError:
      pass


def test_slow_and_large_responses_end(monkeypatch):
  request = Request("model", "{caption}", "")
  monkeypatch.setattr("tools.data.captions_testing.FakeServer", _Drip)
  with serving() as server:
    begin = time.monotonic()
    client = Client(server.url, request, Limits(timeout=0.3, attempts=1))
    assert client.caption(0, b"", "image/png", None).error == "time-out"
    assert time.monotonic() - begin < 10
  monkeypatch.undo()
  monkeypatch.setattr(caption_server, "_FIRST_WAIT", 0.01)
  large = lambda image, attempt: (200, {}, b" " * 5000)
  with serving(large) as server:
    client = Client(server.url, request, Limits(max_bytes=4999, attempts=2))
    assert client.caption(0, b"", "image/png", None).error == "response too large"
  short = lambda image, attempt: (200, {"Content-Length": "9999"}, b"{}")
  with serving(short) as server:
    client = Client(server.url, request, Limits(attempts=1, timeout=0.5))
    answer = client.caption(0, b"", "image/png", None)
    assert answer.error in ("incomplete response", "broken response", "time-out")


def test_unreachable_servers_and_redirects():
  request = Request("model", "{caption}", "")
  with serving() as server:
    url = server.url
  with pytest.raises(OSError, match=r"is not reachable after 2 attempts .*; start the server"):
    Client(url, request, Limits(attempts=2)).caption(0, b"", "image/png", None)
  with serving() as other:
    moved = lambda image, attempt: (307, {"Location": f"{other.url}/chat/completions"}, b"")
    with serving(moved) as server, pytest.raises(ValueError, match="redirects are not followed"):
      Client(server.url, request, Limits(), KEY).caption(0, b"", "image/png", None)
    assert not other.bodies


def test_the_key_appears_nowhere(data, tmp_path, caplog):
  """The server repeats the key in captions and errors; it is in no file, log or exception."""
  caplog.set_level(logging.DEBUG)
  caption = json.dumps({"choices": [{"message": {"content": f"a {KEY} b\ud800\0"}}]}).encode()
  echo = json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()

  def fault(image, attempt):
    return (200, {}, caption) if image % 2 else (400, {}, echo)

  with serving(fault) as server:
    captioner = _captioner(server, request={"captions": 1})
    recaption(data, tmp_path / "c", captioner, max_bad_fraction=1)
    server.fault = lambda image, attempt: (401, {}, echo)
    with pytest.raises(ValueError, match=r"status 401 \(wrong key \[API key\]\)") as error:
      recaption(data, tmp_path / "d2", captioner)
  found = {text for row in _rows(tmp_path / "c") for text in row[3] or ()}
  assert found == {"a [API key] b?\N{REPLACEMENT CHARACTER}"}
  assert "wrong key [API key]" in caplog.text
  files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
  shown = [caplog.text, repr(error.value), str(error.getrepr(style="short")), repr(captioner)]
  shown += [repr(captioner._client), captioner.fingerprint, files.decode("latin-1")]
  assert not [text for text in shown if KEY in text]
  for bad in (f"{KEY}\n", f"{KEY} x", f'{KEY}"', f"{KEY}é"):
    with pytest.raises(ValueError, match="the API key has spaces, quotes or characters") as error:
      Client(server.url, captioner._client.request, Limits(), bad)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("ftp://host/v1", "scheme 'ftp', not http or https"),
    ("file:///etc/passwd", "scheme 'file'"),
    ("localhost:8000", "scheme 'localhost'"),
    ("http://", "has no host"),
    ("http://user:secret@host/v1", "has a user, password, query or fragment"),
    ("http://host/v1?key=secret", "has a user, password, query or fragment"),
    ("http://host:99999/v1", "not a valid URL"),
    ("http://host/a b", "characters that URLs do not have"),
  ],
)
def test_urls(url, message):
  with pytest.raises(ValueError, match=message) as error:
    Client(url, Request("model", "{caption}", ""), Limits())
  assert "secret" not in str(error.value)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Request("", "{caption}", ""), "served_model=''"),
    (lambda: Request("m", "no place", ""), "expected {caption} where the alt text belongs"),
    (lambda: Request("m", "{caption}", "", captions=0), "captions=0: expected 1 to 128"),
    (lambda: Request("m", "{caption}", "", temperature=float("nan")), "temperature=nan"),
    (lambda: Limits(concurrent=0), "concurrent=0: expected 1 to 4096"),
    (lambda: Limits(attempts=0), "attempts=0"),
  ],
)
def test_options(make, message):
  with pytest.raises(ValueError, match=message):
    make()


class _Model:
  """Fake captioner: a caption is the first pixel and the seed."""

  fingerprint = "f00d"
  can_caption = True

  def decode(self, data):
    return decode.whole(data, 4, "squash")

  def sample_captions(self, images, seeds, **options):
    row = lambda image, seed: type("Row", (), {"text": f"{image[0, 0, 0]} {seed}", "tokens": 3})
    return [row(*pair) for pair in zip(images, seeds, strict=True)]


def test_own_captioner(data, tmp_path):
  options = {"captions": 2, "temperature": 1.0, "top_k": 5, "top_p": 1.0, "seed": 9}
  own = lambda **change: FolderCaptioner(_Model(), **(options | {"batch_size": 4} | change))
  summary = recaption(data, tmp_path / "c", own())
  assert (summary.completion_tokens, summary.unknown) == (2 * 3 * 20, 0)
  for record, row in enumerate(_rows(tmp_path / "c")):
    seeds = [hashing.key(9, record, number) for number in (0, 1)]
    assert row[3] == (None if record == BAD else [f"{record * 9} {seed}" for seed in seeds])
  expected = _bytes(tmp_path / "c")
  os.unlink(tmp_path / "c" / "00002.parquet")
  assert recaption(data, tmp_path / "c", own()).captioned == COUNTS[2]
  assert _bytes(tmp_path / "c") == expected
  with pytest.raises(ValueError, match="written for other data, another model or other settings"):
    recaption(data, tmp_path / "c", own(seed=8))


def test_sources_with_keep_lists_are_rejected(data, tmp_path):
  data.keep = object()
  with pytest.raises(ValueError, match="captions are for all records; omit it"):
    captions.recaption(data, tmp_path / "c", None)
