"""Hugging Face weights into a Megatron checkpoint, tensor by tensor: everything is checked from the headers before a byte is written.

The checkpoint is an ordinary one of weights alone (checkpoint/sharded.py), plus what its export needs: `passengers.safetensors`,
`imported.json` (layout and spelling of the source) and `source/` (tokenizer, templates, settings and the configurations as they were).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_longvila import config_io
from megatron_longvila.checkpoint.hf import EXTRA_ROWS, ImportPlan, Rule, check_tied, fill, full_shapes, plan_import, rules
from megatron_longvila.checkpoint.layouts import Source, open_source, part_dtypes
from megatron_longvila.checkpoint.origin import COMPLETE, IMPORTED, PASSENGERS, SOURCE, TOKENS, describe_tokens
from megatron_longvila.checkpoint.sharded import VERSION, mark_complete, write_text
from megatron_longvila.checkpoint.streaming import write_distributed
from megatron_longvila.checkpoint.tensor_files import SafetensorsWriter, TensorInfo, write_json
from megatron_longvila.config import Config, DataConfig, TrainingConfig
from megatron_longvila.data.text import load_tokenizer
from megatron_longvila.models.init import initial_tensor

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
_TRAINED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TEMPLATE_MARKS = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}
_TABLE, _HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"


@dataclass(frozen=True)
class ImportOptions:
    """What to import and how.

    Attributes:
        vision_tower: folder of the SigLIP that goes with a bare language model.
        projector: type of a freshly initialised projector (separate parts only).
        seed: of that projector.
        allow_pickle: read .bin and .pt files, with weights_only.
        drop_passengers: leave out what does not reach the loss; the export then is not what was imported.
        overwrite: replace a finished output.
    """

    input: Path
    output: Path
    vision_tower: Path | None = None
    projector: str | None = None
    seed: int = 0
    allow_pickle: bool = False
    drop_passengers: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ImportJob:
    """A checked import that has not begun.

    Attributes:
        config: of the checkpoint.
        infos: global name -> shape and dtype of what will be written.
        passengers: name -> shape and dtype of what travels.
        num_bytes: of both.
        fresh: global names that are initialised and not read.
    """

    options: ImportOptions
    source: Source
    plan: ImportPlan
    config: Config
    infos: dict[str, TensorInfo]
    passengers: dict[str, TensorInfo]
    fresh: frozenset[str]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors that will be written."""
        return sum(info.num_bytes for info in (*self.infos.values(), *self.passengers.values()))


def plan(options: ImportOptions) -> ImportJob:
    """Recognise and check an input completely, from its headers.

    Raises:
        ValueError: the input is unknown, incomplete or damaged, a tensor has no place or a wrong shape, or the output is in the way.
    """
    check_output(options.output, options.overwrite, (COMPLETE, IMPORTED), inputs=(options.input, options.vision_tower))
    source = open_source(options.input, vision_tower=options.vision_tower, projector=options.projector, allow_pickle=options.allow_pickle)
    config = Config(model=source.model)
    shapes = {name: info.shape for name, info in source.infos.items()}
    fresh = set()
    if source.layout == "parts":
        # Its rules are filled by initialisation: stand-ins of the right shape take the place of its tensors.
        made = [rule for rule in rules(config) if rule.target.startswith("projector.")]
        fresh = {rule.target for rule in made}
        for rule in made:
            shapes |= dict(zip(rule.sources, rule.shapes, strict=True))
    placed = plan_import(shapes, config)
    infos = _target_infos(source, placed, config, frozenset(fresh))
    passengers = {} if options.drop_passengers else _passenger_infos(source, placed, config)
    return ImportJob(options, source, placed, _checkpoint_config(source, options.output), infos, passengers, frozenset(fresh))


