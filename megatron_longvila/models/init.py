"""Weights that do not depend on the layout: global parameter names, slices of full tensors, and initialisation keyed by name.

A full tensor is one parameter as the one-rank model has it. Global names are those of the one-rank model with local (not Transformer
Engine's) layers, so decoder layers count through all pipeline stages.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_longvila.config import Config
from megatron_longvila.models.lora import initialize_adapter_, is_adapter
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip

# Transformer Engine fuses a norm into the linear that follows it, and distributed checkpoints use its names for both kinds.
_FUSED_NORMS = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r"pre_mlp_layernorm.\1"),
)


def unfused_name(name: str) -> str:
    """The name of a fused norm's parameter in a model with local layers; other names are returned as they are."""
    for pattern, replacement in _FUSED_NORMS:
        name = pattern.sub(replacement, name)
    return name


def global_parameters(model: Module) -> Iterator[tuple[str, Parameter]]:
    """(global name, parameter) of everything this rank holds of `model` (not wrapped in DDP).

    The last stage's copy of a tied embedding has the embedding's name.
    """
    prefixes = {
        f"{block_name}.layers.{index}.".lstrip("."): f"{block_name}.layers.{layer.layer_number - 1}.".lstrip(".")
        for block_name, block in model.named_modules()
        if isinstance(block, TransformerBlock)
        for index, layer in enumerate(block.layers)
    }
    for name, parameter in model.named_parameters():
        layer = re.match(r"(.*?\blayers\.\d+\.)", name)
        if layer:
            name = prefixes[layer[1]] + name.removeprefix(layer[1])
        if getattr(parameter, "shared", False):  # Megatron's mark of the copy
            name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        yield unfused_name(name), parameter


def full_shape(parameter: Parameter, tp_size: int) -> tuple[int, ...]:
    """Shape of the full tensor that `parameter` is a slice of."""
    shape = list(parameter.shape)
    if parameter.tensor_model_parallel:
        shape[parameter.partition_dim] *= tp_size
    return tuple(shape)


def shard_for_rank(name: str, full_tensor: Tensor, parameter: Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """The part of `full_tensor` that tp rank `tp_rank` holds, by the marks Megatron puts on `parameter`.

    A gated linear (gate rows above up rows) has a partition stride of 2: each rank gets a slice of the gate above a slice of the up
    projection. Query, key and value rows are already grouped by key/value head, so that a contiguous slice is whole groups.

    Raises:
        ValueError: the full tensor has another shape than the model expects.
    """
    expected = full_shape(parameter, tp_size)
    if tuple(full_tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(full_tensor.shape)}, the model expects {expected}; correct the model section")
    if not parameter.tensor_model_parallel or tp_size == 1:
        return full_tensor
    dim, stride = parameter.partition_dim, parameter.partition_stride
    return torch.cat(full_tensor.chunk(stride * tp_size, dim=dim)[tp_rank::tp_size], dim=dim)


def mark_parameters(model: Module) -> None:
    """Give every parameter Megatron's tensor-parallel marks; plain modules' (convolution, norms) count as whole on every tp rank."""
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


@torch.no_grad()
def initialize_weights(model: Module, config: Config, seed: int) -> None:
    """Fill every parameter: normal(0, model.init_std), the linears that end a residual branch divided by sqrt(2 * layers); norms 1;
    biases and the rows that pad the vocabulary 0; adapters as PEFT does.

    Each full tensor is drawn in fp32 on the parameter's device from a generator of (seed, global name) and then cut, so the model is
    the same on every mesh of one kind of device.
    """
    mark_parameters(model)
    tp_group = model.language_model.tp_group
    for name, parameter in global_parameters(model):
        full = initial_tensor(name, full_shape(parameter, tp_group.size()), config, seed, parameter.device)
        parameter.copy_(shard_for_rank(name, full, parameter, tp_group.rank(), tp_group.size()))


@torch.no_grad()
def initial_tensor(name: str, shape: tuple[int, ...], config: Config, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The full fp32 tensor that `initialize_weights` gives the parameter of this global name."""
    full = torch.zeros(shape, device=device)
    if name.endswith("bias"):
        return full
    if "norm" in name:
        return full.fill_(1.0)
    # One 32-bit hash of both: torch's CPU generator ignores the upper half of a 64-bit seed.
    generator = torch.Generator(device=full.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if is_adapter(name):
        initialize_adapter_(name, full, generator)
    else:
        full.normal_(0.0, _standard_deviation(name, config), generator=generator)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        full[config.model.llm.vocab_size :] = 0
    return full


def _standard_deviation(name: str, config: Config) -> float:
    if not re.search(r"layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight$", name):
        return config.model.init_std
    layers = config.model.llm.num_layers if name.startswith("language_model.") else config.model.vision.built_layers
    return config.model.init_std / math.sqrt(2 * layers)
