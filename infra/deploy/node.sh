#!/usr/bin/env bash
# One machine's part of a training on several: node.sh recipe.yaml [--key value ...]
# Machine 0 runs the pipeline, the others lend it their GPUs. Which one this is stands in the
# variables of the launcher, see infra/nodes.py: Kubeflow, JobSet (or an indexed Job), Slurm.
set -euo pipefail
rank="${PET_NODE_RANK:-${RANK:-${JOB_COMPLETION_INDEX:-${SLURM_NODEID:-0}}}}"
if [ "$rank" = 0 ]; then
    exec regrow run "$@"
fi
exec python -m regrow.tasks.train.node
