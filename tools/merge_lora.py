#!/usr/bin/env python3
"""Merge the adapters of a checkpoint into its weights, or export them for PEFT."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # full tensors in host memory: before the first import of torch
os.environ.pop("RANK", None)  # of a job that this is started in: it is one process by itself, and would wait for the others

HELP = """
Merge the adapters (LoRA) of a checkpoint into its weights, or export them for PEFT.

  python tools/merge_lora.py --checkpoint runs/a/checkpoints/step_0000300 --output runs/a/merged

writes a checkpoint of weights alone whose configuration has model.lora.rank 0. Each adapted weight becomes W + alpha / rank * B A, computed
in fp32 and rounded once to the type of W; all other tensors stay bit-equal. Go on from it with --checkpoint.load runs/a/merged: a run with
--model.lora.rank 8 then starts with fresh adapters on the merged weights. Called again with the same checkpoint it finds its work done.

  python tools/merge_lora.py --checkpoint runs/a/checkpoints/step_0000300 --peft_output runs/a/adapter

writes adapter_model.safetensors and adapter_config.json under PEFT's names for the decoder (Qwen2ForCausalLM or LlamaForCausalLM):
PeftModel.from_pretrained(decoder, "runs/a/adapter"). The decoder must be the one the run began with. Norms and embeddings that trained next
to the adapters are in it whole (PEFT's modules_to_save).

One process without a GPU, whatever mesh wrote the checkpoint; it needs memory for the whole model. The checkpoint files hold pickled Python
objects: give it only checkpoints you trust.
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit, 2 wrong usage."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a step_... folder of a run with adapters")
    parser.add_argument("--output", type=Path, metavar="DIR", help="merged checkpoint to write")
    parser.add_argument("--peft_output", type=Path, metavar="DIR", help="PEFT adapter to write")
    arguments = parser.parse_args(argv)
    if arguments.output is None and arguments.peft_output is None:
        parser.error("give --output DIR, --peft_output DIR or both")

    from megatron_longvila import platform
    from megatron_longvila.checkpoint.lora import export_peft, merge_lora, note_left_out

    platform.init_distributed(600)
    try:
        if arguments.output is not None:
            merged = merge_lora(arguments.checkpoint, arguments.output)
            if merged.written:
                print(
                    f"merged the adapters into {merged.num_merged} of {merged.num_tensors} tensors (largest change of an element "
                    f"{merged.largest_change:.3g}): {arguments.output}"
                )
            else:
                print(f"{arguments.output} is already the merged {arguments.checkpoint}")
        if arguments.peft_output is not None:
            names = export_peft(arguments.checkpoint, arguments.peft_output)
            print(f"exported {len(names)} tensors as a PEFT adapter: {arguments.peft_output}")
            for note in note_left_out(arguments.checkpoint):
                print(f"note: {note}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        platform.shutdown_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
