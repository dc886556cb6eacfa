"""Tests of --workdir=gs://...: a run resumes on another machine from the bucket alone.

The bucket is a server in this process (`fake_bucket`). The apps, TensorFlow, TensorStore and orbax
are real.
"""

import importlib.util
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import pytest

from apps.exporter import source
from apps.trainer.sinks import compare_metrics, read_metrics
from tests.end_to_end import runner
from tests.end_to_end.fake_bucket import FakeBucket
from tests.multiprocess import launcher

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="checkpoints in a bucket need TensorFlow, which is not installed",
  ),
  pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the fake bucket needs a certificate made by openssl"
  ),
]
URL = "gs://bucket/runs/one"
FLAGS = (
  *runner.TINY,
  "--config.total_steps=16",
  "--config.checkpoint.every=6",
  "--config.eval.every=8",
  "--config.tensorboard=True",
)
# Step of a checkpoint -> last step whose metrics were in the bucket when saving began.
Began = dict[int, int]


def steps(bucket, name="runs/one/metrics.jsonl"):
  """Return the steps of the metrics in the bucket."""
  return [int(line.split(b'"step": ')[1].split(b",")[0]) for line in lines(bucket, name)]


def lines(bucket, name):
  return bucket.objects.get(name, b"").splitlines()


class Machine:
  """A new machine with an empty home and an empty temporary folder."""

  def __init__(self, folder: Path, bucket: FakeBucket):
    self.home, self.scratch = folder / "home", folder / "scratch"
    for path in (self.home, self.scratch):
      path.mkdir(parents=True)
    self.variables = {**bucket.environment(), "TMPDIR": str(self.scratch)}

  def start(self, *flags):
    return runner.start(*flags, cache=self.home, **self.variables)

  def run(self, *flags):
    return runner.run(*flags, cache=self.home, **self.variables)


@pytest.fixture
def bucket(tmp_path):
  with FakeBucket("bucket", tmp_path) as bucket:
    yield bucket


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Return the metrics of an uninterrupted run in a local folder."""
  folder = tmp_path_factory.mktemp("undisturbed")
  code, printed = runner.run(*FLAGS, f"--workdir={folder / 'run'}", cache=folder / "home")
  assert code == 0, printed
  return folder / "run" / "metrics.jsonl"


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
  """Kill a run after step 8 and resume it elsewhere; return bucket, output and machine."""
  folder = tmp_path_factory.mktemp("moved")
  began: Began = {}

  def note(name):
    step = name.removeprefix("runs/one/checkpoints/").split("/")[0]
    if step.isdigit():
      began.setdefault(int(step), max(steps(bucket), default=0))

  with FakeBucket("bucket", folder, on_write=note) as bucket:
    process = Machine(folder / "first", bucket).start(*FLAGS, f"--workdir={URL}")
    saved = "runs/one/checkpoints/6/commit_success.txt"
    while process.poll() is None and not (saved in bucket.objects and max(steps(bucket)) >= 8):
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "runs/one/checkpoints/16/commit_success.txt" not in bucket.objects
    second = Machine(folder / "second", bucket)
    code, printed = second.run(*FLAGS, f"--workdir={URL}")
    assert code == 0, printed
    yield bucket, began, printed, second


def test_a_killed_run_resumes_on_a_new_machine(moved, undisturbed, tmp_path):
  bucket, _, printed, _ = moved
  assert "main: restoring step " in printed
  assert f"done: {URL}/report.html" in printed
  (tmp_path / "metrics.jsonl").write_bytes(bucket.objects["runs/one/metrics.jsonl"])
  assert len(read_metrics(undisturbed)) == 18  # 16 steps, 2 evaluations
  assert not compare_metrics(undisturbed, tmp_path / "metrics.jsonl")


def test_all_files_are_in_the_bucket_and_none_on_the_machine(moved):
  bucket, _, _, machine = moved
  found = bucket.names("runs/one/")
  wanted = {
    "config.json", "evaluation.json", "evaluations/8.json", "evaluations/16.json", "metrics.jsonl",
    "report.html", "report.json", "tokenizer/packing.json", "tokenizer/tokenizer.json",
  }  # fmt: skip
  others = {name for name in found if not name.startswith(("checkpoints/", "tensorboard/"))}
  assert others == wanted
  assert sum(name.startswith("tensorboard/") for name in found) >= 2  # one per start
  for step in (12, 16):
    assert f"checkpoints/{step}/commit_success.txt" in found
    assert f"checkpoints/{step}/manifest.json" in found
  assert not any(name.startswith("checkpoints/6/state/") for name in found)  # two are kept
  assert list(machine.scratch.iterdir()) == []
  assert bucket.unknown == []


def test_metrics_are_uploaded_before_a_checkpoint_begins(moved):
  _, began, _, _ = moved
  assert began.keys() == {6, 12, 16}
  assert all(metrics >= step for step, metrics in began.items()), began


def test_check_changes_nothing(moved):
  bucket, _, _, machine = moved
  before = dict(bucket.objects)
  code, printed = machine.run(*FLAGS, "--check", f"--workdir={URL}")
  assert code == 0, printed
  assert "check passed" in printed
  assert "training a tokenizer" not in printed  # that of the run is in the bucket
  assert bucket.objects == before


def test_another_run_is_evaluated_from_the_bucket(moved, tmp_path):
  """Tokenizer, params and texts are those of the run, so the metrics are equal."""
  bucket, _, _, machine = moved
  flags = ("--config.eval_only=True", f"--config.init_from.path={URL}")
  code, printed = machine.run(*FLAGS, *flags, f"--workdir={tmp_path}")
  assert code == 0, printed
  expected = json.loads(bucket.objects["runs/one/evaluation.json"])["results"]
  assert json.loads((tmp_path / "evaluation.json").read_text())["results"] == expected


def test_an_export_reads_the_bucket(moved):
  bucket, _, _, machine = moved
  program = f"""
