#!/usr/bin/env bash
# shellcheck disable=SC2317 # run_to_end calls what stands here
# One torchrun agent: what train.sbatch and evaluate.sbatch start on every node. Usage (inside a job step): agent.sh LOG_DIR WORDS...
#
# Rank 0 writes to the console, every rank to LOG_DIR/node_N/.../RANK/stdout.log and stderr.log.
trap '' USR1 TERM # until `listen`: a shell that dies here would end a job that is asked to save as one that failed
set -uo pipefail
if (($# < 2)) || [[ -z ${SLURM_STEP_ID:-} ]]; then
  sed -n '3,5s/^#  *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
# shellcheck source=examples/slurm/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
logs=$1
shift
: "${PYTHON:?}" "${RANKS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"
tee=()
if ((SLURM_NODEID == 0)); then tee=(--tee 0:3); fi

# torchrun by itself dies of USR1, and ends its ranks 30 s after a signal that it handles, in the middle of a longer save.
launch() {
  trap '' USR1 TERM # ignored stays ignored through exec
  exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --signals-to-handle SIGINT \
    --log-dir "$logs/node_$SLURM_NODEID" --redirects 3 "${tee[@]}" "$@"
}

# Where Slurm tracks processes by cgroups, all but SIGKILL goes to the processes alone that it has started itself: to this shell.
ask_ranks() { # the children of torchrun, not what they have started. One that neither blocks nor catches USR1 cannot hear it yet, or any more
  local file key value bit=$(($(kill -l USR1) - 1))
  for file in /proc/[0-9]*/status; do
    while read -r key value _; do
      case $key in
        PPid:) [[ $value == "$child" ]] || break ;;
        SigBlk: | SigCgt:)
          if (((0x$value >> bit) & 1)); then
            file=${file%/status}
            kill -USR1 "${file#/proc/}" 2>/dev/null
            break
          fi
          ;;
      esac
    done 2>/dev/null <"$file"
  done 2>/dev/null
}

listen
run_to_end ask_ranks launch "$@"
exit "$status"
