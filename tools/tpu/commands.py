"""Verbs on the workers of a TPU: sync, setup, run, status, logs, stop, check, clean, kill."""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
import re
import tempfile
import time
from typing import Any

from tools.tpu import archive
from tools.tpu.fleet import PROGRAM, Fleet
from tools.tpu.gcloud import Cause, GcloudError
from tools.tpu.names import local_file
from tools.tpu.output import Result
from tools.tpu.worker import main as worker

FLAVOURS = ("tpu", "cuda", "cpu")
_ARCHIVE = "ov-code.tgz"
_COPY_SECONDS = 900.0
_SETUP_SECONDS = 1800.0
_COUNT_SECONDS = 300.0  # jax waits as long for processes that do not come
_KILL_SECONDS = 60.0  # beyond the grace period, until an answer is overdue
_APP = re.compile(r"[a-z][a-z0-9_]*")
_DISK_GB, _SKEW_SECONDS = 20.0, 5.0  # environment and compile cache; what TLS and leases forgive


def sync(fleet: Fleet, checkout: Path | None, say: Callable[[str], None]) -> Result:
  """Copies the checkout to ~/ov-code: tracked files and new ones, nothing that git ignores.

  Args:
    fleet: the workers.
    checkout: the folder; None in a dry run outside of one.
    say: takes lines of progress.
  """
  with tempfile.TemporaryDirectory() as scratch:
    if fleet.gcloud.dry_run or checkout is None:  # known only when it runs: in capitals
      folder, checksum, note = Path("SCRATCH"), "SHA256", ""
    else:
      folder = Path(scratch)
      packed = archive.write(checkout, folder / _ARCHIVE)
      worker.pack(folder / PROGRAM)
      checksum, note = packed.sha256, f"{packed.files:,} files, {packed.bytes / 1e6:.1f} MB packed"
      say(note)
    sent = fleet.send([str(folder / PROGRAM), str(folder / _ARCHIVE)], timeout=_COPY_SECONDS)
  unpacked = _those(fleet, sent).ask("unpack", _ARCHIVE, checksum)
  return _result({**sent, **unpacked}, note)


def setup(fleet: Fleet, flavour: str, libtpu: str) -> Result:
  """Installs the lock on every worker, then counts devices on all of them together."""
  if flavour not in FLAVOURS:
    raise ValueError(f"--extras={flavour!r}; expected one of {', '.join(FLAVOURS)}")
  arguments = [flavour]
  failures: dict[int, Any] = {}
  if libtpu:
    arguments.append(libtpu if libtpu.startswith("gs://") else "copied")
  if libtpu and not libtpu.startswith("gs://"):
    if not fleet.gcloud.dry_run and not Path(libtpu).is_file():
      raise ValueError(f"--libtpu={libtpu!r}; expected a file, or gs://BUCKET/PATH")
    copied = fleet.send([local_file(libtpu, "--libtpu")], "ov-libtpu.so", timeout=_COPY_SECONDS)
    failures, fleet_left = _failures(copied), _those(fleet, copied)
  else:
    fleet_left = fleet
  answers = {**failures, **fleet_left.ask("setup", *arguments, timeout=_SETUP_SECONDS)}
  if _failures(answers) or not fleet.whole:
    return _result(answers, "" if fleet.whole else "devices are counted with --worker=all only")
  begun = fleet.ask("count")
  if _failures(begun):
    return _result(begun)
  counted = fleet.ask("counted", f"{_COUNT_SECONDS:g}", timeout=_COUNT_SECONDS + _KILL_SECONDS)
  if fleet.gcloud.dry_run:
    return _result(counted)
  return _result({n: _right_devices(fleet, flavour, answer) for n, answer in counted.items()})


def _right_devices(fleet: Fleet, flavour: str, answer: Any) -> Any:
  """The answer, or a failure if jax sees other chips than the topology has."""
  if isinstance(answer, GcloudError) or flavour != "tpu":
    return answer
  found = (answer.get("platform"), answer.get("devices"))
  if found == ("tpu", fleet.topology.chips):
    return answer
  return _failure(f"jax sees {found[1]} {found[0]} devices; expected {fleet.topology.chips} tpu")


