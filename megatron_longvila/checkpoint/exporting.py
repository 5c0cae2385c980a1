"""A Megatron checkpoint into Hugging Face weights, tensor by tensor: VILA's layout, LLaVA's, or the decoder alone.

What an import brought along comes back: passengers, files, and every key of the configurations, of which only those change that training
changed. A checkpoint that was never imported gets configurations of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_longvila import config_io
from megatron_longvila.checkpoint import export_settings
from megatron_longvila.checkpoint.hf import BESIDE_VISION, EXTRA_ROWS, Rule, flat_name, full_shapes, rules, split
from megatron_longvila.checkpoint.importing import Progress, check_output, check_space, what_breaks, written_aside
from megatron_longvila.checkpoint.layouts import LLAVA_NAMES
from megatron_longvila.checkpoint.lora import adapted, merged_weight
from megatron_longvila.checkpoint.origin import IMPORTED, PASSENGERS
from megatron_longvila.checkpoint.sharded import find_damage
from megatron_longvila.checkpoint.streaming import DistributedTensors
from megatron_longvila.checkpoint.tensor_files import SafetensorsFile, SafetensorsWriter, TensorInfo, read_json
from megatron_longvila.config import Config

_MODEL = ("vision_tower.", "projector.", "language_model.")
_TABLE, _HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
_MARKS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        merge_lora: add the adapters' product to the weights they stand beside.
        shard_bytes: largest weight file; a larger tensor has a file of its own.
        vision_names: spelling of the tower's names; `auto` is the source's, and inner (which every reader knows) without one.
        image_token_id: the id that stands for an image in the llava format; -1 takes the source's, or that of <image> in the tokenizer.
    """

    input: Path
    output: Path
    format: Literal["vila", "llava", "llm"]
    merge_lora: bool = False
    drop_passengers: bool = False
    shard_bytes: int = 5_000_000_000
    vision_names: Literal["auto", "inner", "flat"] = "auto"
    image_token_id: int = -1
    overwrite: bool = False


