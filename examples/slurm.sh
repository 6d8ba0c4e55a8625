#!/bin/bash
#SBATCH --job-name=twa-merge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00

# usage: sbatch examples/slurm.sh RUN_DIR DATA OUT
# The same job again, also on another number of nodes, continues an interrupted run.

set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without it, processes that are started again are given the addresses of dead ones
# (pytorch/pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# srun has not asked sbatch how many cores a task has since Slurm 22.05.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
  -m twa_merge_cli train "$1" --task causal-lm --data "$2" -o "$3" --precision bf16
