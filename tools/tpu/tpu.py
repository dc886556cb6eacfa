"""Creates TPUs, brings the checkout there, runs apps on them, and ends both.

  tools/bazel run //tools/tpu -- VERB --name=pod --zone=us-central2-b [flags] [-- APP ARGUMENTS]

Verbs: create list sync setup run status logs check clean kill stop ssh delete. --dry_run prints
the commands of gcloud that a verb would run.
"""

from collections.abc import Callable
from pathlib import Path
import sys

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.tpu import archive, commands, names, output, provision
from tools.tpu.fleet import Fleet, open_fleet
from tools.tpu.gcloud import Gcloud, GcloudError, Place
from tools.tpu.output import Result

_NAME = flags.DEFINE_string("name", "", "Name of the TPU.")
_ZONE = flags.DEFINE_string("zone", "", "Zone, such as us-central2-b.")
_PROJECT = flags.DEFINE_string("project", "", "Project; default: that of gcloud's configuration.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "v4-512, v5litepod-256, v5p-128, v6e-256, ...")
_VERSION = flags.DEFINE_string("version", "", "Runtime version; default: the generation's.")
_SPOT = flags.DEFINE_bool("spot", False, "create: cheaper, and may be taken away.")
_QUEUED = flags.DEFINE_bool("queued", False, "create, delete: as a queued resource.")
_ATTEMPTS = flags.DEFINE_integer("attempts", 20, "create: tries, with pauses.", lower_bound=1)
_HOURS = flags.DEFINE_float("hours", None, "create: for the reminder of cost.")
_PRICE = flags.DEFINE_float("price_per_chip_hour", None, "create: for the reminder of cost.")
_WORKER = flags.DEFINE_string("worker", "all", "all, or the number of one.")
_RUN = flags.DEFINE_string("run", "train", "Name of the run: its folder is ~/ov-run/NAME.")
_RESTARTS = flags.DEFINE_integer("restarts", 0, "run: starts after a failure.", lower_bound=0)
_GRACE = flags.DEFINE_float(
  "grace", None, "stop, kill: seconds from SIGTERM to SIGKILL; 300, for kill 10."
)
_EXTRAS = flags.DEFINE_string("extras", "tpu", "setup: tpu, cuda or cpu; which locks.")
_LIBTPU = flags.DEFINE_string("libtpu", "", "setup: another libtpu.so, a file or gs://...")
_BUCKET = flags.DEFINE_string("bucket", "", "check: gs://... that a run will write to.")
_OUT = flags.DEFINE_string("out", "", "logs: folder; default: ov-logs/NAME/RUN.")
_INTERNAL_IP = flags.DEFINE_bool("internal_ip", False, "Workers have no address outside.")
_TIMEOUT = flags.DEFINE_float("timeout", None, "Seconds for each call of gcloud.", lower_bound=0.1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, run none.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout.")
_STOP_GRACE, _KILL_GRACE, _LONGEST_GRACE = 300.0, 10.0, 86400.0
_YES = flags.DEFINE_bool("yes", False, "Do not ask before create, delete, stop, clean, kill.")


def main(arguments: list[str]) -> None:
  if not arguments or arguments[0] not in _VERBS:
    given = f"{arguments[0]!r} is no verb" if arguments else "a verb is missing"
    raise UserError(f"{given}; expected one of {', '.join(_VERBS)}")
  verb, *rest = arguments
  if rest and verb != "run":
    raise UserError(f"unexpected arguments {' '.join(rest)!r}; flags start with --")
  dry_run = _DRY_RUN.value
  if "--dry_run" in rest:  # behind --, where it is easily put: no app may start by mistake
    rest, dry_run = [argument for argument in rest if argument != "--dry_run"], True
    _say("--dry_run after -- is taken as this tool's; --dry_run=true goes to the app")
  with user_errors():
    place = Place(names.zone(_ZONE.value), _PROJECT.value and names.project(_PROJECT.value))
    gcloud = Gcloud(place, _TIMEOUT.value, dry_run, _INTERNAL_IP.value)
    try:
      result = _VERBS[verb](gcloud, rest)
    except GcloudError as error:
      raise ValueError(f"{verb}: {error.cause.value}: {error}") from error
  if gcloud.dry_run:
    show = output.plan_as_json(verb, gcloud.planned) if _JSON.value else None
    print(show or output.plan_as_text(gcloud.planned))
    return
  if text := output.as_json(verb, result) if _JSON.value else output.as_text(result):
    print(text)
  if result.failed:
    sys.exit(1)


def _say(text: str) -> None:
  """Progress: stdout is for the answer."""
  print(f"tpu: {text}", file=sys.stderr, flush=True)


def _confirm(gcloud: Gcloud, question: str) -> None:
  """Raises ValueError unless the user agrees, by --yes or on the terminal."""
  if _YES.value or gcloud.dry_run:
    return
  if not sys.stdin.isatty():
    raise ValueError(f"{question} There is no terminal to ask on; add --yes")
  print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
  if sys.stdin.readline().strip().lower() not in ("y", "yes"):
    raise ValueError("nothing was done")


def _create(gcloud: Gcloud, _: list[str]) -> Result:
  topology = names.Topology.parse(_TOPOLOGY.value)
  version = names.version(_VERSION.value or topology.generation.version)
  wish = provision.Wish(names.name(_NAME.value), topology, version, _SPOT.value, _QUEUED.value)
  _say(f"{topology}, {version}")
  _say(f"cost: {names.cost(topology, _HOURS.value, _PRICE.value)}")
  _confirm(gcloud, f"Create {wish.name}?")
  return provision.create(gcloud, wish, provision.Patience(_ATTEMPTS.value), _say)


def _list(gcloud: Gcloud, _: list[str]) -> Result:
  return provision.list_all(gcloud)


def _delete(gcloud: Gcloud, _: list[str]) -> Result:
  name = names.name(_NAME.value)
  _confirm(gcloud, f"Delete {name} in {gcloud.place.zone}, and all that is on its disks?")
  return provision.delete(gcloud, name, _QUEUED.value)


def _fleet(gcloud: Gcloud) -> Fleet:
  if _TOPOLOGY.value:
    names.Topology.parse(_TOPOLOGY.value)
  elif gcloud.dry_run and _WORKER.value == "all":
    _say("a dry run asks nobody for the workers: shown is the first; --topology shows all")
  return open_fleet(gcloud, names.name(_NAME.value), _WORKER.value, _TOPOLOGY.value)


def _checkout(gcloud: Gcloud) -> Path | None:
  """The checkout of the current folder; None for a dry run without one, which reads no file."""
  try:
    return archive.root(Path.cwd())
  except ValueError:
    if gcloud.dry_run:
      return None
    raise


def _grace(default: float) -> float:
  grace = default if _GRACE.value is None else _GRACE.value
  if not 0 <= grace <= _LONGEST_GRACE:
    raise ValueError(f"--grace={grace:g}; expected seconds from 0 to {_LONGEST_GRACE:g}")
  return grace


def _sync(gcloud: Gcloud, _: list[str]) -> Result:
  checkout = _checkout(gcloud)
  return commands.sync(_fleet(gcloud), checkout, _say)


def _setup(gcloud: Gcloud, _: list[str]) -> Result:
  libtpu = _LIBTPU.value
  if libtpu.startswith("gs://"):
    names.bucket(libtpu, "--libtpu")
  return commands.setup(_fleet(gcloud), _EXTRAS.value, libtpu)


def _run(gcloud: Gcloud, command: list[str]) -> Result:
  run, checkout = names.run_name(_RUN.value), _checkout(gcloud)
  return commands.run(_fleet(gcloud), run, _RESTARTS.value, checkout, command)


def _status(gcloud: Gcloud, _: list[str]) -> Result:
  return commands.status(_fleet(gcloud), names.run_name(_RUN.value))


def _logs(gcloud: Gcloud, _: list[str]) -> Result:
  run, name = names.run_name(_RUN.value), names.name(_NAME.value)
  out = Path(_OUT.value).expanduser() if _OUT.value else Path("ov-logs") / name / run
  return commands.logs(_fleet(gcloud), run, out)


def _check(gcloud: Gcloud, _: list[str]) -> Result:
  bucket = _BUCKET.value and names.bucket(_BUCKET.value, "--bucket")
  return commands.check(_fleet(gcloud), bucket)


def _clean(gcloud: Gcloud, _: list[str]) -> Result:
  fleet = _fleet(gcloud)
  _confirm(gcloud, f"Remove the lock file and logs of libtpu on {len(fleet.workers)} workers?")
  return commands.clean(fleet)


def _kill(gcloud: Gcloud, _: list[str]) -> Result:
  grace, fleet = _grace(_KILL_GRACE), _fleet(gcloud)
  answers = commands.held(fleet)
  rows = commands.holder_rows(answers)
  ending = [row for row in rows if "pid" in row and not row["kept"]]
  failed = sum("error" in row for row in rows)
  if not ending and not gcloud.dry_run:
    return Result(rows, "nothing to end" if rows else "no process has a chip open", failed)
  if rows:
    print(output.as_text(Result(rows)), file=sys.stderr, flush=True)
  workers = len({row["worker"] for row in ending})
  _confirm(gcloud, f"End {len(ending)} processes on {workers} workers?")
  return commands.kill(fleet, answers, grace)


def _stop(gcloud: Gcloud, _: list[str]) -> Result:
  run, grace, fleet = names.run_name(_RUN.value), _grace(_STOP_GRACE), _fleet(gcloud)
  _confirm(gcloud, f"Stop the run {run} on {len(fleet.workers)} workers of {fleet.name}?")
  return commands.stop(fleet, run, grace)


def _ssh(gcloud: Gcloud, _: list[str]) -> Result:
  worker = "0" if _WORKER.value == "all" else _WORKER.value
  if not (worker.isascii() and worker.isdecimal()):
    raise ValueError(f"--worker={worker!r}; expected a number")
  if code := gcloud.shell(names.name(_NAME.value), int(worker)):
    sys.exit(code)
  return Result([])


_VERBS: dict[str, Callable[[Gcloud, list[str]], Result]] = {
  "create": _create,
  "list": _list,
  "sync": _sync,
  "setup": _setup,
  "run": _run,
  "status": _status,
  "logs": _logs,
  "check": _check,
  "clean": _clean,
  "kill": _kill,
  "stop": _stop,
  "ssh": _ssh,
  "delete": _delete,
}

if __name__ == "__main__":
  run_app(main, arguments=True)