def run(job: ImportJob, progress: Progress = lambda num_bytes: None) -> list[str]:
    """Write the checkpoint. Needs torch.distributed with one rank.

    Args:
        progress: called with the bytes of each tensor when it is written.

    Returns:
        Warnings: tensors with NaN or infinite elements, and what the source's files left open.

    Raises:
        ValueError: the disk is too small, or a tied `lm_head` is not the embedding. Nothing is left behind then.
    """
    check_space(job.options.output, job.num_bytes + sum(path.stat().st_size for path in job.source.settings.values()))
    if job.plan.repeats_table:
        check_tied(job.source.read(_HEAD), job.source.read(_TABLE))
    rule_of, bad = {rule.target: rule for rule in job.plan.rules}, []

    def read(target: str) -> Tensor:
        tensor = _fresh(job, target) if target in job.fresh else _filled(job.source, rule_of[target], bad)
        progress(job.infos[target].num_bytes)
        return tensor

    notes = [*job.source.notes]
    with written_aside(job.options.output) as folder:
        common = {"progress": {"version": VERSION, "step": 0, "layout": {}, "optimizer_backend": ""}}
        write_distributed(folder, job.infos, read, common)
        if job.passengers:
            with SafetensorsWriter(folder, job.passengers, name=PASSENGERS) as writer:
                for name, info in job.passengers.items():
                    tensor = _passenger(job.source, name, job.config.model.llm.vocab_size)
                    bad += [name] if tensor.is_floating_point() and not _is_finite(tensor) else []
                    writer.write(name, tensor)
                    progress(info.num_bytes)
        config_io.save(job.config, folder / "config.yaml")
        _write_source(job, folder, notes)
        mark_complete(folder)
    if job.options.drop_passengers:
        notes.append(what_breaks(_passenger_infos(job.source, job.plan, job.config)))
    if bad:
        notes.append(f"{len(bad)} tensors have NaN or infinite elements, and were imported as they are: {bad}")
    return notes


def what_breaks(names: Iterable[str]) -> str:
    """What leaving out these passengers means."""
    names = sorted(names)
    return (
        f"left out {len(names)} tensors that do not reach the loss: {names}. An export is not what was imported: transformers initialises "
        "the tower's missing layers at random (the features of the selected layer do not depend on them), its pooled output means nothing, "
        "and vocabulary rows beyond vocab_size are gone"
    )


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when the block ends, and vanishes if it fails. What was there before is replaced."""
    folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        if output.exists():
            before = output.with_name(f".{output.name}.replaced")
            shutil.rmtree(before, ignore_errors=True)
            os.rename(output, before)
            try:
                os.rename(folder, output)
            except BaseException:
                os.rename(before, output)
                raise
            shutil.rmtree(before)
        else:
            os.rename(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_output(output: Path, overwrite: bool, marks: tuple[str, ...], inputs: tuple[Path | None, ...]) -> None:
    """Raises ValueError if the output is in the way: finished and not to be replaced, something else, or one of the inputs."""
    for path in inputs:
        if path is not None and output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"the output {output} is or contains the input {path}; choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not any((output / mark).exists() for mark in marks):
        raise ValueError(f"{output} exists and is no conversion's output; choose another folder, or remove it yourself")
    if not overwrite:
        raise ValueError(f"{output} is finished already; give --overwrite to replace it, or choose another folder")


def check_space(output: Path, num_bytes: int) -> None:
    """Raises ValueError unless the disk of `output` has room for so many bytes and 1% more."""
    parent = next(path for path in output.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(parent).free, num_bytes + num_bytes // 100 + (1 << 20)
    if free < needed:
        raise ValueError(
            f"{parent} has {free / 2**30:.2f} GiB free, {output.name} needs {needed / 2**30:.2f}; free some or write elsewhere"
        )


def _target_infos(source: Source, placed: ImportPlan, config: Config, fresh: frozenset[str]) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of the model. Raises ValueError for dtypes that no model has, or that one tensor would mix."""
    shapes, infos = full_shapes(config), {}
    for rule in placed.rules:
        dtypes = {source.infos[_TABLE].dtype} if rule.target in fresh else {source.infos[name].dtype for name in rule.sources}
        if len(dtypes) > 1:
            raise ValueError(
                f"{list(rule.sources)} have the dtypes {sorted(map(str, dtypes))} and become one tensor; store them in one dtype"
            )
        dtype = dtypes.pop()
        if dtype not in _TRAINED_DTYPES:
            raise ValueError(f"{rule.sources[0]} has dtype {dtype}; weights must be float32, bfloat16 or float16 (not quantised)")
        infos[rule.target] = TensorInfo(shapes[rule.target], dtype)
    return infos


