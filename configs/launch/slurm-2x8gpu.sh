#!/bin/bash
# Slurm: two nodes of 8 GPUs each, a process for every GPU; JAX finds them by Slurm's variables.
# python -m experiments.launch --config=configs/cifar10.py --on=configs/launch/slurm-2x8gpu.sh
#SBATCH --job-name=wnjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# In the project's directory, on a file system that all nodes share, with its .venv. Two minutes
# before the time is over the processes save their state; the same command goes on from there.
set -euo pipefail
srun --kill-on-bad-exit=1 \
  .venv/bin/python -m experiments.train --config=$CONFIG --workdir=$WORKDIR ${OVERRIDES:-}
