"""Tests of gcloud calls, their errors, and the creation of TPUs."""

import hashlib
import io
import json
from pathlib import Path
import random
import tarfile
import types
from typing import Any

from absl import flags
from absl.testing import flagsaver
import pytest

from tools.tpu import fake_gcloud, output, tpu, workers
from tools.tpu.gcloud import Fleet, Gcloud, GcloudError, cause_of, open_fleet, reason_of
from tools.tpu.names import Topology

_CLOUD = Gcloud("us-central2-b", "my-project")
_SMALL = Topology.parse("v4-16")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  folder = tmp_path / "fake"
  fake_gcloud.install(folder)
  monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
  return folder


# Messages of gcloud and its backend services.
@pytest.mark.parametrize(
  "words, expected",
  [
    ('There is no more capacity in the zone "us-central2-b"', "no capacity"),
    ("Insufficient reserved capacity. Contact customer support", "no capacity"),
    ("code: ZONE_RESOURCE_POOL_EXHAUSTED", "no capacity"),
    ("Quota limit 'TPUV4sPreemptiblePodPerProjectPerZone' has been exceeded", "quota"),
    ("RESOURCE_EXHAUSTED: too many", "quota"),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "permission"),
    ("ALREADY_EXISTS: Resource 'pod' already exists", "exists already"),
    ("NOT_FOUND: Resource 'pod' was not found", "not found"),
    ("INVALID_ARGUMENT: Accelerator type is not found in zone", "wrong argument"),
    ("ERROR: (gcloud) unrecognized arguments: --x", "wrong argument"),
    ("Connection closed by remote host", "failed"),
  ],
)
def test_causes(words: str, expected: str):
  assert cause_of(f"WARNING: something\n{words}\n") == expected


def test_a_reason_is_one_printable_line():
  assert reason_of("first\n\x1b[31mERROR: ö\x07\n\n") == "[31mERROR: ö"
  assert reason_of("why\n##### Command execution on worker 0 failed. Continuing.\n") == "why"
  failed = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]."
  assert reason_of(f"WARNING: x\nPermission denied\n{failed}\n") == "Permission denied"
  assert reason_of(failed) == failed
  assert reason_of("") == "" and len(reason_of("x" * 999)) == 400


def test_a_reason_of_several_lines_begins_with_the_error():
  """The message is that of gcloud 528; its last line alone is not informative."""
  written = "WARNING: x\nERROR: Failed to find attribute [project].\n- give `--project`\n- or y\n"
  assert (
    reason_of(written) == "ERROR: Failed to find attribute [project]. - give `--project` - or y"
  )


