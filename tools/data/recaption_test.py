"""Run the command as a user does."""

from pathlib import Path

import pytest

from ov_data.annotations import Annotations
from ov_serve.testing.models import write_images, write_model
from tools.data import recaption
from tools.data.captions_testing import serving
from tools.testing import program

KEY = "sk-not-a-real-key"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("home")
  write_model(folder / "model")
  write_model(folder / "silent", caption=False)
  write_images(folder / "photos", range(10), captions=True)
  return folder


def test_server(home: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("OV_TEST_KEY", KEY)
  flags = ("--input=photos", "--output=c", "--caption_keys=txt", "--captions=2",
           "--api_key_env=OV_TEST_KEY", "--prompt_price=2", "--completion_price=5")  # fmt: skip
  with serving() as server:
    server_flags = (f"--server={server.url}", "--served_model=m")
    done = program.run(recaption, *flags, *server_flags, cwd=home)
    assert done.returncode == 0, done.stderr
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert done.stdout.splitlines() == [
      "c: 10 records; 10 captioned in this run",
      # 1000 * 2 / 10^6 + 140 * 5 / 10^6
      "tokens: 1,000 of prompts and images, 140 generated; price: 0.0027",
    ]
    echo = b'{"error": {"message": "wrong key: sk-not-a-real-key"}}'
    server.fault = lambda image, attempt: (401, {}, echo)
    done = program.run(recaption, *flags, *server_flags, "--output=e", cwd=home)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].endswith(
    "the server responds with status 401 (wrong key: [API key]); set the API key in the environment"
  )
  assert KEY not in done.stdout + done.stderr


def test_own_captioner(home: Path):
  flags = ("--input=photos", "--model=model", "--captions=2", "--top_k=20", "--temperature=2",
           "--batch_size=4", "--caption_keys=txt")  # fmt: skip
  done = program.run(recaption, *flags, "--output=own", cwd=home)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("own: 10 records; 10 captioned in this run\ntokens: 0 of prompts")
  captions = Annotations.open(str(home / "own")).read(0, ["captions"])["captions"]
  assert all(len(both) == 2 for both in captions)
  assert len({text for both in captions for text in both}) > 10


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--input=photos", "--output=x"], "either --server=URL with --served_model=NAME or --model"),
    (["--input=photos", "--output=x", "--model=silent"], "the model has no caption decoder"),
    (["--input=photos", "--output=x", "--server=file:///x", "--served_model=m"], "scheme 'file'"),
  ],
)
def test_mistakes_are_reported_in_one_line(home: Path, arguments: list[str], message: str):
  done = program.run(recaption, *arguments, cwd=home)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
