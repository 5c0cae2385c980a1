#!/usr/bin/env bash
# One torchrun agent: what train.sbatch and evaluate.sbatch start on every node. Usage (inside a job step): agent.sh LOG_DIR WORDS...
#
# Rank 0 writes to the console, every rank to LOG_DIR/node_N/.../RANK/stdout.log and stderr.log.
set -euo pipefail
if (($# < 2)) || [[ -z ${SLURM_STEP_ID:-} ]]; then
  sed -n '2,4s/^#  *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
logs=$1
shift
: "${PYTHON:?}" "${RANKS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"
# Signals that are ignored here stay ignored through exec and fork, and the ranks install their own handlers. torchrun by itself dies of USR1,
# and ends its ranks 30 s after a signal it handles, in the middle of a longer save.
[[ ${LONGVILA_SIGNALS:-ranks} == default ]] || trap '' USR1 TERM
tee=()
if ((SLURM_NODEID == 0)); then tee=(--tee 0:3); fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --signals-to-handle SIGINT \
  --log-dir "$logs/node_$SLURM_NODEID" --redirects 3 "${tee[@]}" "$@"