def run(
  fleet: Fleet, name: str, restarts: int, checkout: Path | None, command: list[str]
) -> Result:
  """Starts an app on every worker, in a session that outlives the connection.

  Args:
    fleet: the workers.
    name: of the run.
    restarts: how often a worker starts the app again after a failure.
    checkout: where the app must be; None in a dry run outside of a checkout.
    command: the app and its arguments.
  """
  if not command:
    raise ValueError("nothing to run; add: -- caption_train --config=... --workdir=...")
  app, *arguments = command
  file = checkout and checkout / "apps" / f"{app}.py"
  if not _APP.fullmatch(app) or (file and not file.is_file()):
    raise ValueError(f"there is no app {app!r}; expected the name of a file of apps/")
  result = _result(fleet.ask("start", name, str(restarts), app, *arguments))
  if 0 < result.failed < len(result.rows):
    text = (
      f"the others wait for {result.failed} of {len(result.rows)} workers: tpu stop --run={name}"
    )
    return Result(result.rows, text, result.failed)
  return result


def status(fleet: Fleet, name: str) -> Result:
  """Of every worker: whether it runs, its step, what it said last."""
  return _result(fleet.ask("status", name))


def logs(fleet: Fleet, name: str, out: Path) -> Result:
  """Copies every worker's log into a folder here."""
  if not fleet.gcloud.dry_run:
    out.mkdir(parents=True, exist_ok=True)

  def copy(number: int) -> dict[str, Any]:
    target = local_file(str(out / f"worker-{number}.log"), "--out")
    source = f"{fleet.name}:ov-run/{name}/worker.log"
    fleet.gcloud.scp([source], target, number, _COPY_SECONDS)
    return {"file": target}

  return _result(fleet.each(copy))


def stop(fleet: Fleet, name: str, grace: float) -> Result:
  """Ends the recorded process group of a run on all workers, and nothing else."""
  # All hear SIGTERM before any is waited for: a worker alone waits for the others at its next step.
  told = fleet.ask("terminate", name)
  reached = _those(fleet, told)
  ended = reached.ask("stop", name, f"{grace:g}", timeout=grace + _KILL_SECONDS)
  return _result({**told, **ended})


def clean(fleet: Fleet) -> Result:
  """Removes what killed processes of libtpu left, where nobody holds the chip."""
  return _result(fleet.ask("clean"))


def held(fleet: Fleet) -> dict[int, Any]:
  """The holders of the chips of each worker, as `worker/chips.py` describes them."""
  return fleet.ask("held")


def holder_rows(answers: Mapping[int, Any]) -> list[dict[str, Any]]:
  """A row for each process that has a chip open, and for each worker that did not answer."""
  rows: list[dict[str, Any]] = []
  for number, answer in sorted(answers.items()):
    if isinstance(answer, GcloudError):
      rows.append({"worker": number, "error": str(answer)})
      continue
    for holder in answer.get("holders", ()):
      row = {name: holder[name] for name in ("pid", "user", "command")}
      rows.append({"worker": number, **row, "kept": holder["kept"] or None})
  return rows


def kill(fleet: Fleet, answers: Mapping[int, Any], grace: float) -> Result:
  """Ends the holders that were shown: SIGTERM, SIGKILL after `grace` seconds, then a look again.

  Args:
    fleet: the workers.
    answers: of `held`. Nothing that it does not name is ended.
    grace: seconds.
  """
  if fleet.gcloud.dry_run:  # what is known only when it runs is in capitals
    fleet.ask("kill", f"{grace:g}", "PID:START", timeout=grace + _KILL_SECONDS)
    return Result([])
  failures = {n: answer for n, answer in answers.items() if isinstance(answer, GcloudError)}
  wanted = {n: _to_end(answer) for n, answer in answers.items() if n not in failures}

  def end(number: int) -> dict[str, Any]:
    single = dataclasses.replace(fleet, workers=(number,))
    command = ("kill", f"{grace:g}", *wanted[number])
    answer = single.ask(*command, timeout=grace + _KILL_SECONDS)[number]
    if isinstance(answer, GcloudError):
      raise answer
    left = [f"{h['pid']}: {h['kept'] or 'still there'}" for h in answer["holders"]]
    return {"ended": answer["ended"], "holds the chip": left}

  having = dataclasses.replace(fleet, workers=tuple(n for n, pids in wanted.items() if pids))
  result = _result({**failures, **having.each(end)})
  left = sum(bool(row.get("holds the chip")) for row in result.rows)
  note = f"a chip is still held on {left} of {len(result.rows)} workers" if left else ""
  text = "; ".join(filter(None, (note, result.text)))
  return Result(result.rows, text, result.failed + left)


