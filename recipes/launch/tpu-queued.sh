#!/bin/bash
# Request a TPU slice as a queued resource, and run one recipe on it as soon as it is allocated.
#
#   recipes/launch/tpu-queued.sh --set data.path='/shared/corpus/*.txt'
#
# Arguments are passed to `llmctl run`. Every host mounts the shared folder, runs the recipe, and runs it again if it is
# interrupted (exit code 3). If a spot slice is preempted, delete the request and make it again: the run continues.
#
#   gcloud compute tpus tpu-vm ssh llama2-7b --zone=us-central1-a --worker=0 \
#     --command='sudo journalctl --follow --unit google-startup-scripts'
#   gcloud compute tpus queued-resources delete llama2-7b --zone=us-central1-a --force
set -eu

NAME=${NAME:-llama2-7b}
ZONE=${ZONE:-us-central1-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-256}
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}       # of the hosts
CAPACITY=${CAPACITY---spot}               # --spot, --reserved, or empty for on-demand
NFS=${NFS:-10.0.0.2:/share}               # file system that the hosts mount as /shared
LLMCTL=${LLMCTL:-/shared/venv/bin/llmctl}
RECIPE=${RECIPE:-/shared/llama2-7b.toml}
RUN=${RUN:-/shared/runs/llama2-7b}        # checkpoints and artifacts: a folder that all hosts mount

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat > "$startup" <<END
#!/bin/bash
set -eu
command -v mount.nfs > /dev/null || { apt-get update && apt-get install -y nfs-common; }
mkdir -p /shared
mountpoint -q /shared || mount -t nfs $NFS /shared
until $LLMCTL run $RECIPE --run $RUN ${*@Q}; do
  code=\$?
  [ \$code -eq 3 ] || exit \$code
done
END

gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$IMAGE" ${CAPACITY:+"$CAPACITY"} \
  --metadata-from-file="startup-script=$startup"
