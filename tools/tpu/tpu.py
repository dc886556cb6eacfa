"""Create TPU VMs and run apps on them, and write manifests for GKE, Slurm and ssh hosts.

  tools/bazel run //tools/tpu -- VERB --name=pod --zone=us-central2-b [flags] [-- APP ARGUMENTS]
  tools/bazel run //tools/tpu -- launch --kind=jobset|slurm|ssh [flags] [-- ARGUMENTS]

Verbs for TPU VMs: create list sync setup run status logs check clean kill stop ssh delete.
--dry_run prints the gcloud commands of a verb instead of running them. `launch` writes a JobSet for
GKE, a batch script for Slurm, or a program for hosts connected by ssh; it starts nothing.
"""

from collections.abc import Callable, Iterator
import json
import random
import shlex
import subprocess
import sys
import time
from typing import Any

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.tpu import gcloud, launch, names, output, workers
from tools.tpu.gcloud import Gcloud, GcloudError
from tools.tpu.job import PLATFORMS
from tools.tpu.output import Result

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(launch)  # for --help
flags.DEFINE_string("name", "", "Name of the TPU; launch: of the job, default openvision.")
flags.DEFINE_string("zone", "", "Zone, such as us-central2-b.")
flags.DEFINE_string("project", "", "Project; default: that of gcloud's configuration.")
flags.DEFINE_string("topology", "", "v4-512, v5litepod-256, v5p-128, v6e-256, ...")
flags.DEFINE_string("version", "", "Runtime version; default: the generation's.")
flags.DEFINE_bool("spot", False, "create, launch: cheaper, may be preempted.")
flags.DEFINE_bool("queued", False, "create, delete: as a queued resource.")
flags.DEFINE_integer("attempts", 20, "create: attempts, with pauses.", lower_bound=1)
flags.DEFINE_float("hours", None, "create: for the reminder of the cost.")
flags.DEFINE_float("price_per_chip_hour", None, "create: for the reminder of the cost.")
flags.DEFINE_string("worker", "all", "all, or the number of a worker.")
flags.DEFINE_string("run", "train", "Name of the run; its folder is ~/ov-run/NAME.")
flags.DEFINE_integer("restarts", None, "Restarts after a failure; run: 0, launch: 20.", 0, 10**6)
flags.DEFINE_float("grace", None, "Seconds from SIGTERM to SIGKILL; 300, kill: 10.")
flags.DEFINE_enum("extras", None, list(PLATFORMS), "setup: tpu, launch: cuda; what to lock.")
flags.DEFINE_string("libtpu", "", "setup: another libtpu.so, a file or gs://...")
flags.DEFINE_string("bucket", "", "check: gs://... that a run will write to.")
flags.DEFINE_string("out", "", "logs: folder, default ov-logs/NAME/RUN; launch: file, or stdout.")
flags.DEFINE_bool("internal_ip", False, "Reach workers by their internal address.")
flags.DEFINE_float("timeout", None, "Seconds for each call of gcloud.", lower_bound=0.1)
flags.DEFINE_bool("dry_run", False, "Print the commands, run none.")
flags.DEFINE_bool("json", False, "Print one JSON object.")
flags.DEFINE_bool("yes", False, "Do not ask before create, delete, stop, clean, kill.")