@dataclass(frozen=True)
class ExportJob:
    """A checked export that has not begun."""

    options: ExportOptions
    config: Config
    imported: dict[str, Any]
    tensors: DistributedTensors
    passengers: dict[str, TensorInfo]
    infos: dict[str, TensorInfo]
    places: dict[str, tuple[str, str]]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors that will be written."""
        return sum(info.num_bytes for info in self.infos.values())


def plan(options: ExportOptions) -> ExportJob:
    """Check an export completely: the checkpoint, what the format can hold, and the output.

    Raises:
        ValueError: the checkpoint is damaged, is not what its configuration says or has adapters that are not to be merged, the format
            cannot hold the model, or the output is in the way.
    """
    check_output(options.output, options.overwrite, _MARKS, inputs=(options.input,))
    damage = find_damage(options.input)
    if damage is not None:
        raise ValueError(f"{options.input} cannot be exported: {damage}")
    config = config_io.load(options.input / "config.yaml")
    if config.model.lora.rank and not options.merge_lora:
        raise ValueError(
            f"{options.input} has adapters (model.lora.rank={config.model.lora.rank}); give --merge-lora to add them to the weights, or "
            "--format peft to export them alone"
        )
    if options.merge_lora and not config.model.lora.rank:
        raise ValueError(f"{options.input} has no adapters to merge (model.lora.rank=0); leave out --merge-lora")
    if options.format == "llava":
        check_llava(config)
    imported = read_json(options.input / IMPORTED) if (options.input / IMPORTED).exists() else {}
    tensors = DistributedTensors(options.input, _MODEL)
    _check_tensors(config, tensors)
    passengers = {}
    if (options.input / PASSENGERS).exists() and not options.drop_passengers:
        passengers = SafetensorsFile(options.input / PASSENGERS).infos
    infos = _source_infos(config, tensors, passengers, bool(imported.get("repeats_table")))
    places = {name: place for name in infos if (place := _place(name, options, config, imported)) is not None}
    infos = {name: info for name, info in infos.items() if name in places}
    return ExportJob(options, config, imported, tensors, passengers, infos, places)


def run(job: ExportJob, progress: Progress = lambda num_bytes: None) -> list[str]:
    """Write the export; returns what the user should know. Nothing is left behind if it fails.

    Args:
        progress: called with the bytes of each tensor when it is written.

    Raises:
        ValueError: the disk is too small, or the llava format finds no id for its images.
    """
    check_space(job.options.output, job.num_bytes)
    with written_aside(job.options.output) as folder:
        notes = export_settings.write(job, folder)
        writers = _Writers(job, folder)
        produced = _Produced(job, writers.write, progress)
        for rule in rules(job.config):
            produced.rule(rule)
        produced.passengers()
        writers.close()
    vision = job.config.model.vision
    path = job.options.input / PASSENGERS
    if job.options.drop_passengers:
        notes.append(what_breaks(SafetensorsFile(path).infos) if path.exists() else "there are no passengers to drop")
    elif job.options.format != "llm" and not job.passengers and vision.built_layers < vision.num_layers:
        notes.append(
            f"the checkpoint never had the tower's layers from {vision.built_layers} on, which do not reach the loss: transformers "
            "initialises them at random"
        )
    return notes


def check_llava(config: Config) -> None:
    """Raises ValueError for a model that LlavaForConditionalGeneration cannot be."""
    projector = config.model.projector.type
    if projector not in ("linear", "mlp2x_gelu"):
        raise ValueError(
            f"model.projector.type={projector} merges {config.model.projector.downsample} x {config.model.projector.downsample} patches, "
            "and LLaVA in transformers has no projector that does (only linear and mlp2x_gelu fit); use --format vila"
        )


class _Produced:
    """Makes the tensors of an export one after the other, in the order of `_source_infos`."""

    def __init__(self, job: ExportJob, write: Callable[[str, Tensor], None], progress: Progress):
        self.job, self.write, self.progress = job, write, progress
        path = job.options.input / PASSENGERS
        self.file = SafetensorsFile(path) if job.passengers else None

    def rule(self, rule: Rule) -> None:
        """Write the sources of one rule."""
        if not any(name in self.job.infos for name in rule.sources):
            return
        target = self.job.tensors.read(rule.target)
        if self.job.options.merge_lora and adapted(rule.target, self.job.config):
            target = merged_weight(rule.target, target, self.job.tensors.read, self.job.config)
        extra = {name + EXTRA_ROWS: self.file.read(name + EXTRA_ROWS) for name in rule.sources if name + EXTRA_ROWS in self.job.passengers}
        for name, tensor in split(rule, target, extra).items():
            self._put(name, tensor)
            if name == _TABLE and _repeats_table(self.job):
                self._put(_HEAD, tensor)

    def passengers(self) -> None:
        """Write what travelled."""
        for name in self.job.passengers:
            if name in self.job.infos:
                self._put(name, self.file.read(name))

    def _put(self, name: str, tensor: Tensor) -> None:
        self.write(name, tensor)
        self.progress(tensor.nbytes)


class _Writers:
    """One writer for each folder of the export, which take turns."""

    def __init__(self, job: ExportJob, folder: Path):
        self.places = job.places
        infos: dict[str, dict[str, TensorInfo]] = {}
        for name, info in job.infos.items():
            place, spelled = job.places[name]
            infos.setdefault(place, {})[spelled] = info
        self.identity: dict[str, Tensor] = {}
        if job.options.format == "llava" and job.config.model.projector.type == "linear":
            # LLaVA has two linears: the second is the identity, and nothing stands between them (projector_hidden_act=linear).
            bias = job.infos["mm_projector.layers.bias"]
            names = [prefix for prefix, ours in _llava_names(job).items() if ours == "mm_projector.layers.2."]
            self.identity = {
                f"{names[0]}weight": torch.eye(bias.shape[0], dtype=bias.dtype),
                f"{names[0]}bias": torch.zeros(bias.shape, dtype=bias.dtype),
            }
            infos[""] |= {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.identity.items()}
        for place in infos:
            (folder / place).mkdir(exist_ok=True)
        self.writers = {place: SafetensorsWriter(folder / place, found, job.options.shard_bytes) for place, found in infos.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor by our name into its folder under its name there."""
        place, spelled = self.places[name]
        self.writers[place].write(spelled, tensor)

    def close(self) -> None:
        """Write what comes last, and complete the files."""
        for name, tensor in self.identity.items():
            self.writers[""].write(name, tensor)
        for writer in self.writers.values():
            with writer:
                pass


