#!/bin/bash
# Launch a training on Slurm: sbatch examples/slurm.sh 1b /shared/tokens /shared/runs/1b
# Before its time is over Slurm sends TERM; the run saves, is queued again, and continues where it stopped.
#SBATCH --job-name=tnllm
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00
#SBATCH --signal=TERM@300 --requeue
set -euo pipefail
recipe=${1:?usage: sbatch slurm.sh RECIPE TOKENS RUN}
tokens=${2:?usage: sbatch slurm.sh RECIPE TOKENS RUN}
run=${3:?usage: sbatch slurm.sh RECIPE TOKENS RUN}
# The first of the machines. Not by `head`: what writes into a closed pipe fails.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
master=${machines%%$'\n'*}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${GPUS:-8}" --max-restarts 3 --shutdown-timeout 300 \
  --rdzv-backend c10d --rdzv-endpoint "$master:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m tnllm train "$recipe" --set data.path="$tokens" --out "$run" --resume auto