_OF_BOTH = {"name", "topology", "spot", "restarts", "grace", "extras", "out"}
_SECONDS = 1800.0  # time limit for creating a large slice
_WAITING = ("ACCEPTED", "CREATING", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED")
_ADVICE = {
  "no capacity": "try later, another zone, or --queued",
  "quota": "raise the quota, or take a smaller --topology",
  "exists already": "choose another --name, or first: tpu delete{queued} --name={name}",
  "permission": "see gcloud auth list, and the roles in --project",
  "wrong argument": "see --topology, --zone and --version",
  "time limit": "it may still appear: see tpu list before you try again",
}


def main(arguments: list[str]) -> None:
  if not arguments or arguments[0] not in VERBS:
    given = f"{arguments[0]!r} is not a verb" if arguments else "a verb is missing"
    raise UserError(f"{given}; expected one of {', '.join(VERBS)}")
  verb, *rest = arguments
  module = FLAGS.find_module_defining_flag("zone" if verb == "launch" else "kind") or ""
  others = {flag.name for flag in FLAGS.flags_by_module_dict()[module] if flag.present}
  if wrong := sorted(others - (_OF_BOTH if verb == "launch" else set())):
    raise UserError(f"--{wrong[0]} is not a flag of {verb}; see --help")
  if rest and verb not in ("run", "launch"):
    raise UserError(f"unexpected arguments {' '.join(rest)!r}; flags start with --")
  if "--dry_run" in rest and verb == "run":  # likely mistakes after --
    rest = [argument for argument in rest if argument != "--dry_run"]
    FLAGS["dry_run"].value = True
    output.log("--dry_run after -- is a flag of this tool; --dry_run=true goes to the app")
  launch.main(rest) if verb == "launch" else _call_verb(verb, rest)


def _call_verb(verb: str, arguments: list[str]) -> None:
  with user_errors():
    project = FLAGS.project and names.check("project", FLAGS.project)
    zone = names.check("zone", FLAGS.zone)
    cloud = Gcloud(zone, project, FLAGS.timeout, FLAGS.dry_run, FLAGS.internal_ip)
    try:
      rows, text = VERBS[verb](cloud, *([arguments] if verb == "run" else []))
    except GcloudError as error:
      raise ValueError(f"{verb}: {error.cause}: {error}") from error
  ok = not any(row.get(key) for row in rows for key in ("error", "problems", "holds the chip"))
  if cloud.dry_run and FLAGS.json:
    print(json.dumps({"verb": verb, "dry_run": True, "commands": cloud.planned}))
  elif cloud.dry_run:
    print("\n".join(map(shlex.join, cloud.planned)))
  elif FLAGS.json:
    print(json.dumps({"verb": verb, "ok": ok, "rows": rows, "text": text}))
  else:
    output.show(rows, text, sys.stdout)
  if not ok:
    sys.exit(1)


def attempts(number: int) -> Iterator[int]:
  """Yield 1, 2, ... with pauses of 15, 30, 60 ... 600 s, randomly shortened by up to a half."""
  yield 1
  for attempt in range(2, number + 1):
    time.sleep(min(600.0, 15.0 * 2 ** (attempt - 2)) * random.uniform(0.5, 1.0))
    yield attempt


def create(cloud: Gcloud) -> Result:
  """Create a TPU; retry while there is no capacity or quota."""
  name, tries = names.check("name", FLAGS.name), FLAGS.attempts
  topology = names.Topology.parse(FLAGS.topology)
  version = names.check("version", FLAGS.version or topology.generation.version)
  output.log(f"{topology}, {version}")
  output.log(f"cost: {names.cost(topology, FLAGS.hours, FLAGS.price_per_chip_hour)}")
  output.confirm(f"Create {name}?")
  kind, spot = f"--accelerator-type={topology.name}", ["--spot"] if FLAGS.spot else []
  request = ["tpu-vm", "create", name, kind, f"--version={version}", *spot]
  if FLAGS.queued:
    more = [f"--node-id={name}", kind, f"--runtime-version={version}", *spot]
    request = ["queued-resources", "create", name, *more]
  for attempt in attempts(tries):
    try:
      cloud.tpus(*request, timeout=_SECONDS)
      break
    except GcloudError as error:
      if error.cause not in ("no capacity", "quota") or attempt == tries:
        after = f" after {attempt} attempts" if attempt > 1 else ""
        advice = _ADVICE.get(error.cause, "see tpu list before you try again")
        advice = advice.format(name=name, queued=" --queued" if FLAGS.queued else "")
        text = f"{name} was not created{after}: {error.cause}: {error}; {advice}"
        raise ValueError(text) from error
      output.log(f"attempt {attempt} of {tries}: {error.cause}: {error}")
  for number in attempts(tries) if FLAGS.queued else ():
    state = _state(cloud.json("queued-resources", "describe", name))
    if cloud.dry_run or state == "ACTIVE":
      break
    if state not in _WAITING:
      again = f"delete it (tpu delete --queued --name={name}) and create it again"
      raise ValueError(f"the request {name} is {state}; expected ACTIVE: {again}")
    output.log(f"query {number} of {tries}: {state}")
    if number == tries:
      again = "it stays in the queue: see tpu list, or raise --attempts"
      raise ValueError(f"the request {name} still waits after {tries} queries; {again}")
  size = {"topology": topology.name, "chips": topology.chips, "hosts": topology.hosts}
  return [{"name": name, **size, "attempts": attempt}], f"{name} is created: {topology}"


def list_all(cloud: Gcloud) -> Result:
  """Return the TPUs and the pending requests of a zone."""
  rows = [
    {
      "name": str(node.get("name", "?")).rpartition("/")[2],
      "topology": str(node.get("acceleratorType", "?")),
      "state": str(node.get("state", "?")),
      "workers": len(node.get("networkEndpoints") or ()),
      "kind": "spot" if (node.get("schedulingConfig") or {}).get("spot") else "on demand",
    }
    for node in cloud.json("tpu-vm", "list") or []
  ]
  present = {row["name"] for row in rows}
  for request in cloud.json("queued-resources", "list") or []:
    name, state = str(request.get("name", "?")).rpartition("/")[2], _state(request)
    if name not in present or state != "ACTIVE":
      spec = ((request.get("tpu") or {}).get("nodeSpec") or [{}])[0]
      kind = str((spec.get("node") or {}).get("acceleratorType", "?"))
      rows.append({"name": name, "topology": kind, "state": state, "workers": 0, "kind": "queued"})
  return rows, "" if rows else f"no TPUs in {cloud.zone}"


def delete(cloud: Gcloud) -> Result:
  """Delete a TPU, or a queued resource with its TPU."""
  name = names.check("name", FLAGS.name)
  output.confirm(f"Delete {name} in {cloud.zone}, and all that is on its disks?")
  queued = ["queued-resources", "delete", name, "--force"]
  cloud.tpus(*(queued if FLAGS.queued else ["tpu-vm", "delete", name]), timeout=_SECONDS)
  return [{"name": name}], f"{name} is deleted"


def _state(request: Any) -> str:
  return str(((request or {}).get("state") or {}).get("state", "STATE_UNSPECIFIED"))


def ssh(cloud: Gcloud) -> Result:
  """Open a shell on a worker."""
  number = "0" if FLAGS.worker == "all" else FLAGS.worker
  if not (number.isascii() and number.isdecimal()):
    raise ValueError(f"--worker={number!r}; expected a number")
  command = cloud.command("tpu-vm", "ssh", names.check("name", FLAGS.name), worker=int(number))
  if cloud.dry_run:
    cloud.planned.append(command)
    return [], ""
  try:
    sys.exit(subprocess.run(command, check=False).returncode)
  except FileNotFoundError:
    raise gcloud.missing() from None


VERBS: dict[str, Callable[..., Any]] = {
  "create": create,
  "list": list_all,
  **{
    verb: getattr(workers, verb)
    for verb in ("sync", "setup", "run", "status", "logs", "check", "clean", "kill", "stop")
  },
  "ssh": ssh,
  "delete": delete,
  "launch": launch.main,
}

if __name__ == "__main__":
  run_app(main, arguments=True)