from {source.__name__} import load_source
model = load_source({URL!r})
print(model.about["step"], model.tokenizer.fingerprint, len(model.results))
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=runner.environment(machine.home, **machine.variables),
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  step, fingerprint, results = done.stdout.split()
  assert step == "16"
  metadata = bucket.objects["runs/one/checkpoints/16/metadata/metadata"]
  assert fingerprint.encode() in metadata
  assert int(results) > 3


def test_an_unusable_bucket_gives_a_one_line_error(bucket, tmp_path):
  machine = Machine(tmp_path, bucket)
  code, printed = machine.run(*FLAGS, "--workdir=gs://another-bucket/run")
  runner.expect_one_line(printed, code, r"writing in gs://another-bucket/run: .*does not exist")
  bucket.read_only = True
  code, printed = machine.run(*FLAGS, f"--workdir={URL}")
  runner.expect_one_line(printed, code, rf"writing in {URL}: .*may not write here")
  assert "drawing scenes" not in printed
  assert bucket.objects == {}
  assert list(machine.scratch.iterdir()) == []


def test_two_machines_share_a_run(bucket, tmp_path):
  """Each has separate files; the second gets the tokenizer of the first through the bucket."""
  machines = [Machine(tmp_path / str(number), bucket) for number in range(2)]
  warmup = "--config.optimizer.schedule.warmup_steps=1"
  flags = ("--config.total_steps=4", "--config.checkpoint.every=4", warmup)
  flags += (runner.NO_COMPILE_CACHE,)
  launcher.launch(
    [str(runner.CAPTION_TRAIN), *runner.TINY, *flags, f"--workdir={URL}"],
    processes=2,
    devices=1,
    timeout=280,
    per_process_env=[
      {**runner.environment(machine.home), **machine.variables, "OV_PROCESS_ID": str(number)}
      for number, machine in enumerate(machines)
    ],
  )
  assert max(steps(bucket)) == 4
  found = bucket.names("runs/one/")
  assert {"report.html", "checkpoints/4/commit_success.txt"} <= set(found)
  assert not any(name.startswith("data/") for name in found)
