"""Verbs for the workers of a TPU. Each reads its flags and returns table rows and a text line."""

import dataclasses
import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from tools.tpu import gcloud, names, output, worker
from tools.tpu.gcloud import Answers, Fleet, Gcloud, GcloudError
from tools.tpu.output import Result

FLAGS = flags.FLAGS
_COPY_SECONDS, _SETUP_SECONDS, _COUNT_SECONDS = 900.0, 1800.0, 300.0  # jax waits 300 s for others
_ANSWER_SECONDS = 60.0  # for an answer after the grace period
_LONGEST_GRACE, _CLOCK_SECONDS = 86400.0, 5.0  # TLS and leases tolerate this clock skew
_ARCHIVE = "ov-code.tgz"


def _fleet(cloud: Gcloud) -> Fleet:
  name = names.check("name", FLAGS.name)
  if FLAGS.topology:
    names.Topology.parse(FLAGS.topology)
  elif FLAGS.dry_run and FLAGS.worker == "all":
    output.log("a dry run does not query the workers: shown is the first; --topology shows all")
  return gcloud.open_fleet(cloud, name, FLAGS.worker, FLAGS.topology)


def _grace(default: float) -> float:
  grace = default if FLAGS.grace is None else FLAGS.grace
  if not 0 <= grace <= _LONGEST_GRACE:
    raise ValueError(f"--grace={grace:g}; expected seconds from 0 to {_LONGEST_GRACE:g}")
  return grace


def _result(answers: Answers, text: str = "") -> Result:
  """Return a row per worker, with `error` if it failed, and a line that lists the failures."""
  rows = []
  for number, answer in sorted(answers.items()):
    found = {"error": str(answer)} if isinstance(answer, GcloudError) else answer or {}
    rows.append({"worker": number, **found})
  if failed := [str(row["worker"]) for row in rows if "error" in row]:
    failure = f"failed on worker {', '.join(failed)} ({len(failed)} of {len(rows)})"
    text = f"{text}; {failure}" if text else failure
  return rows, text


def _checkout() -> Path | None:
  """Return the checkout of the current folder, or None in a dry run outside a checkout."""
  try:
    return Path(git("rev-parse", "--show-toplevel").strip())
  except ValueError:
    if FLAGS.dry_run:
      return None
    raise


