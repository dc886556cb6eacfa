#!/bin/bash
# sbatch FILE, from the root of the checkout, which all nodes share. The first start creates the
# environment; if nodes have no network, run the line with environment.py beforehand.
#SBATCH --job-name=openvision
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --account=vision-1
#SBATCH --requeue
set -euo pipefail
cd -- "$SLURM_SUBMIT_DIR"
venv="$(python3 tools/python/environment.py tools/python/requirements.lock tools/python/requirements-cuda.lock)"
export PYTHONPATH="$PWD$(printf ':%s' "$PWD"/packages/*/)"
export JAX_PLATFORMS=cuda,cpu # without a GPU the app ends

# SIGTERM, 600 s before the time limit or at a preemption, requests a checkpoint.
stopped=
child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
# One task for each GPU: jax reads the task's device from Slurm. A task that fails ends the others.
srun --kill-on-bad-exit=1 "$venv/bin/python3" -m apps.caption_train --config=apps/configs/openvision2.py:img=L/14,res=224 '--workdir=/data/my run' '--config.note=it'"'"'s $(here)' &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2> /dev/null; do
  code=0
  wait "$child" || code=$?
done

if [ -n "$stopped" ]; then
  echo "stopped by SIGTERM; queued again"
elif [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
  exit "$code"
else
  echo "failed with code $code; queued again"
fi
scontrol requeue "$SLURM_JOB_ID"
