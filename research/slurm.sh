#!/usr/bin/env bash
# Train on a cluster that runs Slurm, after stage 2. Edit the two lines marked 'edit'. Then, from the project's folder, as
# many tasks as may run at once:
#   sbatch --array=0-4 --gpus=1 research/slurm.sh --epochs 40     # flags after the script are train.py's
# All tasks work in the same folder. Each takes the next fold that no other task has, and the last one writes the report.
# Submit the same line again, from the same folder, to resume what was stopped.
#SBATCH --job-name=urbansound
#SBATCH --cpus-per-task=8
#SBATCH --time=06:00:00
#SBATCH --requeue
set -euo pipefail

ASSETS=${ASSETS:-$HOME/audio_is_all_you_need}         # edit: a folder that all nodes see, with data/ of stage 2
ENVIRONMENT=${ENVIRONMENT:-.venv/bin/activate}        # edit: skipped if it does not exist

if [[ -f $ENVIRONMENT ]]; then
    # shellcheck disable=SC1090
    source "$ENVIRONMENT"
fi
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
python train.py --assets_dir "$ASSETS" "$@"