def git(*arguments: str, **variables: str) -> str:
  """Run git in the current folder and return its output; raise ValueError if it fails."""
  try:
    done = subprocess.run(
      ["git", *arguments], capture_output=True, check=False, env=os.environ | variables,
      encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
  except FileNotFoundError:
    raise ValueError("git was not found on PATH; it packs the checkout: install it") from None
  if done.returncode:
    reason = done.stderr.strip().splitlines()[-1]
    raise ValueError(f"{Path.cwd()}: {reason}; run this in a checkout")
  return done.stdout


def pack(root: Path, scratch: Path) -> tuple[int, str]:
  """Write tracked files, and untracked files that are not ignored, to SCRATCH/ov-code.tgz.

  Returns:
    The number of files and the checksum of the archive.
  """
  paths = "--path-format=absolute", "--git-path", "objects", "--git-path", "index"
  objects, index = git("rev-parse", *paths).splitlines()
  # A copy of the index and a separate object folder leave the user's repository unchanged.
  place = {"GIT_INDEX_FILE": f"{scratch}/index", "GIT_OBJECT_DIRECTORY": f"{scratch}/objects"}
  place["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = objects
  (scratch / "objects").mkdir()
  if Path(index).exists():
    shutil.copyfile(index, scratch / "index")
  git("-C", str(root), "add", "--all", **place)
  tree = git("write-tree", **place).strip()
  git("-C", str(root), "archive", f"--output={scratch / _ARCHIVE}", tree, **place)
  checksum = hashlib.sha256((scratch / _ARCHIVE).read_bytes()).hexdigest()
  return git("ls-tree", "-rz", tree, **place).count("\0"), checksum


def sync(cloud: Gcloud) -> Result:
  """Copy tracked files, and untracked files that are not ignored, to ~/ov-code."""
  root, fleet, text, checksum = _checkout(), _fleet(cloud), "", "SHA256"
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path("SCRATCH" if cloud.dry_run else scratch)
    if root and not cloud.dry_run:
      shutil.copyfile(worker.__file__, folder / gcloud.PROGRAM)
      files, checksum = pack(root, folder)
      text = f"{files:,} files, {(folder / _ARCHIVE).stat().st_size / 1e6:.1f} MB packed"
      output.log(text)
    paths = str(folder / gcloud.PROGRAM), str(folder / _ARCHIVE), f"{fleet.name}:"
    sent = fleet.copy(*paths, timeout=_COPY_SECONDS)
  return _result(sent | fleet.without(sent).ask("unpack", _ARCHIVE, checksum), text)


def setup(cloud: Gcloud) -> Result:
  """Install the locked packages, then count the devices on all workers simultaneously."""
  libtpu, extras = FLAGS.libtpu, FLAGS.extras or "tpu"
  of_bucket = libtpu.startswith("gs://")
  if of_bucket:
    names.check("bucket", libtpu, "libtpu")
  fleet = _fleet(cloud)
  copied: Answers = {}
  if libtpu and not of_bucket:
    if not cloud.dry_run and not Path(libtpu).is_file():
      raise ValueError(f"--libtpu={libtpu!r}; expected a file, or gs://BUCKET/PATH")
    target = f"{fleet.name}:{worker.LIBTPU.name}"
    copied = fleet.copy(names.local_file(libtpu, "libtpu"), target, timeout=_COPY_SECONDS)
  more = [libtpu if of_bucket else "copied"] if libtpu else []
  answers = copied | fleet.without(copied).ask("setup", extras, *more, timeout=_SETUP_SECONDS)
  if len(fleet.workers) < fleet.topology.hosts:
    return _result(answers, "devices are counted with --worker=all only")
  for verb, *more in (("count",), ("counted", f"{_COUNT_SECONDS:g}")):
    if len(fleet.without(answers).workers) < len(fleet.workers):
      return _result(answers)
    answers = fleet.ask(verb, *more, timeout=_COUNT_SECONDS + _ANSWER_SECONDS)
  chips = fleet.topology.chips
  for number, found in answers.items():
    if isinstance(found, dict) and found and extras == "tpu":
      platform, devices = found["platform"], found["devices"]
      if (platform, devices) != ("tpu", chips):
        text = f"jax sees {devices} {platform} devices; expected {chips} tpu"
        answers[number] = GcloudError(text)
  return _result(answers)


def run(cloud: Gcloud, command: list[str]) -> Result:
  """Start an app on every worker, in a session that survives the end of the connection."""
  run, root, fleet = names.check("run", FLAGS.run), _checkout(), _fleet(cloud)
  if not command:
    raise ValueError("nothing to run; add: -- caption_train --config=... --workdir=...")
  app, *arguments = command
  if not app.isidentifier() or (root and not (root / "apps" / f"{app}.py").is_file()):
    raise ValueError(f"there is no app {app!r}; expected the name of a file of apps/")
  rows, text = _result(fleet.ask("start", run, str(FLAGS.restarts or 0), app, *arguments))
  if 0 < sum("error" in row for row in rows) < len(rows):
    text += f"; the others wait for it: tpu stop --run={run}"
  return rows, text


def status(cloud: Gcloud) -> Result:
  """Show whether a run is alive, its step, and the last line of its log."""
  return _result(_fleet(cloud).ask("status", names.check("run", FLAGS.run)))


def logs(cloud: Gcloud) -> Result:
  """Copy the log of every worker to a local folder."""
  run, fleet = names.check("run", FLAGS.run), _fleet(cloud)
  out = Path(FLAGS.out).expanduser() if FLAGS.out else Path("ov-logs") / fleet.name / run
  if not cloud.dry_run:
    out.mkdir(parents=True, exist_ok=True)

  def copy(number: int) -> dict[str, Any]:
    target = names.local_file(str(out / f"worker-{number}.log"), "out")
    source = f"{fleet.name}:ov-run/{run}/worker.log"
    cloud.tpus("tpu-vm", "scp", source, target, worker=number, timeout=_COPY_SECONDS)
    return {"file": target}

  return _result(fleet.each(copy))


def stop(cloud: Gcloud) -> Result:
  """End the process group of a run."""
  run, grace, fleet = names.check("run", FLAGS.run), _grace(300), _fleet(cloud)
  output.confirm(f"Stop the run {run} on {len(fleet.workers)} workers of {fleet.name}?")
  # Send SIGTERM to all first, because a worker waits for the others at its next step.
  sent = fleet.ask("terminate", run)
  seconds = grace + _ANSWER_SECONDS
  return _result(sent | fleet.without(sent).ask("stop", run, f"{grace:g}", timeout=seconds))


def check(cloud: Gcloud) -> Result:
  """Show the state of every worker, and problems that would prevent a run."""
  bucket = [names.check("bucket", FLAGS.bucket)] if FLAGS.bucket else []
  fleet = _fleet(cloud)

  def ask(number: int) -> dict[str, Any]:
    before = time.time()
    row = fleet.ask_one(number, "check", *bucket)
    after = time.time()
    if row:
      now, problems = row.pop("time"), row.pop("problems")
      skew = min(now - before, 0.0) + max(now - after, 0.0)
      problems += ["clock"] if abs(skew) > _CLOCK_SECONDS else []
      row |= {"clock_skew_s": round(skew, 1), "clock_known_to_s": round(after - before, 1)}
      row["problems"] = problems
    return row

  rows, text = _result(fleet.each(ask))
  if len({(row["python"], row["libtpu"]) for row in rows if "python" in row}) > 1:
    for row in rows:
      row["problems"] = [*row.get("problems", ()), "workers differ in Python or libtpu"]
  return rows, text


def clean(cloud: Gcloud) -> Result:
  """Remove files left by killed processes of libtpu."""
  fleet = _fleet(cloud)
  output.confirm(f"Remove the lock file and logs of libtpu on {len(fleet.workers)} workers?")
  return _result(fleet.ask("clean"))


def kill(cloud: Gcloud) -> Result:
  """End the processes that hold a chip, after listing them and asking for confirmation."""
  grace, fleet = _grace(10), _fleet(cloud)
  answers = fleet.ask("held")
  rows: list[dict[str, Any]] = []
  wanted: dict[int, list[str]] = {}
  for number, answer in sorted(answers.items()):
    if isinstance(answer, GcloudError):
      rows.append({"worker": number, "error": str(answer)})
      continue
    for h in answer.get("holders", ()):
      shown = {key: h[key] for key in ("pid", "user", "command")}
      rows.append({"worker": number, **shown, "kept": h["kept"] or None})
      if not h["kept"]:
        wanted.setdefault(number, []).append(f"{h['pid']}:{h['start']}")
  seconds = grace + _ANSWER_SECONDS
  if cloud.dry_run:
    fleet.ask("kill", f"{grace:g}", "PID:START", timeout=seconds)
    return [], ""
  if not wanted:
    return rows, "no process can be ended" if rows else "no process has a chip open"
  output.show(rows, "", sys.stderr)
  output.confirm(f"End {sum(map(len, wanted.values()))} processes on {len(wanted)} workers?")

  def end(number: int) -> dict[str, Any]:
    answer = fleet.ask_one(number, "kill", f"{grace:g}", *wanted[number], timeout=seconds)
    left = [f"{h['pid']}: {h['kept'] or 'still there'}" for h in answer["holders"]]
    return {"ended": answer["ended"], "holds the chip": left}

  failed = {n: answer for n, answer in answers.items() if isinstance(answer, GcloudError)}
  rows, text = _result(failed | dataclasses.replace(fleet, workers=tuple(wanted)).each(end))
  if left := sum(bool(row.get("holds the chip")) for row in rows):
    text = "; ".join(filter(None, [f"a chip is still held on {left} workers", text]))
  return rows, text
