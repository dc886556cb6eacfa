"""Tests of //apps:export as a user runs it: runs of both apps, every format, error messages."""

import json

import pytest

from apps.exporter.formats.table import EXPORTS
from tests.end_to_end.runner import CAPTION_TRAIN, CLIP_TRAIN, TINY, expect_one_line, run, tiny_clip

EXPORT = CAPTION_TRAIN.parent / "export.py"  # importing it would define --workdir twice


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def clip(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("runs") / "clip"
  code, printed = run(*tiny_clip(), f"--workdir={workdir}", cache=cache, app=CLIP_TRAIN)
  assert code == 0, printed
  return workdir


@pytest.fixture(scope="module")
def captioner(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("runs") / "captioner"
  code, printed = run(*TINY, f"--workdir={workdir}", cache=cache, app=CAPTION_TRAIN)
  assert code == 0, printed
  return workdir


def export(*args, cache, **more):
  return run(*args, cache=cache, app=EXPORT, timeout=800, **more)


@pytest.mark.parametrize("kind", ["clip", "captioner"])
def test_formats_of_a_run(kind, cache, tmp_path, request):
  workdir, out = request.getfixturevalue(kind), tmp_path / "out"
  formats = tuple(EXPORTS) if kind == "clip" else ("safetensors", "transformers", "stablehlo")
  code, printed = export(
    f"--workdir={workdir}", f"--format={','.join(formats)}", f"--out={out}", cache=cache
  )
  assert code == 0, printed
  assert "FAILS" not in printed
  assert {p.name for p in out.iterdir()} == {*formats, "export.json"}
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  judged = {}
  for name in formats:
    card = (out / name / "README.md").read_text()
    assert card.startswith("---\n") and "## Agreement with the original" in card
    assert str(workdir) not in card and "samples seen | 480" in card
    rows = json.loads((out / name / "parity.json").read_text())["rows"]
    assert all(row["ok"] for row in rows)
    judged[name] = {row["name"] for row in rows}
  assert all("image/pooled" in names for names in judged.values())
  if kind == "clip":
    assert "text/embedding" in judged["onnx"] & judged["open_clip"] & judged["transformers"]
  else:
    assert "caption/ids" in judged["safetensors"] & judged["stablehlo"]

  # Importing the export gives a model that trains and has the metrics of the run.
  back = tmp_path / "back"
  code, printed = export(
    f"--from=safetensors:{out}/safetensors", f"--to-workdir={back}", cache=cache
  )
  assert code == 0, printed
  code, printed = export(f"--workdir={back}", f"--out={tmp_path / 'again'}", cache=cache)
  assert code == 0, printed
  assert (tmp_path / "again/safetensors/model.safetensors").read_bytes() == (
    out / "safetensors/model.safetensors"
  ).read_bytes()
  app, flags = (CLIP_TRAIN, tiny_clip()) if kind == "clip" else (CAPTION_TRAIN, TINY)
  code, printed = run(
    *flags, f"--workdir={tmp_path / 'more'}", f"--config.init_from.path={back}",
    "--config.total_steps=2", "--config.optimizer.schedule.warmup_steps=1", cache=cache, app=app,
  )  # fmt: skip
  assert code == 0, printed
  assert "  fresh" not in printed and "  unused" not in printed


# The two shards run every other test; in this order, each trains one of the models.
def test_a_dry_run_lists_what_would_be_uploaded(clip, cache, tmp_path):
  out = tmp_path / "out"
  code, printed = export(
    f"--workdir={clip}", "--format=timm", f"--out={out}", "--push_to_hub=org/name", "--dry_run",
    cache=cache,
  )  # fmt: skip
  assert code == 0, printed
  assert (
    "org/name: " in printed and "model.safetensors" in printed and "nothing was uploaded" in printed
  )
  code, printed = export(f"--out={out}", "--push_to_hub=org/name", "--dry_run", cache=cache)
  assert code == 0 and "model.safetensors" in printed, printed


def test_sixteen_bits_at_another_resolution(captioner, cache, tmp_path):
  out = tmp_path / "out"
  code, printed = export(
    f"--workdir={captioner}", "--format=safetensors,timm,stablehlo", f"--out={out}",
    "--dtype=bfloat16", "--image_size=48", cache=cache,
  )  # fmt: skip
  assert code == 0, printed
  config = json.loads((out / "safetensors/config.json").read_text())
  assert config["dtype"] == "bfloat16" and config["model"]["encoder"]["image_size"] == 48


def test_mistakes_give_one_line_errors(clip, cache, tmp_path):
  out = f"--out={tmp_path / 'out'}"
  for flags, said in (
    ([], "give --workdir=RUN --format=... --out=FOLDER to export"),
    ([f"--workdir={clip}"], "give --workdir=RUN"),
    (
      [f"--workdir={clip}", out, "--format=timn"],
      "unknown format timn; choose from safetensors",
    ),
    ([f"--workdir={clip}", out, "--dtype=int8"], "flag --dtype=int8"),
    ([f"--workdir={clip}", out, "--dry_run"], "--dry_run requires --push_to_hub=org/name"),
    ([f"--workdir={clip}", f"--out={clip}"], "exists and is not empty; choose another folder"),
    ([f"--workdir={clip}", "--out=gs://bucket/x"], "--out=gs://bucket/x is remote"),
    (
      [f"--from=timm:{tmp_path}", "--to_workdir=gs://bucket/x"],
      "--to_workdir=gs://bucket/x is remote",
    ),
    ([f"--workdir={tmp_path}/none", out], "no such folder"),
    ([f"--workdir={clip}", out, "--step=7"], "no checkpoint of step 7"),
    ([f"--workdir={clip}", out, "--image_size=7"], "smaller than one patch of 16"),
    ([f"--workdir={clip}", out, "--format=onnx", "--dtype=float16"], "onnx: .*float32"),
    ([f"--workdir={clip}", out, "--push_to_hub=org/name"], "HF_TOKEN"),
    ([f"--workdir={clip}", out, "--push_to_hub=name", "--dry_run"], "org/name"),
    ([f"--out={tmp_path}", "--push_to_hub=org/name"], "is not an export to upload"),
    (["--from=timm:x"], "an import needs both"),
    ([f"--from=timm:{tmp_path}", f"--to_workdir={tmp_path}/w"], r"config\.json"),
    ([f"--from=tim:{tmp_path}", f"--to_workdir={tmp_path}/w"], "tim"),
  ):
    code, printed = export(*flags, cache=cache, HF_TOKEN="")
    expect_one_line(printed, code, said)
  assert list(tmp_path.iterdir()) == []
