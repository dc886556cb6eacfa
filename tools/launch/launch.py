"""Writes what starts an app on several machines: a JobSet for GKE, a script for Slurm or ssh.

  tools/bazel run //tools/launch -- --kind=jobset --topology=v4-512 --image=HOST/PATH:TAG \\
    --app=caption_train --config=apps/configs/openvision2.py --workdir=gs://BUCKET/PATH > job.yaml
  tools/bazel run //tools/launch -- --kind=slurm --nodes=8 --gpus=8 --time=2-00:00:00 \\
    --app=clip_train --config=apps/configs/openvision.py --workdir=/data/run --out=job.sh
  tools/bazel run //tools/launch -- --kind=ssh --hosts=a,b,user@c --checkout=/srv/openvision \\
    --app=clip_train --config=apps/configs/openvision.py --workdir=/data/run --out=job.py

Arguments behind -- go to the app. Nothing is started.
"""

from pathlib import Path

from absl import flags

from apps.trainer.errors import UserError, run_app, user_errors
from tools.launch import jobset, slurm, ssh
from tools.launch.job import APPS, Job
from tools.tpu.names import Topology

_KIND = flags.DEFINE_enum("kind", "jobset", ["jobset", "slurm", "ssh"], "What to write.")
_NAME = flags.DEFINE_string("name", "openvision", "Name of the job.")
_APP = flags.DEFINE_enum("app", "caption_train", APPS, "What to run.")
_CONFIG = flags.DEFINE_string("config", "", "The app's --config.")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "gs://BUCKET/PATH; or, but for jobset, a shared folder."
)
# Slurm counts these seconds in 16 bits, Kubernetes everything else in 32.
_GRACE = flags.DEFINE_integer("grace", 300, "Seconds after SIGTERM.", 1, 65535)
_RESTARTS = flags.DEFINE_integer("restarts", 20, "Starts after a failure.", 0, 10**6)
_OUT = flags.DEFINE_string("out", "", "File to write; default: stdout.")

_TOPOLOGY = flags.DEFINE_string("topology", "", "jobset: a slice, such as v4-512.")
_SLICES = flags.DEFINE_integer("slices", 1, "jobset: slices in one run.", 1, 10**5)
_IMAGE = flags.DEFINE_string("image", "", "jobset: image with the checkout and its environment.")
_SERVICE_ACCOUNT = flags.DEFINE_string("service_account", "", "jobset: one that has the bucket.")
_SPOT = flags.DEFINE_bool("spot", False, "jobset: nodes that may be taken away.")

_NODES = flags.DEFINE_integer("nodes", 1, "slurm: machines.", 1, 10**5)
_GPUS = flags.DEFINE_integer("gpus", 8, "slurm: GPUs of each machine.", 1, 10**5)
_CPUS = flags.DEFINE_integer("cpus", 8, "slurm: cores for each GPU.", 1, 10**5)
_TIME = flags.DEFINE_string("time", "1-00:00:00", "slurm: time limit.")
_PARTITION = flags.DEFINE_string("partition", "", "slurm: partition of the cluster.")
_ACCOUNT = flags.DEFINE_string("account", "", "slurm: account that pays.")

_HOSTS = flags.DEFINE_string("hosts", "", "ssh: HOST,USER@HOST,...; the first is the coordinator.")
_HOSTS_FILE = flags.DEFINE_string("hosts_file", "", "ssh: the same, one a line, # for comments.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "ssh: address of the first for the others.")
_PORT = flags.DEFINE_integer("port", 8476, "ssh: of the coordinator.", 1024, 65535)
_CHECKOUT = flags.DEFINE_string("checkout", "", "ssh: absolute path of the repository on them.")
_EXTRAS = flags.DEFINE_enum("extras", "cuda", ssh.EXTRAS, "ssh: what the hosts have.")

_OF_KIND = {
  "jobset": (_TOPOLOGY, _SLICES, _IMAGE, _SERVICE_ACCOUNT, _SPOT),
  "slurm": (_NODES, _GPUS, _CPUS, _TIME, _PARTITION, _ACCOUNT),
  "ssh": (_HOSTS, _HOSTS_FILE, _COORDINATOR, _PORT, _CHECKOUT, _EXTRAS),
}


def main(arguments: list[str]) -> None:
  for kind, holders in _OF_KIND.items():
    for holder in holders:
      if holder.present and kind != _KIND.value:
        raise UserError(f"--{holder.name} is for --kind={kind}, not for {_KIND.value}")
  with user_errors():
    text = _manifest(
      Job(
        _NAME.value, _APP.value, _CONFIG.value, _WORKDIR.value, tuple(arguments), _GRACE.value,
        _RESTARTS.value,
      )
    )  # fmt: skip
    if not _OUT.value:
      print(text, end="")
      return
    try:
      Path(_OUT.value).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
      raise UserError(
        f"--out={_OUT.value}: {error.strerror}; expected a file in a folder that exists"
      ) from error


def _manifest(job: Job) -> str:
  if _KIND.value == "slurm":
    return slurm.script(
      job, _NODES.value, _GPUS.value, _CPUS.value, _TIME.value, _PARTITION.value, _ACCOUNT.value
    )
  if _KIND.value == "ssh":
    hosts = ssh.hosts_of(_HOSTS.value, _HOSTS_FILE.value)
    return ssh.script(job, hosts, _COORDINATOR.value, _PORT.value, _CHECKOUT.value, _EXTRAS.value)
  topology = Topology.parse(_TOPOLOGY.value)
  return jobset.manifest(
    job, topology, _SLICES.value, _IMAGE.value, _SERVICE_ACCOUNT.value, _SPOT.value
  )


if __name__ == "__main__":
  run_app(main, arguments=True)
