"""Invalid settings and data give a one-line error and exit code 2 before any expensive work."""

import re

import pytest

from apps.demo import scene_shards
from tests.end_to_end import runner


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  """Create a small data set to damage: 60 training scenes in one shard."""
  folder = tmp_path_factory.mktemp("shards")
  scene_shards.make_scenes_dataset(folder, {"train": 60}, image_size=32, workers=0)
  return folder


def own_data(folder, *flags):
  return (
    *runner.TINY,
    "--config.input.demo.train_examples=0",
    f"--config.input.data_dir={folder}",
    "--config.total_steps=4",
    "--config.optimizer.schedule.warmup_steps=0",
    *flags,
  )


def spoil(shards, tmp_path, change):
  """Copy the data set without its index, with `change` applied to the bytes of its shard."""
  (shard,) = shards.glob("*.tfrecord")
  (tmp_path / shard.name).write_bytes(change(bytearray(shard.read_bytes())))
  return tmp_path


def truncate(data):
  return data[: len(data) // 3]


def corrupt_pictures(data):
  """Destroy every JPEG header, and update the checksums of records like a faulty writer would."""
  from ov_data import records

  out, position = bytearray(), 0
  while position < len(data):
    length = int.from_bytes(data[position : position + 8], "little")
    body = bytes(data[position + 12 : position + 12 + length])
    out += records.frame(body.replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
    position += 16 + length
  return out


CASES = {
  "no flags": ((), "give --config"),
  "unknown flag": ((*runner.TINY, "--wrokdir=x"), "wrokdir"),
  "missing config": (
    ("--config=nowhere.py",),
    "nowhere.py: the file does not exist; recipes are in",
  ),
  "unknown config argument": ((f"--config={runner.DEMO}:runlokal=1",), "did you mean 'runlocal'"),
  "unknown setting": (
    (*runner.TINY, "--config.batchsize=2"),
    "config.batchsize: unknown setting; did you mean --config.batch_size",
  ),
  "settings of the published code": (
    (*runner.TINY, "--config.wandb.entity=me", "--config.model.image.dtype=bfloat16"),
    "WANDB_ENTITY=me here .*; --config.model.image.dtype is called --config.model.dtype=bfloat16",
  ),
  "flag of the published code": (
    (*runner.TINY, "--cleanup"),
    "--cleanup of the published code is not needed",
  ),
  "value of another type": ((*runner.TINY, "--config.batch_size=many"), "many"),
  "value out of range": ((*runner.TINY, "--config.log_every=0"), "config.log_every=0"),
  "setting by its old name": (
    (*runner.TINY, "--config.model.caption_weight=-1"),
    "config.loss.caption=-1.0; expected a finite number",
  ),
  "unknown variant": ((*runner.TINY, "--config.model.encoder=Tiny/16"), "Tiny"),
  "width and heads": (
    (*runner.TINY, "--config.model.encoder_options={'num_heads': 5}"),
    "num_heads|heads",
  ),
  "picture smaller than a patch": (
    (*runner.TINY, "--config.model.image_size=8"),
    "image of 8 x 8 pixels is smaller than one patch",
  ),
  "keep ratio": ((*runner.TINY, "--config.model.keep_ratio=0"), "keep_ratio=0"),
  "warm-up": (
    (*runner.TINY, "--config.optimizer.schedule.warmup_steps=99"),
    "warmup_steps=99 must be smaller than total_steps=30",
  ),
  "frozen nothing": ((*runner.TINY, "--config.optimizer.frozen=('nothing',)"), "nothing"),
  "mesh": ((*runner.TINY, "--config.mesh.data=3"), "3"),
  "batch not divisible": (
    (*runner.TINY, "--config.batch_size=30", "--config.accumulate=4"),
    "batch_size=30 is not a multiple of 4",
  ),
  "attention of another device": (
    (*runner.TINY, "--config.model.attention=cudnn"),
    "cudnn",
  ),
  "another store as workdir": (
    (*runner.TINY, "--workdir=s3://b/x"),
    "gs://BUCKET/FOLDER; no other",
  ),
  "file as workdir": ((*runner.TINY, f"--workdir={__file__}"), "--workdir=.* cannot be written"),
  "bucket without a folder": ((*runner.TINY, "--workdir=gs://bucket/"), "a folder for each run"),
  "nothing to evaluate": ((*runner.TINY, "--config.eval_only=True"), "holds no checkpoint"),
  "wandb without a key": (
    (*runner.TINY, "--config.wandb_project=x"),
    "not installed|WANDB_API_KEY",
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_settings(name, tmp_path, cache):
  flags, said = CASES[name]
  if flags and not any(f.startswith("--workdir") for f in flags):
    flags = (*flags, f"--workdir={tmp_path / 'run'}")
  code, printed = runner.run(*flags, cache=cache, WANDB_API_KEY="")
  runner.expect_one_line(printed, code, said)


_FILE = """from apps.configs import caption_demo
def get_config(arg=None):
  config = caption_demo.get_config("runlocal")
  {}
  return config
"""


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (_FILE.format("config.wandb.project = 'x'"), "--config.wandb is called --config.wandb_project"),
    (_FILE.format("config.bach_size = 3"), "did you mean --config.batch_size"),
    (_FILE.format("assert 1 / 0"), "own.py, line 4: division by zero"),
    ("import nowhere", "own.py, line 1: No module named 'nowhere'"),
    ("x = 1", "has no function get_config"),
  ],
)
def test_wrong_configuration_files(content, said, tmp_path, cache):
  path = tmp_path / "own.py"
  path.write_text(content)
  flags = (f"--config={path}", f"--workdir={tmp_path / 'run'}")
  runner.expect_one_line(*reversed(runner.run(*flags, cache=cache)), said)


DATA_CASES = {
  "missing directory": (lambda folder, tmp: tmp / "nowhere", "no such file or directory"),
  "no matching shards": (lambda folder, tmp: f"{folder}/valid-*.tfrecord", "no file matches"),
  "empty directory": (lambda folder, tmp: tmp, "no \\*.tfrecord"),
  "shard of garbage": (lambda folder, tmp: spoil(folder, tmp, lambda data: b"x" * 999), "usable"),
  "corrupt JPEGs": (
    lambda folder, tmp: spoil(folder, tmp, corrupt_pictures),
    "records are broken, more than max_bad_fraction=",
  ),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_wrong_data(name, shards, tmp_path, cache):
  make, said = DATA_CASES[name]
  (tmp_path / "data").mkdir()
  flags = own_data(make(shards, tmp_path / "data"), f"--workdir={tmp_path / 'run'}")
  runner.expect_one_line(*reversed(runner.run(*flags, cache=cache)), said)


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("--config.input.image_key=jpeg",), "'jpeg' is in none of the first"),
    (("--config.input.caption_keys=('caption',)",), "'caption' is in none of the first"),
    (("--config.input.data_dir=",), "no training data"),
  ],
)
def test_invalid_data_description(flags, said, shards, tmp_path, cache):
  flags = own_data(shards, *flags, f"--workdir={tmp_path / 'run'}")
  runner.expect_one_line(*reversed(runner.run(*flags, cache=cache)), said)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("[PAD]\n[bos]\n[UNK]\nword\n", "eos"),
    ("[PAD]\n[bos]\n[eos]\n[UNK]\nword\nword\n", "word"),
    ("", "token"),
  ],
)
def test_wrong_vocabulary(content, said, shards, tmp_path, cache):
  vocabulary = tmp_path / "vocab.txt"
  vocabulary.write_text(content)
  flags = own_data(shards, f"--config.tokenizer.path={vocabulary}", f"--workdir={tmp_path / 'run'}")
  runner.expect_one_line(*reversed(runner.run(*flags, cache=cache)), said)


