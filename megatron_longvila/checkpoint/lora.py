"""Adapters out of a checkpoint: merged into the weights they stand beside, or as a PEFT adapter for the decoder of Hugging Face.

Both read full tensors into the memory of one process, whatever mesh wrote them; optimizer state and data position stay behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_longvila import config_io
from megatron_longvila.checkpoint.hf import EXTRA_ROWS, Rule, adapter_rules, merge_qkv, rules
from megatron_longvila.checkpoint.origin import COMPLETE, IMPORTED, PASSENGERS, copy_travellers, hash_mark
from megatron_longvila.checkpoint.sharded import VERSION, find_damage, mark_complete, read_progress, write_text
from megatron_longvila.config import Config, LoraConfig
from megatron_longvila.models.init import unfused_name
from megatron_longvila.models.lora import is_adapter
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata  # isort: skip

MERGED_FROM = "merged_from.json"
_MODEL = ("vision_tower.", "projector.", "language_model.")
# What describes the state of the run and not of the weights; everything else beside the tensors goes along.
_LEFT = (COMPLETE, MERGED_FROM, "config.yaml", "common.pt", "metadata.json", ".metadata")
_TRAVELLERS = (PASSENGERS, IMPORTED)


@dataclass(frozen=True)
class Merged:
    """What `merge_lora` did.

    Attributes:
        written: False if the output was there already, complete and from the same input.
        num_merged: weights that got an adapter's product.
        num_tensors: tensors of the output.
        largest_change: largest absolute difference of an element of a merged weight.
    """

    written: bool
    num_merged: int = 0
    num_tensors: int = 0
    largest_change: float = 0.0


def merge_lora(checkpoint: Path, output: Path) -> Merged:
    """Write a checkpoint of weights alone whose decoder has the adapters of `checkpoint` in its weights; all other tensors are bit-equal.

    Each weight becomes W + alpha / rank * B A, computed in fp32 and rounded once to W's dtype. Config (with model.lora.rank 0),
    passengers and whatever else describes the weights go along. Needs torch.distributed with one rank.

    Raises:
        ValueError: `checkpoint` is not complete or has no adapters, or `output` is something else.
    """
    config = _open(checkpoint)
    source = {"mark": hash_mark(checkpoint)}
    if output.exists():
        done = output / MERGED_FROM
        if done.is_file() and json.loads(done.read_text()) == source and find_damage(output) is None:
            return Merged(written=False)
        raise ValueError(f"--output {output} exists and is not the merged {checkpoint}; choose another folder, or remove it")
    entries = _load(checkpoint, lambda name: name.startswith(_MODEL))
    state = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    before = {name: state[name] for name in _adapted_weights(config)}
    state |= {name: merged_weight(name, weight, state.__getitem__, config) for name, weight in before.items()}
    largest = max((state[name].float() - weight.float()).abs().max().item() for name, weight in before.items())
    entries = {name: state.get(name, entry) for name, entry in entries.items() if not is_adapter(name)}

    folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
    folder.mkdir(parents=True)
    _save(entries, folder, read_progress(checkpoint)["step"])
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (*_LEFT, *_TRAVELLERS) and path.suffix != ".distcp":
            shutil.copy(path, folder)
    copy_travellers(checkpoint, folder)
    config_io.save(_without_adapters(config), folder / "config.yaml")
    write_text(folder / MERGED_FROM, json.dumps(source) + "\n")
    mark_complete(folder)
    os.rename(folder, output)
    return Merged(True, len(before), len(state) - sum(map(is_adapter, state)), largest)


def export_peft(checkpoint: Path, output: Path) -> list[str]:
    """Write the adapters of `checkpoint` as PEFT's `adapter_model.safetensors` and `adapter_config.json`, for the decoder alone.

    Norms and embeddings of the decoder that the run trained next to the adapters (training.trainable) are in it as PEFT's
    `modules_to_save`. Loaded on the decoder the run began with, it then is the decoder of the checkpoint.

    Returns:
        The names written.

    Raises:
        ValueError: `checkpoint` is not complete or has no adapters; `output` exists; the run trained more of the decoder than PEFT can
            hold beside adapters.
    """
    config = _open(checkpoint)
    if output.exists():
        raise ValueError(f"--peft_output {output} exists; choose another folder, or remove it")
    _check_exportable(config)
    adapters, whole = adapter_rules(config), [rule for rule in rules(config) if _trained_whole(rule, config)]
    targets = {rule.target for rule in (*adapters, *whole)}
    state = {unfused_name(name): tensor for name, tensor in _load(checkpoint, lambda name: unfused_name(name) in targets).items()}
    tensors = {rule.sources[0]: state[rule.target] for rule in adapters}
    passengers = load_file(checkpoint / PASSENGERS) if (checkpoint / PASSENGERS).exists() else {}
    for rule in whole:
        (name,), (tensor,) = rule.sources, rule.split(state[rule.target])
        extra = passengers.get(name + EXTRA_ROWS)
        tensors[f"base_model.model.{name.removeprefix('llm.')}"] = tensor if extra is None else torch.cat([tensor, extra])
    lora = config.model.lora
    description = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha,
        "target_modules": [f"{part}_proj" for part in lora.targets],
        "modules_to_save": sorted({rule.sources[0].split(".")[-2] for rule in whole}) or None,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
        "base_model_name_or_path": None,
    }  # fmt: skip
    folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(description, indent=1) + "\n")
    os.rename(folder, output)
    return sorted(tensors)


def check_peft(checkpoint: Path) -> None:
    """Raises ValueError for a checkpoint that `export_peft` would refuse."""
    _check_exportable(_open(checkpoint))


def note_left_out(checkpoint: Path) -> list[str]:
    """A line for the user if the run trained parts beside the decoder, which an adapter of the decoder cannot hold."""
    trained = config_io.load(checkpoint / "config.yaml").training.trainable
    parts = [part for part in ("vision", "projector") if part in trained]
    if not parts:
        return []
    return [f"the run trained {' and '.join(parts)} too, which this adapter does not hold; export --merge-lora brings all of it out"]


def _open(checkpoint: Path) -> Config:
    """Configuration of a complete checkpoint with adapters."""
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(f"{checkpoint} cannot be used: {damage}")
    config = config_io.load(checkpoint / "config.yaml")
    if not config.model.lora.rank:
        raise ValueError(f"{checkpoint} has no adapters (model.lora.rank=0): its weights are the model; use them as they are")
    return config


def _load(checkpoint: Path, wants: Callable[[str], bool]) -> dict[str, Any]:
    """Full tensors, on the CPU, and Megatron's extra objects, of those names in the checkpoint that are wanted."""
    found = load_sharded_metadata(str(checkpoint))
    wanted = {name: entry for name, entry in found.items() if wants(name)}
    return {name: entry for name, entry in dist_checkpointing.load(wanted, str(checkpoint)).items() if name in wanted}