def _check_tensors(config: Config, tensors: DistributedTensors) -> None:
    """Raises ValueError unless the checkpoint has exactly the tensors of its model, in their shapes."""
    wanted, found = full_shapes(config), tensors.infos
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [
        f"{name}: {found[name].shape} instead of {shape}" for name, shape in wanted.items() if name in found and found[name].shape != shape
    ]
    if missing or unknown or wrong:
        raise ValueError(
            f"the checkpoint is not the model that its config.yaml describes: {len(missing)} tensors missing: {missing}; {len(unknown)} "
            f"unknown: {unknown}; {len(wrong)} of another shape: {wrong}"
        )


def _source_infos(
    config: Config, tensors: DistributedTensors, passengers: Mapping[str, TensorInfo], repeats_table: bool
) -> dict[str, TensorInfo]:
    """Our name -> shape and dtype of everything that will be written, in that order. Raises ValueError for passengers in the way."""
    found: dict[str, TensorInfo] = {}
    for rule in rules(config):
        dtype = tensors.infos[rule.target].dtype
        for name, shape in zip(rule.sources, rule.shapes, strict=True):
            extra = passengers.get(name + EXTRA_ROWS)
            rows = shape if extra is None else (shape[0] + extra.shape[0], *shape[1:])
            # Rows that were trained in another dtype than the rest travelled in take that one along.
            found[name] = TensorInfo(tuple(rows), dtype if extra is None else torch.promote_types(dtype, extra.dtype))
            if name == _TABLE and repeats_table and config.model.llm.tie_embeddings:
                found[_HEAD] = found[name]
    twice = sorted(found.keys() & passengers.keys())
    if twice:
        raise ValueError(f"passengers {twice} are also tensors of the model; give --drop-passengers")
    return found | {name: info for name, info in passengers.items() if not name.endswith(EXTRA_ROWS)}


def _place(name: str, options: ExportOptions, config: Config, imported: Mapping[str, Any]) -> tuple[str, str] | None:
    """(folder, name there) of one tensor; None if the format leaves it out."""
    spelling, moved = imported.get("spelling", {}), imported.get("layout") == "llava" and options.format != "llava"
    own = "inner" if moved else spelling.get("vision", "inner")
    if (own if options.vision_names == "auto" else options.vision_names) == "flat":
        name = flat_name(name)
    part, local = name.split(".", 1)
    if options.format == "vila":
        return part, local
    if options.format == "llm":
        return ("", local) if part == "llm" else None
    if config.model.projector.type == "linear":
        name = name.replace("mm_projector.layers.", "mm_projector.layers.0.")
    if name.startswith(BESIDE_VISION):
        return None
    prefixes = LLAVA_NAMES[spelling.get("llava", "flat")]
    (prefix,) = [prefix for prefix, ours in prefixes.items() if name.startswith(ours)]
    return "", prefix + name.removeprefix(prefixes[prefix])


def _llava_names(job: ExportJob) -> Mapping[str, str]:
    return LLAVA_NAMES[job.imported.get("spelling", {}).get("llava", "flat")]


def _repeats_table(job: ExportJob) -> bool:
    return job.config.model.llm.tie_embeddings and _HEAD in job.infos
