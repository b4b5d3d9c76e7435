#!/bin/bash
# Run one recipe on nodes of 8 H100 with Slurm: one process per node. If it is interrupted (exit code 3), requeue it.
#
#   sbatch --nodes=4 recipes/launch/slurm.sh --set data.path='/shared/corpus/*.txt'
#
# Arguments are passed to `llmctl run`. The processes find each other. `scancel` stops the run with a checkpoint if that
# takes less than KillWait seconds, and the same command continues it.
#SBATCH --job-name=llama2-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

LLMCTL=${LLMCTL:-/shared/venv/bin/llmctl}
RECIPE=${RECIPE:-/shared/llama2-7b.toml}
RUN=${RUN:-/shared/runs/llama2-7b}        # checkpoints and artifacts: a folder that all nodes mount

# Without --cpus-per-task, recent versions give each task one CPU. If one process fails, the others end by themselves.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 "$LLMCTL" run "$RECIPE" --run "$RUN" "$@"
code=$?
# A job that was canceled is not in state RUNNING, and is not requeued.
if [ "$code" -eq 3 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
