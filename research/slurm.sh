#!/usr/bin/env bash
# Train on a cluster that runs Slurm. Edit the lines marked so, then one of the two:
#   sbatch --array=0-9 research/slurm.sh                    # a job for each fold, which starts wherever there is room
#   sbatch --nodes=2 --gpus-per-node=4 research/slurm.sh    # one job: torchrun shares the folds out over all its GPUs
# A job that was stopped goes on when the same line is submitted again.
#SBATCH --job-name=urbansound
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=06:00:00
#SBATCH --requeue
set -euo pipefail

ASSETS=${ASSETS:-$HOME/audio_is_all_you_need}                  # edit: a folder that all nodes see, with stage 2 done
ENVIRONMENT=${ENVIRONMENT:-.venv/bin/activate}                 # edit: or nothing, where conda's is active already
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}               # edit: on each node; one a GPU is a good start

if [[ -f $ENVIRONMENT ]]; then
    # shellcheck disable=SC1090
    source "$ENVIRONMENT"
fi
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / PROCESSES > 0 ? ${SLURM_CPUS_PER_TASK:-1} / PROCESSES : 1))

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    python train.py --folds "$SLURM_ARRAY_TASK_ID" --processed_dir "$ASSETS/data" \
        --assets_dir "$ASSETS/fold_$SLURM_ARRAY_TASK_ID" "$@"
    # When all have ended: python evaluate.py --join $ASSETS/fold_? --assets_dir $ASSETS
else
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes="1:$SLURM_NNODES" --nproc-per-node="$PROCESSES" --max-restarts=10 --rdzv-id="$SLURM_JOB_ID" \
        --rdzv-backend=c10d --rdzv-endpoint="$first:29500" train.py --assets_dir "$ASSETS" "$@"
fi
