"""Calls of gcloud: what they say, how they fail, and who is named."""

import io
import json
from pathlib import Path
import subprocess
import tarfile

import pytest

from tools.tpu import archive, fake_gcloud, output, provision
from tools.tpu.fleet import open_fleet
from tools.tpu.gcloud import Cause, Gcloud, GcloudError, Place, cause, said
from tools.tpu.names import Topology

_PLACE = Place("us-central2-b", "my-project")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  folder = tmp_path / "fake"
  fake_gcloud.install(folder)
  monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
  return folder


# Words that gcloud and the services behind it use.
@pytest.mark.parametrize(
  "words, expected",
  [
    ('There is no more capacity in the zone "us-central2-b"', Cause.CAPACITY),
    ("Insufficient reserved capacity. Contact customer support", Cause.CAPACITY),
    ("code: ZONE_RESOURCE_POOL_EXHAUSTED", Cause.CAPACITY),
    ("Quota limit 'TPUV4sPreemptiblePodPerProjectPerZone' has been exceeded", Cause.QUOTA),
    ("RESOURCE_EXHAUSTED: too many", Cause.QUOTA),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", Cause.PERMISSION),
    ("ALREADY_EXISTS: Resource 'pod' already exists", Cause.EXISTS),
    ("NOT_FOUND: Resource 'pod' was not found", Cause.NOT_FOUND),
    ("INVALID_ARGUMENT: Accelerator type is not found in zone", Cause.ARGUMENT),
    ("ERROR: (gcloud) unrecognized arguments: --x", Cause.ARGUMENT),
    ("Connection closed by remote host", Cause.OTHER),
  ],
)
def test_causes(words: str, expected: Cause):
  assert cause(f"WARNING: something\n{words}\n") is expected


def test_a_reason_is_one_line_a_terminal_can_show():
  assert said("first\n\x1b[31mERROR: ö\x07\n\n") == "[31mERROR: ö"
  assert said("why\n##### Command execution on worker 0 failed. Continuing.\n") == "why"
  failed = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]."
  assert said(f"WARNING: x\nPermission denied\n{failed}\n") == "Permission denied"
  assert said(failed) == failed
  assert said("") == "" and len(said("x" * 999)) == 400


def test_a_reason_of_several_lines_begins_with_the_error():
  """As gcloud 528 writes it: the last line alone says nothing."""
  written = "WARNING: x\nERROR: Failed to find attribute [project].\n- give `--project`\n- or y\n"
  assert said(written) == "ERROR: Failed to find attribute [project]. - give `--project` - or y"