def test_the_complete_records_of_a_truncated_shard_are_used(shards, tmp_path, cache):
  """The lost records are logged with shard and offset, and are in the report."""
  (tmp_path / "data").mkdir()
  folder = spoil(shards, tmp_path / "data", truncate)
  code, printed = runner.run(*own_data(folder, f"--workdir={tmp_path / 'run'}"), cache=cache)
  assert code == 0, printed
  assert re.search(r"train-00000-of-00001.tfrecord.* byte \d+.*", printed), printed
  assert "truncated" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("kept", [0, 1])
def test_check_compares_records_with_the_manifest(kept, shards, tmp_path, cache):
  """Only the manifest shows that a shard is empty or was cut between two records."""

  def cut(data):
    return data[: kept * (16 + int.from_bytes(data[:8], "little"))]

  folder = spoil(shards, tmp_path, cut)
  (folder / "dataset.json").write_bytes((shards / "dataset.json").read_bytes())
  flags = own_data(folder, "--check", f"--workdir={tmp_path / 'run'}")
  said = rf"split 'train' has 60 records, but train-00000-of-00001\.tfrecord holds {kept} of 60"
  runner.expect_one_line(*reversed(runner.run(*flags, cache=cache)), said)


def test_check_prints_a_summary_of_the_run(tmp_path, cache):
  workdir = tmp_path / "run"
  code, printed = runner.run(*runner.TINY, "--check", f"--workdir={workdir}", cache=cache)
  assert code == 0, printed
  for fact in ("parameters", "params per device", "text tokens", "16 of 16 rows good", "passed"):
    assert fact in printed
  assert not (workdir / "checkpoints").exists()


def test_a_nan_loss_stops_the_run(tmp_path, cache):
  flags = (
    *runner.TINY,
    f"--workdir={tmp_path / 'run'}",
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.schedule.warmup_steps=0",
  )
  code, printed = runner.run(*flags, cache=cache)
  runner.expect_one_line(
    printed, code, r"step \d+ has a NaN or Inf: loss .*, grad_norm .*, update_norm"
  )


@pytest.mark.parametrize("app", [runner.CAPTION_TRAIN, runner.CLIP_TRAIN], ids=lambda app: app.stem)
def test_help_lists_the_flags(app, tmp_path):
  _, printed = runner.run("--help", app=app, cache=tmp_path)
  assert all(f"--{flag}:" in printed for flag in ("config", "workdir", "[no]check", "[no]compile"))
