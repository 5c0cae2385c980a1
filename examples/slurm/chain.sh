#!/usr/bin/env bash
# Submit a chain of stages, one job each: a stage starts when the one before has finished, and is cancelled when it has failed.
#
#   bash examples/slurm/chain.sh [--dry-run] --nodes N --gpus GPUS_PER_NODE [--time=... other options of sbatch] CHAIN OUTPUT_DIR [fields]
#
# CHAIN is a file of examples/chains/ or of your own; CHAIN, OUTPUT_DIR and fields (--FIELD VALUE, --stages.NAME.FIELD VALUE, and
# --from_checkpoint DIR) are those of tools/run_stages.py. Finished stages are passed over: the same command goes on. The last line printed
# holds the jobs' numbers.
set -euo pipefail
if ((!$#)); then
  echo usage: >&2
  sed -n '4,8s/^#  *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=examples/slurm/front.sh
source "$root/examples/slurm/front.sh"
load_front
parse_front "$@"
((${#rest[@]} >= 2)) || fail "CHAIN and OUTPUT_DIR are missing"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes must be one number: the stages hand weights to each other"
chain=(--chain "${rest[0]}" --output_dir "${rest[1]}" "${rest[@]:2}")
stage=("${python[@]}" "$root/tools/slurm_stage.py" --nodes "$nodes" --ranks_per_node "$ranks" "${chain[@]}")
"${stage[@]}" --plan
names=$("${stage[@]}" --names)
jobs=()
previous=""
while read -r name; do
  command=(sbatch --parsable --job-name="longvila-$name" ${previous:+--dependency="afterok:$previous"} ${previous:+--kill-on-invalid-dep=yes})
  command+=("${sbatch_words[@]}" "$root/examples/slurm/train.sbatch" "${chain[@]}" --stage "$name")
  show_command "${command[@]}"
  previous="<job of $name>"
  if [[ -z $dry_run ]]; then
    previous=$("${command[@]}") || fail "stage $name could not be submitted; jobs of the stages before, which go on: ${jobs[*]:-none}"
    previous=${previous%%;*}
    jobs+=("$previous")
  fi
done <<<"$names"
[[ -n $dry_run ]] || echo "jobs: ${jobs[*]}"
