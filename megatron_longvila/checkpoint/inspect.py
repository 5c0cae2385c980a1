"""What a folder of weights is, from its headers and configurations alone, and where two of them differ, to the last bit.

All forms are described under the same names, VILA's (hf.py): a checkpoint of ours can be compared with the folder it came from.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longvila import config_io
from megatron_longvila.checkpoint.hf import EXTRA_ROWS, Rule, inner_names, rules, split
from megatron_longvila.checkpoint.hf_config import ARCHITECTURES, VISION_TYPES, read_llm, read_vision
from megatron_longvila.checkpoint.layouts import open_source
from megatron_longvila.checkpoint.origin import PASSENGERS, SOURCE
from megatron_longvila.checkpoint.sharded import find_damage, read_progress
from megatron_longvila.checkpoint.streaming import DistributedTensors
from megatron_longvila.checkpoint.tensor_files import SafetensorsFile, TensorFolder, TensorInfo, read_json
from megatron_longvila.config import Config, LLMConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig

_PARTS = {"llm.": "language model", "mm_projector.": "projector", "vision_tower.": "vision tower"}
_MODEL = ("vision_tower.", "projector.", "language_model.")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LISTED = 10  # names that a line about many tensors shows


@dataclass(frozen=True)
class Facts:
    """What a folder holds.

    Attributes:
        kind: what it is, in words.
        llm, vision, projector, lora: the configuration of each part there is.
        infos: every tensor under VILA's name; adapters under their own.
        missing: tensors that the configuration asks for and the folder does not have.
        unused: tensors that do not reach the loss.
        files: what travels beside the weights, path below the model's root -> file.
        read: a tensor by its name in `infos`.
    """

    path: Path
    kind: str
    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    llm: LLMConfig | None = None
    vision: VisionConfig | None = None
    projector: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Every configured number under a dotted name."""
        found = {f"llm.{name}": value for name, value in asdict(self.llm).items()} if self.llm else {}
        found |= {f"vision.{name}": value for name, value in asdict(self.vision).items()} if self.vision else {}
        found |= {"projector.type": self.projector} if self.projector else {}
        return found | ({f"lora.{name}": value for name, value in asdict(self.lora).items()} if self.lora.rank else {})

    def lines(self) -> list[str]:
        """A description to print."""
        found = [f"{self.path}: {self.kind}"]
        unused = set(self.unused)
        for prefix, part in _PARTS.items():
            infos = {name: info for name, info in self.infos.items() if name.startswith(prefix) and name not in unused}
            if infos:
                found.append(f"  {part:15} {_count(infos)}{self._describe(part)}")
        adapters = {name: info for name, info in self.infos.items() if not name.startswith(tuple(_PARTS))}
        if adapters:
            found.append(f"  {'adapters':15} {_count(adapters)}; rank {self.lora.rank}, alpha {self.lora.alpha:g}, on {self.lora.targets}")
        if unused:
            found.append(f"  {'not in the loss':15} {_count({name: self.infos[name] for name in self.unused})}: {_grouped(self.unused)}")
        if self.missing:
            found.append(f"  MISSING         {len(self.missing)} tensors: {_some(self.missing)}")
        if self.llm:
            scaling = asdict(self.llm.rope_scaling) if self.llm.rope_scaling else "none"
            found.append(f"  RoPE            base {self.llm.rotary_base:,.0f}, scaling {scaling}")
            found.append(f"  context length  {self.llm.max_position_embeddings:,}")
        return found

    def _describe(self, part: str) -> str:
        if part == "language model" and self.llm:
            llm = self.llm
            heads = f"{llm.num_attention_heads} heads, {llm.num_query_groups} for keys and values, of {llm.head_dim}"
            tied = "tied" if llm.tie_embeddings else "untied"
            return (
                f"; {llm.architecture}, {llm.num_layers} layers of {llm.hidden_size} and {llm.ffn_hidden_size}, {heads}, "
                f"vocabulary {llm.vocab_size:,} ({tied})"
            )
        if part == "vision tower" and self.vision:
            vision = self.vision
            return (
                f"; SigLIP, {vision.num_layers} layers of {vision.hidden_size} (feature {vision.select_layer}), {vision.image_size} px, "
                f"{vision.grid_size} x {vision.grid_size} patches"
            )
        return f"; {self.projector}" if part == "projector" and self.projector else ""


