#!/usr/bin/env python3
"""Bring Hugging Face weights in, bring them out, prove that two models are the same, say what a folder is."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything runs in host memory: before the first import of torch
os.environ.pop("RANK", None)  # of a job that this is started in: it is one process by itself, and would wait for the others

HELP = """
Convert checkpoints: Hugging Face's layouts and Megatron's distributed checkpoints, both ways, without a GPU.

  python tools/convert_checkpoint.py import  LongVILA-7B runs/longvila-7b
  python tools/convert_checkpoint.py verify  LongVILA-7B runs/longvila-7b
  python tools/convert_checkpoint.py inspect runs/longvila-7b
  python tools/convert_checkpoint.py export  runs/longvila-7b out/longvila-7b --format vila

Each subcommand has its own --help with a worked example. Tensors are streamed one at a time, output is written beside its place and renamed
when it is complete. Distributed checkpoints hold pickled Python objects: give this program only checkpoints you trust.
"""
IMPORT_HELP = """
Bring Hugging Face weights into a distributed checkpoint that loads under any tp, pp, cp and dp.

  python tools/convert_checkpoint.py import Efficient-Large-Model/qwen2-7b-longvila-256f runs/longvila-7b
  torchrun --nproc_per_node 8 -m megatron_longvila.train --config runs/longvila-7b/config.yaml \\
    --config examples/stages/stage5_256_frames.yaml --checkpoint.load runs/longvila-7b --output_dir runs/long_sft

The input is recognised by its files:
  VILA, LongVILA   config.json with llm_cfg, and llm/, vision_tower/, mm_projector/
  separate parts   a Qwen2 or Llama folder with --vision_tower DIR (SigLIP), or a folder with llm/ and vision_tower/ and no config.json; the
                   projector is freshly initialised (--projector says which): the start of stage 1
  LLaVA            LlavaForConditionalGeneration with SigLIP and Qwen2 or Llama

  python tools/convert_checkpoint.py import Qwen/Qwen2-1.5B runs/start --vision_tower google/siglip-so400m-patch14-384

Every tensor must have exactly one place. What does not reach the loss (last layers and pooling head of the tower, spare vocabulary rows,
unknown keys of the configurations) travels with the checkpoint and comes back on export, as do the tokenizer, chat template, preprocessor
and generation settings (OUTPUT/source). OUTPUT/config.yaml describes the model.
"""
EXPORT_HELP = """
Bring a checkpoint of any mesh out into Hugging Face's form.

  python tools/convert_checkpoint.py export runs/a/checkpoints/step_0000300 out/a --format vila

formats:
  vila   config.json, llm/, vision_tower/, mm_projector/, as the public VILA code reads it
  llava  LlavaForConditionalGeneration: transformers loads and generates with it. It has no projector that merges patches: models with an
         mlp_downsample projector are refused, and vila is their way out
  llm    the Qwen2 or Llama decoder alone
  peft   the adapters alone, for PeftModel.from_pretrained on the decoder that training began with; --merge-lora adds them to the weights
         in the other formats

What was imported comes back to the last bit, with all keys of its configurations. Keys of the model that training changed (context
length, rotary base, image preparation) say what is true now; keys that only guide inference, as num_video_frames, stay as imported.
"""
VERIFY_HELP = """
Compare two models part by part on built-in inputs (text, image, video): vision features, projector output, logits.

  python tools/convert_checkpoint.py verify Efficient-Large-Model/qwen2-7b-longvila-256f runs/longvila-7b

Either side may be Hugging Face's form, which transformers' own modules run, or a checkpoint of ours. Prints the largest absolute and
relative difference of each part, and passes or fails by the dtype of the weights. Needs the extra `hf` (transformers) and memory for one
model in fp32.
"""
INSPECT_HELP = """
Say what a folder is: layout, sizes, parameters per part, dtypes, rotary settings, context length. With two, their differences.

  python tools/convert_checkpoint.py inspect runs/longvila-7b
  python tools/convert_checkpoint.py inspect Efficient-Large-Model/qwen2-7b-longvila-256f out/longvila-7b
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit (or verify failed, or inspect found differences), 2 wrong usage."
_EXPORT_DEFAULTS = {"shard_size": 5 * 10**9, "drop_passengers": False, "vision_names": "auto", "image_token_id": -1}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return _fail(f"{what}; nothing half-written was left")
    except KeyboardInterrupt:
        return _fail("stopped; nothing half-written was left")


def _import(arguments: argparse.Namespace) -> int:
    from megatron_longvila import platform
    from megatron_longvila.checkpoint.importing import ImportOptions, plan, run

    names = ("input", "output", "vision_tower", "projector", "seed", "allow_pickle", "drop_passengers", "overwrite")
    job = plan(ImportOptions(**{name: getattr(arguments, name) for name in names}))
    print(f"{arguments.input}: {job.source.layout} layout, {len(job.infos)} tensors of the model, {len(job.passengers)} that travel along")
    if arguments.dry_run:
        return _dry_run(arguments.output, job.num_bytes, job.source.notes)
    platform.init_distributed(600)
    try:
        with _bar("import", job.num_bytes) as progress:
            notes = run(job, progress)
    finally:
        platform.shutdown_distributed()
    return _done(arguments.output, notes)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.format == "peft":
        return _export_peft(arguments)
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan, run

    names = ("input", "output", "format", "merge_lora", "drop_passengers", "vision_names", "image_token_id", "overwrite")
    job = plan(ExportOptions(shard_bytes=arguments.shard_size, **{name: getattr(arguments, name) for name in names}))
    print(f"{arguments.input}: {len(job.infos)} tensors, {len(job.passengers)} of them passengers")
    if arguments.dry_run:
        return _dry_run(arguments.output, job.num_bytes, ())
    with _bar("export", job.num_bytes) as progress:
        notes = run(job, progress)
    return _done(arguments.output, notes)


