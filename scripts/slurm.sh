#!/bin/bash
# Two machines with eight GPUs each: `sbatch scripts/slurm.sh --preset gpt2-small --train-npy ...`.
# Started from the repository's folder, which all machines must see, like the data. Not tried on a
# cluster by us; the same torchrun line is what tests/rigs/hosts.py runs on two hosts.
#SBATCH --job-name=rosetrainer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
# 120 s before the time is up, SLURM sends SIGTERM: the run saves and ends. With --resume auto among
# the flags, the same command continues it, by hand or requeued.
srun .venv/bin/torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29400" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 train_ddp.py "$@"
