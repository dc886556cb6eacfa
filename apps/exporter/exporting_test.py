"""Tests that exports are atomic, with fake libraries."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from apps.exporter import exporting
from apps.exporter.formats import format as form
from apps.exporter.source import Source
from apps.trainer.progress import Terminal
from ov_convert import accuracy, client_env, parity
from ov_convert.release import Preprocess, Release, round_params
import ov_data
import ov_models

CONFIG = ov_models.VisionLanguageConfig.openvision2(
  "mu/8", "Ti", image_size=16, vocab_size=64, max_len=6,
  encoder_options={"width": 16, "num_heads": 2, "mlp_dim": 24},
  decoder_options={"width": 16, "depth": 1, "mlp_dim": 24, "num_heads": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def source() -> Source:
  tokenizer = ov_data.Tokenizer.train(["a red square", "a blue dot"], 60, kind="words")
  params = round_params(ov_models.init(CONFIG, jax.random.key(0)), "float32")
  release = Release(CONFIG, params, Preprocess(16))
  return Source(release, tokenizer, None, {"config": None, "imported": {"from": "x", "notes": []}})


class Library:
  """Return a format whose fake library returns our outputs, changed by `disturb`."""

  def __init__(self, monkeypatch, names=("one", "two")):
    self.disturb = {}
    self.refuse = {}
    self.written = []
    table = {name: self._target(name) for name in names}
    monkeypatch.setattr(exporting, "EXPORTS", table)
    monkeypatch.setattr(exporting, "judge", self._judge)
    monkeypatch.setattr(exporting.card, "write_card", self._card)
    monkeypatch.setattr(exporting.card, "facts_of", lambda *a: a)

  def _target(self, name):
    def check(release):
      if name in self.refuse:
        raise ValueError(self.refuse[name])

    def write(folder, release):
      self.written.append(folder)
      (folder / "weights").write_text(name)
      (folder / "weights").chmod(0o600)

    return form.ExportFormat(
      name=name, title=name, library=None, check=check, write=write, client=name, here=True,
      offers=(), programs=(), sizes=form.fixed_size,
    )  # fmt: skip

  def _judge(self, chosen, folder, probe, ours, settings):
    assert (probe / "probe.npz").exists() and (folder / "weights").exists()
    arrays = {name: array.copy() for name, array in ours.items()}
    change = self.disturb.get(chosen.client)
    if change is not None:
      change(arrays)
    return parity.compare(ours, parity.Output(arrays, {}, {"library": "1.0"})), {"library": "1.0"}

  def _card(self, folder, facts):
    (folder / "README.md").write_text("card")


def run(source, out, formats=("one", "two")):
  return exporting.export(source, formats, out, None, "apache-2.0", Terminal(active=False))


def test_all_agree(source, tmp_path, monkeypatch):
  Library(monkeypatch)
  assert run(source, tmp_path / "deep" / "out")
  out = tmp_path / "deep" / "out"
  assert sorted(p.name for p in out.iterdir()) == ["export.json", "one", "two"]
  assert sorted(p.name for p in (out / "one").iterdir()) == ["README.md", "parity.json", "weights"]
  content = json.loads((out / "two" / "parity.json").read_text())
  assert content["versions"]["library"] == "1.0" and content["pictures"] == 4
  names = [row["name"] for row in content["rows"]]
  assert names[:2] == ["image/pixels", "image/block_00"] and "caption/ids" in names
  assert all(row["ok"] for row in content["rows"])
  assert [p.name for p in out.parent.iterdir()] == ["out"]
  assert (out / "one" / "weights").stat().st_mode == (out / "one" / "README.md").stat().st_mode


def test_a_mismatch_leaves_no_output(source, tmp_path, monkeypatch, capsys):
  library = Library(monkeypatch)

  def change(arrays):
    arrays["image/block_01"] += 1

  library.disturb["two"] = change
  assert not exporting.export(
    source, ["one", "two"], tmp_path / "out", None, "apache-2.0", Terminal()
  )
  assert list(tmp_path.iterdir()) == []
  printed = capsys.readouterr().err
  assert "two does not match: image/block_01 differs by 1.0e+00" in printed
  assert "one does not match" not in printed


@pytest.mark.parametrize("lowest", [0.97, 0.99])
def test_an_inaccurate_result_of_finish_leaves_no_output(
  source, tmp_path, monkeypatch, capsys, lowest
):
  library = Library(monkeypatch)

  def finish(folder, given, probe_of, weights):
    assert given is source
    inputs = np.load(probe_of() / "probe.npz")
    assert len(inputs["pixels"]) == 64 and weights == "int8"
    (folder / "weights").write_text("smaller")
    cosines = {"image": lowest}
    return accuracy.Accuracy("int8", 0.98, {"image": 64}, cosines, cosines, 0.75, None, 1, 2, {})

  table = {"one": library._target("one")}
  table["one"] = dataclasses.replace(
    table["one"], finish=finish, write=lambda *a, weights: library._target("one").write(*a)
  )
  monkeypatch.setattr(exporting, "EXPORTS", table)
  agreed = exporting.export(
    source, ["one"], tmp_path / "out", None, "mit", Terminal(), {"one": {"weights": "int8"}}
  )
  printed = capsys.readouterr().err
  assert agreed == (lowest > 0.98)
  if agreed:
    content = json.loads((tmp_path / "out/one/parity.json").read_text())
    assert content["accuracy"]["min_cosine"] == {"image": 0.99} and content["weights"] == "int8"
    assert (tmp_path / "out/one/weights").read_text() == "smaller"
  else:
    assert list(tmp_path.iterdir()) == []
    assert "with float32 weights is 0.970, expected at least 0.98; choose a larger type" in printed


def test_a_load_failure_counts_as_a_mismatch(source, tmp_path, monkeypatch, capsys):
  library = Library(monkeypatch)

  def change(arrays):
    raise client_env.ClientError("run_two.py failed: KeyError: 'architecture'")

  library.disturb["two"] = change
  assert not exporting.export(source, ["two"], tmp_path / "out", None, "apache-2.0", Terminal())
  assert list(tmp_path.iterdir()) == []
  assert "KeyError: 'architecture'" in capsys.readouterr().err


def test_unsupported_formats_are_reported_together_before_any_work(source, tmp_path, monkeypatch):
  library = Library(monkeypatch, names=("one", "two", "three"))
  library.refuse = {"one": "no pool='map'", "three": "no decoder"}
  with pytest.raises(ValueError, match=r"one: no pool='map' three: no decoder"):
    run(source, tmp_path / "out", ("one", "two", "three"))
  assert library.written == [] and list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_no_output(source, tmp_path, monkeypatch):
  library = Library(monkeypatch)

  def change(arrays):
    raise KeyboardInterrupt

  library.disturb["two"] = change
  with pytest.raises(KeyboardInterrupt):
    run(source, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_export_are_not_reused(source, tmp_path, monkeypatch):
  Library(monkeypatch)
  stale = tmp_path / ".out.abc.partial" / "one"
  stale.mkdir(parents=True)
  (stale / "old").touch()
  assert run(source, tmp_path / "out")
  assert not (tmp_path / "out" / "one" / "old").exists()
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_custom_images(source, tmp_path, monkeypatch):
  Library(monkeypatch)
  with pytest.raises(ValueError, match="no file with the suffix .jpg"):
    exporting.export(
      source, ["one"], tmp_path / "out", tmp_path, "apache-2.0", Terminal(active=False)
    )
  for number, data in enumerate(exporting.probe.pictures(None, 2)):
    (tmp_path / f"{number}.jpg").write_bytes(data)
  assert exporting.export(
    source, ["one"], tmp_path / "out", tmp_path, "apache-2.0", Terminal(active=False)
  )
  content = json.loads((tmp_path / "out" / "one" / "parity.json").read_text())
  assert content["pictures"] == 2


def test_generated_images_are_deterministic_and_not_square():
  first, again = exporting.probe.pictures(None), exporting.probe.pictures(None)
  assert first == again and len(set(first)) == 4
  for data in first:
    image = ov_data.decode.full(data)
    assert image.width != image.height and np.asarray(image).std() > 30