def inspect(path: Path, *, allow_pickle: bool = False) -> Facts:
    """Describe a checkpoint of this project, a model in VILA's or LLaVA's layout, a part alone, or a PEFT adapter.

    Raises:
        ValueError: it is none of these, or one of its files is missing or damaged.
    """
    if (path / "config.yaml").is_file():
        return _inspect_checkpoint(path)
    if (path / "adapter_config.json").is_file():
        return _inspect_adapter(path, allow_pickle)
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if raw.get("model_type") in ARCHITECTURES:
        folder = TensorFolder(path, allow_pickle=allow_pickle)
        llm = read_llm(raw, str(path / "config.json"))
        return _with_rules(
            Facts(path, f"language model alone ({raw['model_type']})", _prefixed("llm.", folder), _reader("llm.", folder), llm=llm)
        )
    if raw.get("model_type") in VISION_TYPES:
        folder = TensorFolder(path, allow_pickle=allow_pickle)
        spelled = inner_names(f"vision_tower.{name}" for name in folder.infos)
        infos = {inner: folder.infos[name.removeprefix("vision_tower.")] for inner, name in spelled.items()}
        vision = read_vision(raw, str(path / "config.json"))

        def read(name: str) -> Tensor:
            return folder.read(spelled[name].removeprefix("vision_tower."))

        return _with_rules(Facts(path, "vision tower alone (SigLIP)", infos, read, vision=vision))
    source = open_source(path, allow_pickle=allow_pickle)
    names = {"vila": "model in VILA's layout", "llava": "model in LLaVA's layout", "parts": "language model and vision tower, no projector"}
    projector = None if source.layout == "parts" else source.model.projector.type
    parts = dict(llm=source.model.llm, vision=source.model.vision, projector=projector)
    return _with_rules(Facts(path, names[source.layout], source.infos, source.read, **parts, files=source.settings))


def differences(a: Facts, b: Facts, *, values: bool = True) -> list[str]:
    """One sentence for everything that is not the same; empty for the same model.

    Args:
        values: read all tensors that both have and compare them bit for bit.
    """
    found = []
    for name in sorted(a.settings().keys() | b.settings().keys()):
        one, other = (facts.settings().get(name, "(none)") for facts in (a, b))
        if one != other:
            found.append(f"{name}: {one} and {other}")
    for here, there, word in ((a, b, "first"), (b, a, "second")):
        only = sorted(here.infos.keys() - there.infos.keys())
        if only:
            found.append(f"only the {word} has {len(only)} tensors: {_grouped(only)}")
    common = [name for name in a.infos if name in b.infos]
    shapes = [name for name in common if a.infos[name].shape != b.infos[name].shape]
    found += [f"{name}: shape {a.infos[name].shape} and {b.infos[name].shape}" for name in shapes]
    dtypes = Counter((a.infos[name].dtype, b.infos[name].dtype) for name in common if a.infos[name].dtype != b.infos[name].dtype)
    found += [f"{count} tensors are {_short(one)} in the first and {_short(other)} in the second" for (one, other), count in dtypes.items()]
    if values:
        found += _compare_values(a, b, [name for name in common if name not in shapes])
    return found + _compare_files(a.files, b.files)