def _save(entries: dict[str, Any], folder: Path, step: int) -> None:
    sharded: dict[str, Any] = {}
    for name, entry in entries.items():
        if isinstance(entry, Tensor):
            sharded[name] = ShardedTensor.from_rank_offsets(name, entry)
        else:
            sharded[name] = ShardedObject.empty_from_unique_key(name)
            sharded[name].data = entry
    progress = {"version": VERSION, "step": step, "layout": {}, "optimizer_backend": ""}
    dist_checkpointing.save({"model": sharded, "progress": progress}, str(folder), ("torch_dist", 1))


def _adapted_weights(config: Config) -> list[str]:
    """Names of the base weights that have adapters."""
    fields = {"linear_proj" if part == "o" else "linear_qkv" for part in config.model.lora.targets}
    prefixes = [f"language_model.decoder.layers.{index}.self_attention" for index in range(config.model.llm.num_layers)]
    return [f"{prefix}.{field}.weight" for prefix in prefixes for field in sorted(fields)]


def adapted(name: str, config: Config) -> bool:
    """Whether the weight of this global name has adapters."""
    return name in _adapted_weights(config)


@torch.no_grad()
def merged_weight(name: str, weight: Tensor, read: Callable[[str], Tensor], config: Config) -> Tensor:
    """A full weight plus its adapters' product, in its own dtype; `read` gives the adapters by global name."""
    llm, lora, prefix = config.model.llm, config.model.lora, name.removesuffix("weight") + "lora"
    heads = {"q": llm.num_attention_heads, "k": llm.num_query_groups, "v": llm.num_query_groups}
    products = {
        part: read(f"{prefix}.{part}.B").float() @ read(f"{prefix}.{part}.A").float()
        for part in lora.targets
        if (part == "o") == ("linear_proj" in name)
    }
    if "o" not in products:
        parts = (products.get(part, torch.zeros(count * llm.head_dim, weight.shape[1])) for part, count in heads.items())
        products["o"] = merge_qkv(*parts, llm.num_query_groups)
    return (weight.float() + lora.alpha / lora.rank * products["o"]).to(weight.dtype)


def _without_adapters(config: Config) -> Config:
    """The configuration of the merged model: what trained the adapters trains the decoder."""
    trainable = [part for part in config.training.trainable if part != "lora"] or ["llm"]
    model = replace(config.model, lora=LoraConfig())
    return replace(config, model=model, training=replace(config.training, trainable=trainable))


def _trained_whole(rule: Rule, config: Config) -> bool:
    """Whether a rule is that of a norm or embedding that trained next to the adapters."""
    trained = config.training.trainable
    norm, table = rule.sources[0].endswith("norm.weight"), rule.sources[0].endswith(("embed_tokens.weight", "lm_head.weight"))
    return rule.sources[0].startswith("llm.") and (norm and "llm_norms" in trained or table and "llm_embeddings" in trained)


def _check_exportable(config: Config) -> None:
    """Raises ValueError for trained weights that PEFT cannot hold beside adapters."""
    trained = config.training.trainable
    if "llm" in trained:
        raise ValueError(
            f"training.trainable={trained} names llm: the weights under the adapters trained as well, and a PEFT adapter cannot hold them; "
            "merge with --output instead"
        )
    if "llm_embeddings" in trained and config.model.llm.tie_embeddings:
        raise ValueError(
            f"training.trainable={trained} names llm_embeddings, and model.llm.tie_embeddings=true ties them to the output layer, which "
            "PEFT would untie; merge with --output instead"
        )
