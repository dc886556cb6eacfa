"""Write manifests that start an app: a JobSet for GKE, or a script for Slurm or ssh hosts."""

from collections.abc import Sequence
from pathlib import Path
import shlex
from typing import Any

from absl import flags
import yaml

from apps.trainer.errors import UserError, user_errors
from tools.tpu import names
from tools.tpu.job import PLATFORMS, Job, hosts_of, ssh_script
from tools.tpu.names import Topology
from tools.tpu.ssh_program import USER_ERROR

FLAGS = flags.FLAGS
APPS = ("caption_train", "clip_train")
flags.DEFINE_enum("kind", "jobset", ["jobset", "slurm", "ssh"], "launch: what to write.")
flags.DEFINE_enum("app", "caption_train", APPS, "launch: what to run.")
flags.DEFINE_string("config", "", "launch: --config of the app.")
flags.DEFINE_string("workdir", "", "launch: gs://BUCKET/PATH; slurm, ssh: or a shared folder.")
flags.DEFINE_integer("slices", 1, "jobset: slices in one run.", 1, 10**5)
flags.DEFINE_string("image", "", "jobset: image with the checkout and its environment.")
flags.DEFINE_string("service_account", "", "jobset: account with access to the bucket.")
flags.DEFINE_integer("nodes", 1, "slurm: machines.", 1, 10**5)
flags.DEFINE_integer("gpus", 8, "slurm: GPUs of each machine.", 1, 10**5)
flags.DEFINE_integer("cpus", 8, "slurm: cores for each GPU; they decode images.", 1, 10**5)
flags.DEFINE_string("time", "1-00:00:00", "slurm: time limit.")
flags.DEFINE_string("partition", "", "slurm: partition of the cluster.")
flags.DEFINE_string("account", "", "slurm: account to charge.")
flags.DEFINE_string("hosts", "", "ssh: HOST,USER@HOST,...; the first is the coordinator.")
flags.DEFINE_string("hosts_file", "", "ssh: the same, one a line, # for comments.")
flags.DEFINE_string("coordinator", "", "ssh: address of the first host for the others.")
flags.DEFINE_integer("port", 8476, "ssh: port of the coordinator.", 1024, 65535)
flags.DEFINE_string("checkout", "", "ssh: absolute path of the repository on the hosts.")
_FLAGS = {
  "jobset": ("topology", "slices", "image", "service_account", "spot"),
  "slurm": ("nodes", "gpus", "cpus", "time", "partition", "account"),
  "ssh": ("hosts", "hosts_file", "coordinator", "port", "checkout", "extras"),
}
_LONGEST_GRACE = 65535  # Slurm stores the seconds in 16 bits
_SPOT = "cloud.google.com/gke-spot"


def main(arguments: Sequence[str]) -> None:
  """Write the manifest for the flags; `arguments` are passed to the app."""
  for kind, own in _FLAGS.items():
    for name in own:
      if FLAGS[name].present and kind != FLAGS.kind:
        raise UserError(f"--{name} is for --kind={kind}, not for {FLAGS.kind}")
  with user_errors():
    grace = 300 if FLAGS.grace is None else FLAGS.grace
    if grace not in range(1, _LONGEST_GRACE + 1):
      raise ValueError(f"--grace={grace:g}; expected seconds from 1 to {_LONGEST_GRACE}")
    restarts, name = 20 if FLAGS.restarts is None else FLAGS.restarts, FLAGS.name or "openvision"
    own = tuple(arguments)
    job = Job(name, FLAGS.app, FLAGS.config, FLAGS.workdir, own, int(grace), restarts)
    text = {"jobset": _jobset, "slurm": _slurm, "ssh": _ssh}[FLAGS.kind](job)
    if not FLAGS.out:
      print(text, end="")
      return
    try:
      Path(FLAGS.out).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
      reason = f"{error.strerror}; expected a file in a folder that exists"
      raise UserError(f"--out={FLAGS.out}: {reason}") from error


_JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "{name}"
  annotations: # a slice is a node pool, used by one Job
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
    rules: [{{action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}}]
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        completionMode: Indexed
        completions: {hosts}
        parallelism: {hosts}
        backoffLimit: 0 # when a pod fails, all restart
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {{containerName: app, operator: In, values: [{user_error}]}}
        template: {{}}