def _to_end(answer: Mapping[str, Any]) -> list[str]:
  return [f"{h['pid']}:{h['start']}" for h in answer.get("holders", ()) if not h["kept"]]


def check(fleet: Fleet, bucket: str) -> Result:
  """What a run needs of every worker, and what is wrong with it."""

  def ask(number: int) -> dict[str, Any]:
    single = Fleet(fleet.gcloud, fleet.name, (number,), fleet.topology)
    before = time.time()
    answer = single.ask("check", *([bucket] if bucket else []))[number]
    if isinstance(answer, GcloudError):
      raise answer
    return _checked(answer, before, time.time()) if answer else {}

  answers = fleet.each(ask)
  result = _result(answers)
  problems = sum(bool(row.get("problems")) for row in result.rows)
  kinds = {(row["python"], row["libtpu"]) for row in result.rows if row.get("python")}
  text = f"workers differ in Python or libtpu: {len(kinds)} kinds" if len(kinds) > 1 else ""
  return Result(result.rows, text, result.failed + problems + (len(kinds) > 1))


def _checked(answer: dict[str, Any], before: float, after: float) -> dict[str, Any]:
  """The row of a worker. Its clock is known to within the time that asking took."""
  now = answer["time"]
  skew = min(now - before, 0.0) + max(now - after, 0.0)
  problems = []
  if answer["environment"] is None:
    problems.append("no environment: tpu setup")
  if answer["disk_free_gb"] < _DISK_GB:
    problems.append(f"less than {_DISK_GB:g} GB free")
  if abs(skew) > _SKEW_SECONDS:
    problems.append("clock")
  if answer["bucket"] not in (None, "ok"):
    problems.append("bucket")
  if answer["holders"]:
    problems.append(
      "chip held by " + ", ".join(f"{h['name']} ({h['pid']})" for h in answer["holders"])
    )
  return {
    "python": answer["python"],
    "environment": answer["environment"],
    "libtpu": answer["libtpu"],
    "disk_free_gb": answer["disk_free_gb"],
    "clock_skew_s": round(skew, 1),
    "clock_known_to_s": round(after - before, 1),
    "bucket": answer["bucket"],
    "problems": problems,
  }


def _failure(text: str) -> GcloudError:
  """A failure that gcloud did not see."""
  return GcloudError(text, Cause.OTHER)


def _failures(answers: dict[int, Any]) -> dict[int, GcloudError]:
  return {n: a for n, a in answers.items() if isinstance(a, GcloudError)}


def _those(fleet: Fleet, answers: dict[int, Any]) -> Fleet:
  """The workers that have not failed."""
  left = tuple(n for n in fleet.workers if n not in _failures(answers))
  return Fleet(fleet.gcloud, fleet.name, left, fleet.topology)


def _result(answers: dict[int, Any], text: str = "") -> Result:
  """One row for each worker, failures with their words."""
  rows, failed = [], _failures(answers)
  for number, answer in sorted(answers.items()):
    found = {"error": str(answer)} if number in failed else answer
    rows.append({"worker": number, **(found if isinstance(found, dict) else {})})
  if failed:
    named = ", ".join(map(str, sorted(failed)))
    text = f"{text + '; ' if text else ''}failed on worker {named} ({len(failed)} of {len(rows)})"
  return Result(rows, text, len(failed))