def test_arguments_arrive_unchanged(fake: Path):
  odd = ["a b", "$(id)", "; rm -rf /", "'", '"', "ü\n", "*", "--flag=x y"]
  program = "import sys, json; print(json.dumps({'found': sys.argv[1:]}))"
  (fake / "worker-1/ov-worker.py").write_text(program)
  found = Fleet(_CLOUD, "pod", (1,), _SMALL).ask_one(1, *odd)
  assert found == {"found": odd}
  (call,) = fake_gcloud.calls(fake)
  assert call[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
  assert "--zone=us-central2-b" in call and "--project=my-project" in call
  assert not [argument for argument in call if "host-key" in argument]  # gcloud checks host keys


def test_time_limit(fake: Path):
  fake_gcloud.rules(fake, {"match": ["ssh"], "sleep": 30})
  with pytest.raises(GcloudError, match="no answer within 0.5 s") as error:
    Gcloud("us-central2-b", timeout=0.5).tpus("tpu-vm", "ssh", "pod", worker=0)
  assert error.value.cause == "time limit"


def test_a_worker_that_does_not_answer_is_reported(fake: Path):
  fake_gcloud.rules(fake, {"match": ["ssh", "--worker=1"], "code": 255, "stderr": "closed\n"})
  fleet = open_fleet(_CLOUD, "pod", "all", "")
  for worker in (0, 1):
    (fake / f"worker-{worker}/ov-worker.py").write_text("print('hello')\nprint('{\"a\": 1}')")
  answers = fleet.ask("status")
  assert answers[0] == {"a": 1} and str(answers[1]) == "closed"
  (fake / "worker-0/ov-worker.py").write_text("print('hello')")
  assert "expected a line of JSON" in str(fleet.ask("status")[0])


def test_the_error_of_a_worker_is_shown_without_gclouds_message(fake: Path):
  fleet = open_fleet(_CLOUD, "pod", "all", "")
  program = "import sys; print('{\"error\": \"no run\"}'); print('#####', file=sys.stderr)"
  (fake / "worker-0/ov-worker.py").write_text(program)
  answers = fleet.ask("status")
  assert str(answers[0]) == "no run"
  assert str(answers[1]) == "ov-worker.py is missing; first run: tpu sync"


@pytest.mark.parametrize(
  "worker, topology, node, message",
  [
    ("2", "", {}, "expected all, or a number from 0 to 1"),
    ("-1", "", {}, "expected all"),
    ("all", "v4-32", {}, "pod is a v4-16"),
    ("all", "", {"state": "PREEMPTED"}, "is PREEMPTED; expected READY"),
    ("all", "", {"networkEndpoints": [{}] * 3}, "has 3 workers; a v4-16 has 2"),
    ("all", "", {"acceleratorType": "v3-8"}, "expected one of v4-N"),
  ],
)
def test_fleets_that_cannot_be_opened(
  fake: Path, worker: str, topology: str, node: dict[str, object], message: str
):
  path = fake / "node.json"

  path.write_text(json.dumps(json.loads(path.read_text()) | node))
  with pytest.raises(ValueError) as error:
    open_fleet(_CLOUD, "pod", worker, topology)
  assert message in str(error.value)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Record the pauses between attempts without waiting; each has its maximum length."""
  found: list[float] = []
  monkeypatch.setattr(random, "uniform", lambda low, high: high)
  monkeypatch.setattr(tpu, "time", types.SimpleNamespace(sleep=found.append))
  return found


def _create(tries: int, queued: bool = False) -> dict[str, Any]:
  flags.FLAGS.mark_as_parsed()
  given = {"name": "pod", "topology": "v4-16", "queued": queued, "attempts": tries, "yes": True}
  with flagsaver.flagsaver(**given):
    return tpu.create(_CLOUD)[0][0]


def test_pauses_double_up_to_the_longest(pauses: list[float], monkeypatch: pytest.MonkeyPatch):
  assert list(tpu.attempts(8)) == [1, 2, 3, 4, 5, 6, 7, 8]
  assert pauses == [15, 30, 60, 120, 240, 480, 600]
  pauses.clear()
  monkeypatch.setattr(random, "uniform", lambda low, high: low)
  assert list(tpu.attempts(3)) == [1, 2, 3] and pauses == [7.5, 15]


def test_create_retries_until_success(
  fake: Path, pauses: list[float], capsys: pytest.CaptureFixture[str]
):
  full = "ERROR: There is no more capacity in the zone\n"
  fake_gcloud.rules(fake, {"match": ["create"], "times": 2, "code": 1, "stderr": full})
  assert _create(9)["attempts"] == 3 and pauses == [15, 30]
  assert len(fake_gcloud.calls(fake)) == 3
  logged = capsys.readouterr().err
  assert "tpu: attempt 1 of 9: no capacity: ERROR: There is no more capacity" in logged


@pytest.mark.parametrize(
  "stderr, attempts, message",
  [
    ("ERROR: no more capacity", 3, "not created after 3 attempts: no capacity"),
    ("PERMISSION_DENIED: tpu.nodes.create", 1, "permission: PERMISSION_DENIED"),
    ("ALREADY_EXISTS: pod", 1, "tpu delete --name=pod"),
    ("INVALID_ARGUMENT: version", 1, "wrong argument: INVALID_ARGUMENT"),
    ("", 1, "exit code 1 without a message"),
  ],
)
def test_create_gives_up(fake: Path, pauses: list[float], stderr: str, attempts: int, message: str):
  fake_gcloud.rules(fake, {"match": ["create"], "code": 1, "stderr": stderr})
  with pytest.raises(ValueError) as error:
    _create(3)
  assert message in str(error.value)
  assert len(fake_gcloud.calls(fake)) == attempts


def _state(name: str, **more: object) -> dict[str, object]:
  answer = json.dumps({"state": {"state": name}})
  return {"match": ["queued-resources", "describe"], "code": 0, "stdout": answer, **more}


def test_a_queued_request_is_waited_for(fake: Path, pauses: list[float]):
  fake_gcloud.rules(fake, _state("WAITING_FOR_RESOURCES", times=2), _state("ACTIVE"))
  _create(5, queued=True)
  assert [call[3] for call in fake_gcloud.calls(fake)] == ["create"] + ["describe"] * 3
  assert "--node-id=pod" in fake_gcloud.calls(fake)[0] and pauses == [15, 30]


@pytest.mark.parametrize(
  "state, message",
  [("FAILED", "is FAILED"), ("SUSPENDED", "is SUSPENDED"), ("ACCEPTED", "still waits after 2")],
)
def test_a_queued_request_that_is_not_granted(
  fake: Path, pauses: list[float], state: str, message: str
):
  fake_gcloud.rules(fake, _state(state))
  with pytest.raises(ValueError, match=message):
    _create(2, queued=True)


def test_special_characters_in_answers_stay_in_their_cells(fake: Path):
  nodes = '[{"name": "n/\\u00fc\\"x\\ny\\u001b[31m", "state": "READY", "acceleratorType": "v4-8"}]'
  fake_gcloud.rules(fake, {"match": ["tpu-vm", "list"], "code": 0, "stdout": nodes})
  file = io.StringIO()
  output.show(*tpu.list_all(_CLOUD), file)
  lines = file.getvalue().splitlines()
  assert lines[1].startswith('ü"x\\ny\\x1b[31m  v4-8') and len(lines) == 2
  fake_gcloud.rules(fake, {"match": ["tpu-vm", "list"], "code": 0, "stdout": "<html>"})
  with pytest.raises(GcloudError, match="answered '<html>'; expected JSON"):
    tpu.list_all(_CLOUD)


def test_the_archive_contains_the_files_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  root, scratch = tmp_path / "root", tmp_path / "scratch"
  for folder in (root, scratch):
    folder.mkdir()
  monkeypatch.chdir(root)
  workers.git("init", "-q")
  for name, text in {
    ".gitignore": "*.log\n", "kept.py": "x = 1", "gone.py": "", "new ü\n.py": "", "a.log": "secret",
    "b.log": "forced",
  }.items():  # fmt: skip
    (root / name).write_text(text)
  (root / "link").symlink_to("kept.py")
  workers.git("add", "--force", "kept.py", "gone.py", "b.log")
  (root / "gone.py").unlink()
  before = workers.git("status", "--porcelain"), sorted(root.glob(".git/objects/*/*"))
  files, checksum = workers.pack(root, scratch)
  path = scratch / "ov-code.tgz"
  with tarfile.open(path) as tar:
    assert sorted(tar.getnames()) == [".gitignore", "b.log", "kept.py", "link", "new ü\n.py"]
    assert io.TextIOWrapper(tar.extractfile("kept.py")).read() == "x = 1"
  assert files == 5 and checksum == hashlib.sha256(path.read_bytes()).hexdigest()
  assert before == (workers.git("status", "--porcelain"), sorted(root.glob(".git/objects/*/*")))
  monkeypatch.chdir("/")
  with pytest.raises(ValueError, match="run this in a checkout"):
    workers.git("rev-parse", "--show-toplevel")