def _export_peft(arguments: argparse.Namespace) -> int:
    from megatron_longvila import platform
    from megatron_longvila.checkpoint.importing import check_output, written_aside
    from megatron_longvila.checkpoint.lora import check_peft, export_peft, note_left_out

    if arguments.merge_lora:
        raise ValueError("--merge-lora adds the adapters to the weights, --format peft exports them alone; choose one of the two")
    for name in ("shard_size", "drop_passengers", "vision_names", "image_token_id"):
        if getattr(arguments, name) != _EXPORT_DEFAULTS[name]:
            raise ValueError(f"--{name} says nothing about adapters alone (--format peft); leave it out")
    check_output(arguments.output, arguments.overwrite, ("adapter_config.json",), inputs=(arguments.input,))
    check_peft(arguments.input)
    if arguments.dry_run:
        return _dry_run(arguments.output, 0, note_left_out(arguments.input))
    platform.init_distributed(600)
    try:
        with written_aside(arguments.output) as folder:
            folder.rmdir()
            names = export_peft(arguments.input, folder)
    finally:
        platform.shutdown_distributed()
    return _done(arguments.output, [f"{len(names)} tensors in the adapter", *note_left_out(arguments.input)])


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_longvila import platform
    from megatron_longvila.evaluation.verify import verify

    platform.init_distributed(600)
    try:
        report = verify(
            arguments.a, arguments.b, allow_pickle=arguments.allow_pickle, progress=lambda text: print(text, file=sys.stderr, flush=True)
        )
    finally:
        platform.shutdown_distributed()
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_longvila.checkpoint.inspect import differences, inspect

    facts = [inspect(path, allow_pickle=arguments.allow_pickle) for path in (arguments.path, arguments.path2) if path is not None]
    for one in facts:
        print("\n".join(one.lines()))
    if len(facts) == 1:
        return 0
    found = differences(*facts)
    print("\n".join(["differences:", *(f"  {line}" for line in found)]) if found else "no differences")
    return 1 if found else 0


def _bar(what: str, num_bytes: int):
    """A progress bar with rate and ETA: `with _bar(...) as progress: progress(bytes)`."""
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def bar():
        with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5, smoothing=0.1) as shown:
            yield shown.update

    return bar()


def _dry_run(output: Path, num_bytes: int, notes: Sequence[str]) -> int:
    from megatron_longvila.checkpoint.importing import check_space

    check_space(output, num_bytes)
    _notes(notes)
    print(f"everything fits; would write {f'{num_bytes / 2**30:.2f} GiB to ' * (num_bytes > 0)}{output}")
    return 0


def _done(output: Path, notes: Sequence[str]) -> int:
    _notes(notes)
    print(f"wrote {output}")
    return 0


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _size(text: str) -> int:
    """Bytes of "5GB", "512MiB" or a plain number."""
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 512MiB or bytes")
    return size


def _parser() -> argparse.ArgumentParser:
    settings = dict(formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=HELP, **settings)
    commands = parser.add_subparsers(required=True, metavar="{import,export,verify,inspect}")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text.strip().splitlines()[0], description=text, **settings)
        made.set_defaults(run=run)
        return made

    def flag(target: argparse.ArgumentParser, name: str, **kwargs) -> None:
        target.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **kwargs)

    def switch(target: argparse.ArgumentParser, name: str, text: str) -> None:
        flag(target, name, action="store_true", help=text)

    bring_in, bring_out = command("import", IMPORT_HELP, _import), command("export", EXPORT_HELP, _export)
    for target, what in ((bring_in, "folder of Hugging Face weights"), (bring_out, "checkpoint, like RUN/checkpoints/step_0000300")):
        target.add_argument("input", type=Path, metavar="INPUT", help=what)
        target.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
        switch(target, "overwrite", "replace a finished output")
        switch(target, "dry_run", "check everything and write nothing")
        switch(target, "drop_passengers", "leave out what does not reach the loss; says what that breaks")
    flag(bring_in, "vision_tower", type=Path, metavar="DIR", help="the SigLIP that goes with a bare language model")
    flag(bring_in, "projector", metavar="TYPE", help="of separate parts (default mlp_downsample)")
    flag(bring_in, "seed", type=int, default=0, help="of a freshly initialised projector (default 0)")
    switch(bring_in, "allow_pickle", "read .bin and .pt files (with weights_only)")
    flag(bring_out, "format", required=True, choices=("vila", "llava", "llm", "peft"), help="see above")
    switch(bring_out, "merge_lora", "add the adapters to the weights")
    flag(
        bring_out,
        "shard_size",
        type=_size,
        default=_EXPORT_DEFAULTS["shard_size"],
        metavar="SIZE",
        help="largest weight file (default 5GB)",
    )
    flag(bring_out, "vision_names", choices=("auto", "inner", "flat"), default="auto", help="tower names with vision_model. inside or not")
    flag(bring_out, "image_token_id", type=int, default=-1, metavar="N", help="id of an image in the llava format")
    prove, look = command("verify", VERIFY_HELP, _verify), command("inspect", INSPECT_HELP, _inspect)
    prove.add_argument("a", type=Path, metavar="A", help="a model")
    prove.add_argument("b", type=Path, metavar="B", help="another")
    look.add_argument("path", type=Path, metavar="PATH", help="a folder")
    look.add_argument("path2", type=Path, nargs="?", metavar="PATH2", help="another, to compare with")
    for target in (prove, look):
        switch(target, "allow_pickle", "read .bin and .pt files (with weights_only)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
