"""Run the command as a user does."""

from pathlib import Path

import numpy as np
import pytest

from ov_data.annotations import Annotations
from ov_serve.testing.models import write_images, write_model
from tools.data import annotate
from tools.testing import program


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("home")
  write_model(folder / "model", caption=False)
  write_images(folder / "photos", range(12), captions=True)
  (folder / "photos" / "003.jpg").write_bytes(b"not an image")
  return folder


def test_annotate(home: Path):
  flags = ("--input=photos", "--output=notes", "--caption_keys=txt", "--model=model")
  done = program.run(annotate, *flags, cwd=home)
  assert done.returncode == 0, done.stderr
  first, second = done.stdout.splitlines()
  assert first == "notes: 12 records; 12 annotated in this run"
  assert second.startswith("unusable: 1 unknown format (the first: ") and "003.jpg" in second
  found = Annotations.open(str(home / "notes"))
  columns = found.read(0, ["similarity", "image_embedding", "text_embedding"])
  assert columns["similarity"].count() == 11
  # The embeddings are rounded to float16, whose unit vectors have errors of about 2e-4.
  dots = (columns["image_embedding"].astype("f4") * columns["text_embedding"]).sum(1)
  assert dots == pytest.approx(columns["similarity"].filled(0), abs=2e-3)
  done = program.run(annotate, *flags, cwd=home)
  assert "notes: 12 records; 0 annotated in this run" in done.stdout


def test_likelihoods_and_heads(home: Path):
  write_model(home / "captioner")
  weight = np.linspace(-1, 1, 24, dtype=np.float32)
  np.savez(home / "head.npz", weight=weight[None], bias=np.float32([2]))
  flags = ("--input=photos", "--output=scores", "--caption_keys=txt", "--model=captioner")
  done = program.run(
    annotate, *flags, "--caption_likelihood", f"--heads=aesthetics={home}/head.npz", cwd=home
  )
  assert done.returncode == 0, done.stderr
  names = ["aesthetics", "caption_log_likelihood", "image_embedding"]
  columns = Annotations.open(str(home / "scores")).read(0, names)
  assert columns["caption_log_likelihood"].count() == 11
  assert (columns["caption_log_likelihood"].compressed() < 0).all()
  # Rounding of 24 numbers of at most 1 to float16, times weights of at most 1.
  want = columns["image_embedding"].astype("f4") @ weight + 2
  good = ~np.ma.getmaskarray(columns["aesthetics"])
  assert good.sum() == 11
  np.testing.assert_allclose(columns["aesthetics"][good], want[good], atol=24 * 2**-12)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--input=photos"], "give --input=DATA and --output=FOLDER"),
    (["--input=photos", "--output=x", "--model=no"], "no model in no: config.json is missing"),
    (["--input=photos", "--output=x", "--caption_likelihood"], "require a model; give one"),
    (["--input=photos", "--output=x", "--heads=a=no.npz"], "no.npz is not usable"),
    (["--input=nowhere", "--output=x"], "nowhere"),
    (["--input=photos", "--output=x", "--batch_size=0"], "batch_size=0: expected at least 1"),
    (["--input=photos", "--output=photos/000.jpg"], "000.jpg is a file"),
  ],
)
def test_mistakes_are_reported_in_one_line(home: Path, arguments: list[str], message: str):
  done = program.run(annotate, *arguments, cwd=home)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