def _passenger_infos(source: Source, placed: ImportPlan, config: Config) -> dict[str, TensorInfo]:
    found, rows = {name: source.infos[name] for name in placed.passengers}, config.model.llm.vocab_size
    for name in placed.extra_rows:
        info = source.infos[name]
        found[name + EXTRA_ROWS] = TensorInfo((info.shape[0] - rows, *info.shape[1:]), info.dtype)
    return found


def _passenger(source: Source, name: str, vocab_size: int) -> Tensor:
    if name.endswith(EXTRA_ROWS):
        return source.read(name.removesuffix(EXTRA_ROWS))[vocab_size:]
    return source.read(name)


def _filled(source: Source, rule: Rule, bad: list[str]) -> Tensor:
    tensors = [source.read(name) for name in rule.sources]
    bad += [name for name, tensor in zip(rule.sources, tensors, strict=True) if not _is_finite(tensor)]
    return fill(rule, tensors)


def _fresh(job: ImportJob, target: str) -> Tensor:
    info = job.infos[target]
    return initial_tensor(target, info.shape, job.config, job.options.seed).to(info.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which a NaN or an infinity reaches: a mask of the elements would take 30 times as long."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _checkpoint_config(source: Source, output: Path) -> Config:
    """What a run needs to continue from the checkpoint, but for its data."""
    tokenizer = Path("llm" if source.layout != "llava" else "")
    data = DataConfig(
        tokenizer=str(output.absolute() / SOURCE / tokenizer),
        template=_template(source, tokenizer),
        context_length=min(DataConfig.context_length, source.model.llm.max_position_embeddings),
    )
    precision = "fp32" if source.infos[_TABLE].dtype is torch.float32 else "bf16"
    return Config(model=source.model, data=data, training=TrainingConfig(precision=precision))


def _template(source: Source, tokenizer: Path) -> str:
    """The conversation template whose marks the source's chat template has, or else its tokenizer."""
    files = [str(tokenizer / name) for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json")]
    for text in (source.settings[name].read_text(encoding="utf-8") for name in files if name in source.settings):
        for template, mark in _TEMPLATE_MARKS.items():
            if mark in text:
                return template
    return "plain"


def _write_source(job: ImportJob, folder: Path, notes: list[str]) -> None:
    """Files that travel, the description of the import, and what the token ids mean."""
    for key, path in job.source.settings.items():
        target = folder / SOURCE / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    description = {"layout": job.source.layout, "spelling": job.source.spelling, "repeats_table": job.plan.repeats_table}
    write_json(folder / IMPORTED, description | {"dtypes": part_dtypes(job.infos), "passengers_dropped": job.options.drop_passengers})
    if job.config.data.template not in _TEMPLATE_MARKS:
        notes.append(
            f"the source's files show no chat template of {' or '.join(_TEMPLATE_MARKS)}; config.yaml has data.template="
            f"{job.config.data.template}: change it if the model expects another"
        )
    tokenizer = folder / SOURCE / ("" if job.source.layout == "llava" else "llm")
    try:
        tokens = describe_tokens(load_tokenizer(tokenizer), job.config)
    except (ValueError, ImportError) as error:
        notes.append(f"the source's tokenizer cannot be read, so nothing will check that training uses the same one: {error}")
    else:
        write_text(folder / TOKENS, json.dumps(tokens, indent=1) + "\n")
