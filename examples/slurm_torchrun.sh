#!/usr/bin/env bash
# One run on several SLURM nodes with sbatch, srun and torchrun; submitit is not needed.
#
#     sbatch examples/slurm_torchrun.sh train_cls.py experiment=table1/deit_tiny_vca data.root=/data/imagenet
#
# Submit from the repository's folder. Submit the command again, as often as needed: the jobs run one after the other
# (singleton), each resumes from the newest checkpoint, and a job of a finished run only evaluates. Options on sbatch's
# command line override the lines below. The repository, data.root and out_dir must be on a file system that all nodes share.
#SBATCH --job-name=vca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

python=${PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python} # with conda: PYTHON=$CONDA_PREFIX/bin/python sbatch ...
ranks=${RANKS_PER_NODE:-8}
head=$(hostname) # the batch script runs on the first node
port=$((20000 + SLURM_JOB_ID % 10000))

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks must not connect to the addresses of dead ones
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120   # seconds to save a checkpoint after SIGTERM
cd "$SLURM_SUBMIT_DIR"
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$ranks" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$port" \
    --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
