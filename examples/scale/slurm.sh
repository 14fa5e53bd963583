#!/bin/bash
# One meta-training on all nodes of a SLURM job: sbatch examples/scale/slurm.sh
# JAX finds coordinator, number and ids in SLURM's variables. The folder after --out must be on a file system that all
# nodes share. Given again, or requeued, it goes on from the last checkpoint, on any number of nodes that divides the
# pairs. For GPUs: one task for each GPU of the node (--ntasks-per-node=8 --gpus-per-node=8), JAX gives each task one. Not
# with --gpus-per-task, nor with another --gpu-bind than none: JAX counts on every task seeing all GPUs of its node.
#SBATCH --job-name=lolo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# A SIGTERM two minutes before the end: lolo ends the outer step and writes a checkpoint.
# srun has not passed --cpus-per-task on by itself since SLURM 22.05.
exec srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" lolo train lolo \
    --task fashion-mlp --estimator.pairs 256 --out "$SLURM_SUBMIT_DIR/runs/pairs256" \
    --hosts auto --restarts 10 --join-timeout 120
