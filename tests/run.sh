#!/usr/bin/env bash
# Install what is missing and run the CPU tests: `bash tests/run.sh [--all] [pytest arguments]`.
# --all adds the slow ones: end_to_end, slurm and kill.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/install.sh"
install dev,hf

arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then arguments+=(-m ""); else arguments+=("$argument"); fi
done
cd "$root"
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest ${arguments[@]+"${arguments[@]}"}
