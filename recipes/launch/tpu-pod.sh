#!/bin/bash
# Run one recipe on all hosts of a TPU pod slice that exists. If the run is interrupted (exit code 3), run it again.
#
#   NAME=my-slice recipes/launch/tpu-pod.sh --set data.path='/shared/corpus/*.txt'
#
# Arguments are passed to `llmctl run`. The processes find each other. Ctrl-C stops the run with a checkpoint, and the
# same command continues it.
set -u

NAME=${NAME:-llama2-7b}                   # the slice, such as one that tpu-queued.sh requested
ZONE=${ZONE:-us-central1-a}
LLMCTL=${LLMCTL:-/shared/venv/bin/llmctl}
RECIPE=${RECIPE:-/shared/llama2-7b.toml}
RUN=${RUN:-/shared/runs/llama2-7b}        # checkpoints and artifacts: a folder that all hosts mount

on=(gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE")
stopping=
stop() {
  stopping=1
  # After SIGTERM to one process, all processes write a checkpoint and exit with 3.
  "${on[@]}" --worker=0 --command="pkill -TERM -f '[l]lmctl run .*--run $RUN( |\$)'"
}
trap stop INT TERM

while :; do
  # Ctrl-C must not close the connections, so gcloud has a session of its own. Its exit code is that of a process that
  # did not succeed.
  setsid "${on[@]}" --worker=all --command="exec $LLMCTL run $RECIPE --run $RUN ${*@Q}" &
  wait $!
  code=$?
  if [ "$stopping" ]; then  # the signal ended `wait` early
    wait $!
    exit $?
  fi
  [ "$code" -eq 3 ] || exit "$code"
done
