#!/bin/bash
# Run one recipe on a list of hosts over SSH, one process per host. If it is interrupted (exit code 3), run it again.
#
#   HOSTS="node0 node1" recipes/launch/ssh.sh --set data.path='/shared/corpus/*.txt'
#
# Arguments are passed to `llmctl run`. Ctrl-C stops the run with a checkpoint, and the same command continues it.
set -u

HOSTS=${HOSTS:-node0 node1}               # process 0 runs on the first host
PORT=${PORT:-8476}                        # a free port of the first host; the hosts reach each other on all ports
LLMCTL=${LLMCTL:-/shared/venv/bin/llmctl}
RECIPE=${RECIPE:-/shared/llama2-7b.toml}
RUN=${RUN:-/shared/runs/llama2-7b}        # checkpoints and artifacts: a folder that all hosts mount

read -ra hosts <<< "$HOSTS"
codes=$(mktemp -d)
stopping=
stop() {
  stopping=1
  # After SIGTERM to one process, all processes write a checkpoint and exit with 3.
  ssh -n "${hosts[0]}" "pkill -TERM -f '[l]lmctl run .*--run $RUN '"
}
trap stop INT TERM
trap 'rm -rf "$codes"' EXIT

while :; do
  for i in "${!hosts[@]}"; do
    join="--coordinator ${hosts[0]#*@}:$PORT --num-processes ${#hosts[@]} --process-id $i"
    (
      ssh -n "${hosts[i]}" "exec $LLMCTL run $RECIPE --run $RUN ${*@Q} $join"
      echo $? > "$codes/$i"
    ) &
  done
  until [ -z "$(jobs -pr)" ]; do wait; done  # a signal ends `wait` early
  found=$(cat "$codes"/* | sort -nu)
  if [ "$found" != 3 ] || [ "$stopping" ]; then
    exit "$(tail -n 1 <<< "$found")"
  fi
done