def test_arguments_arrive_as_they_are(fake: Path):
  odd = ["a b", "$(id)", "; rm -rf /", "'", '"', "ü\n", "*", "--flag=x y"]
  print_all = "import sys, json; print(json.dumps(sys.argv[1:]))"
  found = Gcloud(_PLACE).ssh("pod", 1, ["python3", "-c", print_all, *odd])
  assert json.loads(found) == odd
  (call,) = fake_gcloud.calls(fake)
  assert call[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
  assert "--zone=us-central2-b" in call and "--project=my-project" in call
  assert not [argument for argument in call if "host-key" in argument]  # gcloud's checking stays


def test_time_limit(fake: Path):
  fake_gcloud.rules(fake, {"match": ["ssh"], "sleep": 30})
  with pytest.raises(GcloudError, match="no answer within 0.5 s") as error:
    Gcloud(_PLACE, timeout=0.5).ssh("pod", 0, ["true"])
  assert error.value.cause is Cause.TIMEOUT


def test_a_worker_that_does_not_answer_is_named(fake: Path):
  fake_gcloud.rules(fake, {"match": ["ssh", "--worker=1"], "code": 255, "stderr": "closed\n"})
  fleet = open_fleet(Gcloud(_PLACE), "pod", "all", "")
  for worker in (0, 1):
    (fake / f"worker-{worker}/ov-worker.pyz").write_text("print('hello')\nprint('{\"a\": 1}')")
  answers = fleet.ask("status")
  assert answers[0] == {"a": 1} and str(answers[1]) == "closed"
  (fake / "worker-0/ov-worker.pyz").write_text("print('hello')")
  assert "expected a line of JSON" in str(fleet.ask("status")[0])


def test_what_a_worker_refuses_is_not_what_gcloud_adds(fake: Path):
  fleet = open_fleet(Gcloud(_PLACE), "pod", "all", "")
  program = "import sys; print('{\"error\": \"no run\"}'); print('#####', file=sys.stderr)"
  (fake / "worker-0/ov-worker.pyz").write_text(program)
  answers = fleet.ask("status")
  assert str(answers[0]) == "no run"
  assert str(answers[1]) == "ov-worker.pyz is not there; first run: tpu sync"


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
    open_fleet(Gcloud(_PLACE), "pod", worker, topology)
  assert message in str(error.value)


def _wish(queued: bool = False) -> provision.Wish:
  return provision.Wish("pod", Topology.parse("v4-16"), "tpu-ubuntu2204-base", True, queued)


def _patience(attempts: int, draw: float = 1.0) -> tuple[provision.Patience, list[float]]:
  pauses: list[float] = []
  made = provision.Patience(attempts, draw=lambda: draw, sleep=pauses.append)
  return made, pauses


def test_pauses_double_up_to_the_cap():
  patience, pauses = _patience(8)
  assert list(patience.tries()) == [1, 2, 3, 4, 5, 6, 7, 8]
  assert pauses == [15, 30, 60, 120, 240, 480, 600]
  patience, pauses = _patience(3, draw=0.0)  # the smallest draw halves them
  assert list(patience.tries()) == [1, 2, 3] and pauses == [7.5, 15]


def test_create_tries_again_and_stops_on_success(fake: Path):
  full = "ERROR: There is no more capacity in the zone\n"
  fake_gcloud.rules(fake, {"match": ["create"], "times": 2, "code": 1, "stderr": full})
  patience, pauses = _patience(9)
  said: list[str] = []
  result = provision.create(Gcloud(_PLACE), _wish(), patience, said.append)
  assert result.rows[0]["attempts"] == 3 and pauses == [15, 30]
  assert len(fake_gcloud.calls(fake)) == 3
  assert said[0].startswith("attempt 1 of 9: no capacity: ERROR: There is no more capacity")


@pytest.mark.parametrize(
  "stderr, attempts, message",
  [
    ("ERROR: no more capacity", 3, "not created after 3 attempts: no capacity"),
    ("PERMISSION_DENIED: tpu.nodes.create", 1, "permission: PERMISSION_DENIED"),
    ("ALREADY_EXISTS: pod", 1, "tpu delete --name=pod"),
    ("INVALID_ARGUMENT: version", 1, "wrong argument: INVALID_ARGUMENT"),
    ("", 1, "exit code 1, without a word"),
  ],
)
def test_create_gives_up(fake: Path, stderr: str, attempts: int, message: str):
  fake_gcloud.rules(fake, {"match": ["create"], "code": 1, "stderr": stderr})
  patience, _ = _patience(3)
  with pytest.raises(ValueError) as error:
    provision.create(Gcloud(_PLACE), _wish(), patience, lambda _: None)
  assert message in str(error.value)
  assert len(fake_gcloud.calls(fake)) == attempts


def _state(name: str, **more: object) -> dict[str, object]:
  answer = json.dumps({"state": {"state": name}})
  return {"match": ["queued-resources", "describe"], "code": 0, "stdout": answer, **more}


def test_a_queued_request_is_waited_for(fake: Path):
  fake_gcloud.rules(fake, _state("WAITING_FOR_RESOURCES", times=2), _state("ACTIVE"))
  patience, pauses = _patience(5)
  provision.create(Gcloud(_PLACE), _wish(queued=True), patience, lambda _: None)
  assert [call[3] for call in fake_gcloud.calls(fake)] == ["create"] + ["describe"] * 3
  assert "--node-id=pod" in fake_gcloud.calls(fake)[0] and pauses == [15, 30]


@pytest.mark.parametrize(
  "state, message",
  [("FAILED", "is FAILED"), ("SUSPENDED", "is SUSPENDED"), ("ACCEPTED", "still waits after 2")],
)
def test_a_queued_request_that_does_not_come(fake: Path, state: str, message: str):
  fake_gcloud.rules(fake, _state(state))
  with pytest.raises(ValueError, match=message):
    provision.create(Gcloud(_PLACE), _wish(queued=True), _patience(2)[0], lambda _: None)


def test_odd_names_in_answers_stay_in_their_cells(fake: Path):
  nodes = '[{"name": "n/\\u00fc\\"x\\ny\\u001b[31m", "state": "READY", "acceleratorType": "v4-8"}]'
  fake_gcloud.rules(fake, {"match": ["tpu-vm", "list"], "code": 0, "stdout": nodes})
  text = output.as_text(provision.list_all(Gcloud(_PLACE)))
  assert text.splitlines()[1].startswith('ü"x\\ny\\x1b[31m  v4-8')
  assert len(text.splitlines()) == 2
  fake_gcloud.rules(fake, {"match": ["tpu-vm", "list"], "code": 0, "stdout": "<html>"})
  with pytest.raises(GcloudError, match="answered '<html>'; expected JSON"):
    provision.list_all(Gcloud(_PLACE))


def test_the_archive_holds_what_git_lists(tmp_path: Path):
  def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

  git("init", "-q")
  for name, text in {
    ".gitignore": "*.log\n", "kept.py": "x = 1", "gone.py": "", "new ü\n.py": "", "a.log": "secret",
  }.items():  # fmt: skip
    (tmp_path / name).write_text(text)
  (tmp_path / "link").symlink_to("kept.py")
  git("add", "kept.py", "gone.py")
  (tmp_path / "gone.py").unlink()
  packed = archive.write(tmp_path, Path(f"{tmp_path}.tgz"))
  with tarfile.open(packed.path) as tar:
    assert sorted(tar.getnames()) == [".gitignore", "kept.py", "link", "new ü\n.py"]
    assert io.TextIOWrapper(tar.extractfile("kept.py")).read() == "x = 1"
  assert packed.files == 4
  with pytest.raises(ValueError, match="run this in a checkout"):
    archive.root(Path("/"))
