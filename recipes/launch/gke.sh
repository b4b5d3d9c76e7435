#!/bin/bash
# Run one recipe on a TPU slice of a GKE cluster, as a JobSet. If the run is interrupted (exit code 3), run it again.
#
#   recipes/launch/gke.sh --set data.path='/shared/corpus/*.txt'
#
# Arguments are passed to `llmctl run`. The processes find each other. The cluster needs JobSet, a node pool with this
# topology, and a claim for a volume that many nodes mount (ReadWriteMany). `kubectl delete jobset llama2-7b` stops the
# run with a checkpoint, and the same command continues it.
set -eu

NAME=${NAME:-llama2-7b}
IMAGE=${IMAGE:-registry.example/llmctl:tpu}  # recipes/launch/Containerfile, built with EXTRA=tpu
TPU=${TPU:-tpu-v5-lite-podslice}
TOPOLOGY=${TOPOLOGY:-16x16}
HOSTS=${HOSTS:-64}                        # chips of the topology, divided by those of a host
CHIPS=${CHIPS:-4}                         # chips per host
RESTARTS=${RESTARTS:-100}                 # at most, after an interruption, a failure or a lost node
CLAIM=${CLAIM:-shared}                    # the volume, mounted as /shared
RECIPE=${RECIPE:-/shared/llama2-7b.toml}
RUN=${RUN:-/shared/runs/llama2-7b}        # checkpoints and artifacts: a folder that all hosts mount

arguments=
for argument in run "$RECIPE" --run "$RUN" "$@"; do
  arguments="$arguments, '${argument//\'/\'\'}'"
done

kubectl apply --filename - <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    restartStrategy: BlockingRecreate
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # 2 is a wrong request. 3 is an interruption. If a node is lost, the other processes exit with 1.
          - action: FailJob
            onExitCodes:
              containerName: llmctl
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $TPU
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: llmctl
              image: $IMAGE
              args: [${arguments#, }]
              resources:
                limits:
                  google.com/tpu: $CHIPS
              volumeMounts:
              - name: shared
                mountPath: /shared
            volumes:
            - name: shared
              persistentVolumeClaim:
                claimName: $CLAIM
END
