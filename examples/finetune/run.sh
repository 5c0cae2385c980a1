#!/usr/bin/env bash
# Fine-tune a VILA or LongVILA model on your own videos and bring it out again. README.md beside this file explains each step.
#
#   bash examples/finetune/run.sh MODEL ROWS MEDIA_ROOT OUTPUT [flags of megatron_longvila.train]
#
# MODEL is a folder in VILA's layout, ROWS your JSONL, MEDIA_ROOT the folder its paths start from. Needs the package with its extra `hf`.
# The same command goes on where it stopped. NUM_RANKS (default 8) is the number of GPUs, PYTHON the interpreter.
set -euo pipefail
usage="usage: run.sh MODEL ROWS MEDIA_ROOT OUTPUT [training flags]"
model=${1:?$usage} rows=${2:?$usage} media_root=${3:?$usage} output=${4:?$usage}
shift 4
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
convert=("$python" "$root/tools/convert_checkpoint.py")

if [ ! -e "$output/imported/complete.json" ]; then
  rm -f "$output/verified" # it was about another import
  "${convert[@]}" import "$model" "$output/imported"
fi
if [ ! -e "$output/verified" ]; then # a mark of its own: what was not proved is not passed over the next time
  "${convert[@]}" verify "$model" "$output/imported"
  touch "$output/verified"
fi

"$python" "$root/tools/preprocess_video.py" --input "$rows" --media_root "$media_root" --output "$output/dataset"

"$python" -m torch.distributed.run --standalone --nproc_per_node "${NUM_RANKS:-8}" -m megatron_longvila.train \
  --config "$output/imported/config.yaml" --config "$root/examples/finetune/stage5_own_videos.yaml" \
  --checkpoint.load "$output/imported" --data.train "[\"$output/dataset\"]" --output_dir "$output/run" "$@"

if [ -e "$output/run/interrupted" ]; then
  echo "training was asked to stop and saved itself; nothing was exported: start the same command again to go on" >&2
  exit 1 # not finished: what depends on the export must not start
fi

trained="$output/run/checkpoints/$(cat "$output/run/checkpoints/latest")"
"${convert[@]}" export "$trained" "$output/exported" --format vila --overwrite
"${convert[@]}" verify "$trained" "$output/exported"