"""
_JOBSET_HEAD = """\
# kubectl apply -f FILE; needs JobSet 0.6 or later in the cluster.
# GKE describes the other processes in the environment of TPU pods; ov_sharding reads it.
"""


def _jobset(job: Job) -> str:
  """Return a JobSet for GKE with one Job per slice and one pod per host."""
  names.check("workdir", job.workdir)
  topology = Topology.parse(FLAGS.topology)
  selector = {
    "cloud.google.com/gke-tpu-accelerator": topology.generation.gke,
    "cloud.google.com/gke-tpu-topology": topology.shape,
  }
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": job.grace,
    "nodeSelector": selector,
    "containers": [
      {
        "name": "app",
        "image": names.check("image", FLAGS.image),
        # The app is the first process and receives SIGTERM. It exits with code 143, a failure, so
        # the JobSet restarts. Kubernetes expands $(NAME) and reads $$ as a dollar.
        "command": [argument.replace("$", "$$") for argument in ["python3", *job.command()]],
        # After a restart, pods with the same OV_JOB_ID take over the lock of the workdir.
        "env": [
          {"name": "JAX_PLATFORMS", "value": PLATFORMS["tpu"]},
          {"name": "OV_JOB_ID", "value": job.name},
        ],
        "resources": {"limits": {"google.com/tpu": topology.chips_per_host}},
      }
    ],
  }
  if FLAGS.spot:
    selector[_SPOT] = "true"
    taint = {"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    pod["tolerations"] = [taint]
  if FLAGS.service_account:
    pod["serviceAccountName"] = names.check("name", FLAGS.service_account, "service_account")
  text = _JOBSET.format(
    name=job.name, restarts=job.restarts, slices=FLAGS.slices, hosts=topology.hosts,
    user_error=USER_ERROR,
  )  # fmt: skip
  found = yaml.safe_load(text)
  found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] = pod
  return _JOBSET_HEAD + yaml.safe_dump(found, sort_keys=False, width=1000)


_SLURM = """\
#!/bin/bash
# sbatch FILE, from the root of the checkout, which all nodes share. The first start creates the
# environment; if nodes have no network, run the line with environment.py beforehand.
{options}
set -euo pipefail
cd -- "$SLURM_SUBMIT_DIR"
venv="$(python3 tools/python/environment.py tools/python/requirements.lock \
tools/python/requirements-cuda.lock)"
export PYTHONPATH="$PWD$(printf ':%s' "$PWD"/packages/*/)"
export JAX_PLATFORMS={platforms} # without a GPU the app ends

# SIGTERM, {grace} s before the time limit or at a preemption, requests a checkpoint.
stopped=
child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
# One task for each GPU: jax reads the task's device from Slurm. A task that fails ends the others.
srun --kill-on-bad-exit=1 "$venv/bin/python3" {command} &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2> /dev/null; do
  code=0
  wait "$child" || code=$?
done

if [ -n "$stopped" ]; then
  echo "stopped by SIGTERM; queued again"
elif [ "$code" -eq 0 ] || [ "$code" -eq {user_error} ] || \
[ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
  exit "$code"
else
  echo "failed with code $code; queued again"
fi
scontrol requeue "$SLURM_JOB_ID"
"""


def _slurm(job: Job) -> str:
  """Return a Slurm script with one task per GPU, which is requeued after a stop or a failure."""
  options = {
    "job-name": job.name,
    "nodes": FLAGS.nodes,
    "ntasks-per-node": FLAGS.gpus,
    "gpus-per-node": FLAGS.gpus,
    "cpus-per-task": FLAGS.cpus,
    "time": names.check("time", FLAGS.time),
    "signal": f"B:TERM@{job.grace}",  # signals only this script
    "output": "slurm-%x-%j.log",
    "open-mode": "append",
  }
  for name in ("partition", "account"):
    if value := str(FLAGS[name].value):
      options[name] = names.check("partition", value, name)
  lines = [f"#SBATCH --{name}={value}" for name, value in options.items()] + ["#SBATCH --requeue"]
  return _SLURM.format(
    options="\n".join(lines), platforms=PLATFORMS["cuda"], grace=job.grace, restarts=job.restarts,
    command=shlex.join(job.command()), user_error=USER_ERROR,
  )  # fmt: skip


def _ssh(job: Job) -> str:
  hosts, extras = hosts_of(FLAGS.hosts, FLAGS.hosts_file), FLAGS.extras or "cuda"
  return ssh_script(job, hosts, FLAGS.coordinator, FLAGS.port, FLAGS.checkout, extras)
