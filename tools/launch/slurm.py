"""A batch script for Slurm: a task for each GPU, stopped in time, queued again."""

import shlex

from tools.launch.job import USER_MISTAKE, Job, shared_workdir, time_limit, word

_SCRIPT = """\
#!/bin/bash
# sbatch FILE, from the root of the checkout, which all nodes see. The environment is made on the
# first start; where nodes have no network, run the line of environment.py below before.
{options}
set -euo pipefail
cd -- "$SLURM_SUBMIT_DIR"
venv="$(python3 tools/python/environment.py tools/python/requirements.lock \
tools/python/requirements-cuda.lock)"
export PYTHONPATH="$PWD$(printf ':%s' "$PWD"/packages/*/)"
export JAX_PLATFORMS=cuda,cpu # without a GPU the app ends, and does not go on on the CPU

# SIGTERM, {grace} s before the end or at a preemption, asks the app for a checkpoint.
stopped=
child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
# One task a GPU: so jax takes a task's device from Slurm. A task that fails ends the others.
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
elif [ "$code" -eq 0 ] || [ "$code" -eq {mistake} ] || \
[ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
  exit "$code"
else
  echo "ended with code $code; queued again"
fi
scontrol requeue "$SLURM_JOB_ID"
"""


def script(
  job: Job, nodes: int, gpus: int, cpus: int, time: str, partition: str, account: str
) -> str:
  """The script as text.

  Args:
    job: its workdir is a folder that all nodes see, or a bucket's.
    nodes: machines.
    gpus: of each machine.
    cpus: cores for each GPU; its task decodes pictures on them.
    time: limit, D-HH:MM:SS.
    partition: of the cluster; "" is its default.
    account: who pays; "" is the user's default.
  """
  options = {
    "job-name": job.name,
    "nodes": str(nodes),
    "ntasks-per-node": str(gpus),
    "gpus-per-node": str(gpus),
    "cpus-per-task": str(cpus),
    "time": time_limit(time),
    "signal": f"B:TERM@{job.grace}",  # to this script alone
    "output": "slurm-%x-%j.log",
    "open-mode": "append",
    **({"partition": word(partition, "--partition")} if partition else {}),
    **({"account": word(account, "--account")} if account else {}),
  }
  lines = [f"#SBATCH --{name}={value}" for name, value in options.items()] + ["#SBATCH --requeue"]
  _, *command = job.command("python3", shared_workdir(job.workdir))
  return _SCRIPT.format(
    options="\n".join(lines),
    grace=job.grace,
    command=shlex.join(command),
    mistake=USER_MISTAKE,
    restarts=job.restarts,
  )
