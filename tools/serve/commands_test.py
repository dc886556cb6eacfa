"""Run the commands as a user does."""

from pathlib import Path
import shutil
import socket

import pytest

from ov_serve.testing.models import write_images, write_model
from tools.serve import embed, search, serve
from tools.testing import program


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("home")
  write_model(folder / "model", caption=False)
  write_images(folder / "photos", range(12))
  (folder / "photos" / "broken.jpg").write_bytes(b"not an image")
  done = program.run(embed, "--model=model", "--input=photos", "--out=index", cwd=folder)
  assert done.returncode == 0, done.stderr
  assert "index: 12 images; 12 images embedded, 0 unchanged" in done.stdout
  assert "skipped: 1 " in done.stdout
  return folder


def test_search_by_text_and_by_image(home: Path):
  done = program.run(search, "--index=index", "--count=3", "a red square", cwd=home)
  assert (done.returncode, len(done.stdout.splitlines())) == (0, 3), done.stderr
  done = program.run(search, "--index=index", "--image=photos/007.jpg", cwd=home)
  lines = done.stdout.splitlines()
  assert len(lines) == 10, done.stderr
  score, name = lines[0].split()
  # The vectors of the index are rounded to float16.
  assert name == "007.jpg" and float(score) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
  ("command", "arguments", "message"),
  [
    (embed, ["--model=model"], "give --model=FOLDER, --input=IMAGES and --out=FOLDER"),
    (embed, ["--model=no", "--input=photos", "--out=x"], "no model in no: config.json is missing"),
    (embed, ["--model=model", "--input=nowhere", "--out=x"], "nowhere"),
    (embed, ["--wrong=1"], "Unknown command line flag 'wrong'"),
    (search, ["--index=index"], "give --index=FOLDER, and a text"),
    (search, ["--index=photos", "red"], "photos holds no index"),
    (search, ["--index=index", "--image=none.jpg"], "none.jpg: No such file"),
    (search, ["--index=index", "--image=photos/broken.jpg"], "photos/broken.jpg is not usable"),
    (search, ["--index=index", "--count=0", "red"], "k=0"),
    (serve, [], "give --index=FOLDER, or --model=FOLDER"),
    (serve, ["--index=photos"], "photos holds no index"),
    (serve, ["--index=index", "--host=0.0.0.0"], "allow_host"),
    (serve, ["--index=index", "--max_mb=0"], "max_mb=0: expected a number above 0"),
    (serve, ["--index=index", "--max_mb=nan"], "max_mb=nan: expected a number above 0"),
    (serve, ["--index=index", "--port=65536"], "port=65536: expected 0 to 65535"),
  ],
)
def test_mistakes_are_reported_in_one_line(home: Path, command, arguments, message):
  done = program.run(command, *arguments, cwd=home)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_used_port_is_reported_in_one_line(home: Path):
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen()
    port = other.getsockname()[1]
    done = program.run(serve, "--index=index", f"--port={port}", cwd=home)
  assert done.returncode != 0
  assert len(done.stderr.splitlines()) == 1 and "choose another port" in done.stderr


def test_a_damaged_index_is_reported_and_repaired(home: Path, tmp_path: Path):
  shutil.copytree(home / "index", tmp_path / "index")
  (tmp_path / "index" / "index.json").write_text("{")
  arguments = f"--model={home / 'model'}", f"--input={home / 'photos'}"
  done = program.run(search, "--index=index", "red", cwd=tmp_path)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1 and "embed the images again" in done.stderr
  done = program.run(embed, *arguments, "--out=index", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert "damaged: 1, moved to index/damaged-*" in done.stdout
  assert (tmp_path / "index" / "damaged-1" / "index.json").read_text() == "{"
  done = program.run(search, "--index=index", "red", cwd=tmp_path)
  assert done.returncode == 0, done.stderr


def test_a_moved_model_is_named(home: Path, tmp_path: Path):
  shutil.copytree(home / "index", tmp_path / "index")
  shutil.copytree(home / "model", tmp_path / "elsewhere")
  done = program.run(search, "--index=index", "--model=elsewhere", "red", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