def _compare_values(a: Facts, b: Facts, names: list[str]) -> list[str]:
    """A line for the tensors whose values are not equal bit for bit (in fp32 where the types differ), the largest differences first."""
    largest = {}
    for name in names:
        one, other = a.read(name), b.read(name)
        if one.dtype != other.dtype or not _same_bytes(one, other):
            change = (one.float() - other.float()).abs().max().item() if one.numel() else 0.0
            if change != 0 or one.dtype == other.dtype:
                largest[name] = change
    if not largest:
        return []
    order = sorted(largest, key=lambda name: (math.isnan(largest[name]), largest[name]), reverse=True)
    shown = ", ".join(f"{name} by {largest[name]:.3g}" for name in order[:_LISTED])
    more = f", and {len(order) - _LISTED} more" if len(order) > _LISTED else ""
    return [f"{len(order)} of {len(names)} tensors have other values: {shown}{more}"]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit: a NaN equals itself, and 0 is not -0."""
    one, other = (tensor.contiguous().reshape(-1).view(dtype=_BITS[tensor.element_size()]) for tensor in (one, other))
    return bool(one.equal(other))


def _compare_files(a: Mapping[str, Path], b: Mapping[str, Path]) -> list[str]:
    """What travels beside the weights, if both sides have any of it."""
    if not a or not b:
        return []
    found = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append(f"file {name}: only the {'first' if name in a else 'second'} has it")
        elif _hash(a[name]) != _hash(b[name]):
            keys = ""
            if name.endswith(".json"):
                one, other = read_json(a[name]), read_json(b[name])
                other_keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
                keys = f" in {', '.join(other_keys)}" if other_keys else " in nothing but its spelling"
            found.append(f"file {name}: other content{keys}")
    return found


def _inspect_checkpoint(path: Path) -> Facts:
    damage = find_damage(path)
    if damage is not None:
        raise ValueError(f"{path} is no usable checkpoint: {damage}")
    config, progress = config_io.load(path / "config.yaml"), read_progress(path)
    tensors = DistributedTensors(path, _MODEL)
    passengers = SafetensorsFile(path / PASSENGERS) if (path / PASSENGERS).is_file() else None
    travelling = passengers.infos if passengers else {}
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Rule] = {}
    for rule in rules(config):
        for name, shape in zip(rule.sources, rule.shapes, strict=True) if rule.target in tensors.infos else ():
            extra = travelling.get(name + EXTRA_ROWS)
            rows = (shape[0] + extra.shape[0], *shape[1:]) if extra else tuple(shape)
            infos[name], places[name] = TensorInfo(rows, tensors.infos[rule.target].dtype), rule
    infos |= {name: info for name, info in travelling.items() if not name.endswith(EXTRA_ROWS)}
    infos |= {name: info for name, info in tensors.infos.items() if ".lora." in name}
    last: dict[str, dict[str, Tensor]] = {}  # the sources of one rule: q, k and v are one tensor on disk

    def read(name: str) -> Tensor:
        rule = places.get(name)
        if rule is None:
            return tensors.read(name) if ".lora." in name else passengers.read(name)
        if rule.target not in last:
            rows = {key: passengers.read(key) for source in rule.sources if (key := source + EXTRA_ROWS) in travelling}
            last.clear()
            last[rule.target] = split(rule, tensors.read(rule.target), rows)
        return last[rule.target][name]

    layout = progress["layout"]
    state = f"with the state of a run on {layout['world_size']} ranks" if layout else "weights alone"
    model, source = config.model, path / SOURCE
    files = {str(file.relative_to(source)): file for file in source.rglob("*") if file.is_file()} if source.is_dir() else {}
    return _with_rules(
        Facts(
            path, f"Megatron checkpoint of step {progress['step']}, {state}", infos, read, llm=model.llm, vision=model.vision,
            projector=model.projector.type, lora=model.lora, files=files,
        )
    )  # fmt: skip


def _inspect_adapter(path: Path, allow_pickle: bool) -> Facts:
    raw = read_json(path / "adapter_config.json")
    folder = TensorFolder(path, allow_pickle=allow_pickle)
    targets = sorted(name.removesuffix("_proj") for name in raw.get("target_modules") or [])
    lora = LoraConfig(raw.get("r", 0), raw.get("lora_alpha", 0), targets)
    return Facts(path, f"PEFT adapter ({raw.get('peft_type')})", folder.infos, folder.read, lora=lora)


def _with_rules(facts: Facts) -> Facts:
    """The same facts with `missing` and `unused` found by the name maps."""
    model = ModelConfig(
        **({"llm": facts.llm} if facts.llm else {}),
        **({"vision": facts.vision} if facts.vision else {}),
        **({"projector": ProjectorConfig(facts.projector)} if facts.projector else {}),
    )
    present = tuple(prefix for prefix, part in zip(_PARTS, (facts.llm, facts.projector, facts.vision), strict=True) if part)
    wanted = {name for rule in rules(Config(model=model)) for name in rule.sources if name.startswith(present)}
    missing = tuple(sorted(wanted - facts.infos.keys()))
    unused = tuple(sorted(name for name in facts.infos if name.startswith(tuple(_PARTS)) and name not in wanted))
    return replace(facts, missing=missing, unused=unused)


def _prefixed(prefix: str, folder: TensorFolder) -> dict[str, TensorInfo]:
    return {prefix + name: info for name, info in folder.infos.items()}


def _reader(prefix: str, folder: TensorFolder) -> Callable[[str], Tensor]:
    return lambda name: folder.read(name.removeprefix(prefix))


def _count(infos: Mapping[str, TensorInfo]) -> str:
    """Parameters and their types."""
    by_dtype: Counter = Counter()
    for info in infos.values():
        by_dtype[_short(info.dtype)] += math.prod(info.shape)
    types = ", ".join(name if len(by_dtype) == 1 else f"{name} {count:,}" for name, count in by_dtype.most_common())
    return f"{sum(by_dtype.values()):,} parameters in {len(infos)} tensors ({types})"


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _grouped(names) -> str:
    """Names shortened to their layer or module, with how many tensors each has."""
    groups = Counter(re.sub(r"(layers\.\d+|head|text_model)\..+|\.(weight|bias)$", r"\1", name) for name in names)
    return _some(f"{group} ({count})" for group, count in groups.items())


def _short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
