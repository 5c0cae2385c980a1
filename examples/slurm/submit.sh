#!/usr/bin/env bash
# Check a training job and submit it: a number of nodes or GPUs that the mesh cannot use is refused before anything is queued.
#
#   bash examples/slurm/submit.sh [--dry-run] --nodes N --gpus GPUS_PER_NODE [--time=... other options of sbatch] CONFIG [flags]
#
# --dry-run prints the sbatch line, the mesh, the batch and the bytes on a GPU, and submits nothing. --nodes 1-2 lets the job run on fewer nodes
# than it asks for, if a node is lost. CONFIG and flags are those of python -m megatron_longvila.train.
set -euo pipefail
if ((!$#)); then
  echo usage: >&2
  sed -n '4,7s/^#  *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=examples/slurm/front.sh
source "$root/examples/slurm/front.sh"
load_front
parse_front "$@"
((${#rest[@]})) || fail "CONFIG, a YAML file such as examples/models/qwen2_7b_siglip_448.yaml, is missing"
"${python[@]}" "$root/tools/slurm_plan.py" --nodes "$nodes" --ranks_per_node "$ranks" --config "${rest[@]}"
command=(sbatch "${sbatch_words[@]}" "$root/examples/slurm/train.sbatch" "${rest[@]}")
show_command "${command[@]}"
[[ -n $dry_run ]] || "${command[@]}"
