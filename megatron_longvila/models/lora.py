"""Low-rank adapters (LoRA) beside the decoder's attention projections: one for each of q, k, v and o, as PEFT has them.

An adapter adds `alpha / rank * B A x` to its projection. Megatron fuses q, k and v into one linear whose rows are grouped by key/value
head; the adapters stay three, and their B matrices are put into that order for one product per layer.

Tensor parallelism follows the base: for q, k and v, A is whole on every tp rank and B is split by heads; for o, A is split by heads and
B is whole. What crosses tp is always the product with A, `rank` numbers per row and adapter. Under sequence_parallel the whole matrices
see other rows on each tp rank, so they carry Megatron's mark that asks for the sum of their gradients over tp.

PEFT's own Megatron layer (0.21.2) was tried first. It stops with three errors on megatron-core 0.16 (two missing keys, a tuple taken for a
tensor); with these repaired it puts one adapter beside the fused q, k and v, which is no adapter of the Hugging Face model, its gradients
are wrong under sequence_parallel (on tp 2 off by 53% for A of q, k, v and by 100% for B of o, because nothing sums them over tp), and its
wrapper makes distributed checkpoints take each tp rank's half of linear_qkv for the whole.

Shapes: T rows (T / tp for a sequence-parallel input), D hidden size, R rank.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_longvila import platform
from megatron_longvila.config import LoraConfig
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import tensor_parallel  # isort: skip
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes  # isort: skip
from megatron.core.transformer.attention import SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip

_NAME = re.compile(r"(.*\.layers\.\d+\.self_attention\.)(linear_qkv|linear_proj)\.lora\.([qkvo])\.([AB])")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name, in any prefix, is that of an adapter's A or B."""
    return _NAME.fullmatch(name) is not None


def holds_adapters(folder: Path, saved: LoraConfig, built: LoraConfig) -> bool:
    """Whether the checkpoint `folder`, written with `saved`, holds the adapters of a model with `built`; False if it holds none.

    Raises:
        ValueError: it holds adapters that the model has no place for.
    """
    if not saved.rank or (saved.rank, saved.alpha, sorted(saved.targets)) == (built.rank, built.alpha, sorted(built.targets)):
        return bool(saved.rank)
    remedy = f"merge first with tools/merge_lora.py --checkpoint {folder} --output DIR and load DIR"
    if not built.rank:
        raise ValueError(
            f"checkpoint {folder} holds adapters of model.lora.rank={saved.rank}, which a model of model.lora.rank=0 would lose; {remedy}"
        )
    raise ValueError(
        f"checkpoint {folder} holds adapters of {saved}, the model has {built}; to go on with them set model.lora to the former, to start "
        f"fresh ones {remedy}"
    )


def initialize_adapter_(name: str, full: Tensor, generator: torch.Generator) -> None:
    """Fill a full A or B as PEFT does: A uniform with PyTorch's bound for linears (Kaiming, a = sqrt(5)), B zero."""
    if name.endswith(".B"):
        full.zero_()
    else:
        bound = 1 / math.sqrt(full.shape[1])
        full.uniform_(-bound, bound, generator=generator)


def adapt(attention: SelfAttentionSubmodules, lora: LoraConfig) -> None:
    """Replace the linears of an attention spec, Megatron's or Transformer Engine's, by subclasses that hold adapters as well.

    Names and sharding of the base parameters stay as they are.
    """
    for field, mixin, parts in (("linear_qkv", _QKVAdapters, "qkv"), ("linear_proj", _OutputAdapter, "o")):
        targets = [part for part in parts if part in lora.targets]
        if lora.rank and targets:
            base = getattr(attention, field)
            members = {"targets": targets, "rank": lora.rank, "scale": lora.alpha / lora.rank}
            setattr(attention, field, type(f"Adapted{base.__name__}", (mixin, base), members))


class Adapter(torch.nn.Module):
    """This tp rank's share of A [R, inputs] and B [outputs, R]."""

    def __init__(self, inputs: int, outputs: int, rank: int, split: dict[str, int], config: TransformerConfig):
        """
        Args:
            inputs: columns of A on this tp rank.
            outputs: rows of B on this tp rank.
            split: the one matrix that tp splits, and its dimension.
        """
        super().__init__()
        self.split = split
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            # Like the base weights: a value that neither models/init.py nor a checkpoint has replaced is loud.
            parameter = torch.nn.Parameter(torch.full(shape, float("nan"), device=platform.device(), dtype=config.params_dtype))
            if name in split:
                set_tensor_model_parallel_attributes(parameter, True, split[name], 1)
            else:
                parameter.sequence_parallel = config.sequence_parallel
            setattr(self, name, parameter)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(A, B). To be called, not read past it: with overlap_param_gather DDP waits for a module's weights when the module is called."""
        return self.A, self.B


class _Adapted:
    """What both kinds of adapted linear share; a mixin before the class of the base linear.

    Attributes:
        targets, rank, scale: set by `adapt` on the class it makes.
        lora: the adapters by the letter of their projection.
    """

    targets: list[str]
    rank: int
    scale: float

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The base linear's entries, with the adapters' split as they are (the base would take every other tensor for whole)."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, adapter in self.lora.items():
            state |= make_sharded_tensors_for_checkpoint(
                adapter.state_dict(keep_vars=True),
                f"{prefix}lora.{name}.",
                adapter.split,
                sharded_offsets,
                tp_group=self.lora_tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return state

    def _add(self, base: Tensor, low_rank: Tensor, weight: Tensor) -> Tensor:
        """base + scale * low_rank @ weight.T over the last dimension, rounded once."""
        return torch.addmm(base.flatten(0, -2), low_rank.flatten(0, -2), weight.t(), alpha=self.scale).view_as(base)


class _QKVAdapters(_Adapted):
    """The fused linear before attention with up to three adapters."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, tp_group, **kwargs):
        """Raises ValueError if tp cuts a key/value head's group."""
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        tp_size = tp_group.size()
        if config.num_query_groups % tp_size:
            raise ValueError(
                f"model.lora.rank={self.rank} needs model.llm.num_query_groups={config.num_query_groups} to be divisible by "
                f"parallel.tp_size={tp_size}, because adapters are split by whole key/value heads; lower tp_size"
            )
        self.lora_tp_group = tp_group
        self.num_groups = config.num_query_groups // tp_size
        queries = config.num_attention_heads // config.num_query_groups
        # Rows of each part in one group, in Megatron's order.
        self.group_rows = {"q": queries * config.kv_channels, "k": config.kv_channels, "v": config.kv_channels}
        self.lora = torch.nn.ModuleDict(
            {part: Adapter(input_size, self.num_groups * self.group_rows[part], self.rank, {"B": 0}, config) for part in self.targets}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T(/tp), 1, D] to ([T, 1, rows of this tp rank], bias that the caller adds)."""
        base, bias = super().forward(x)
        a_parts, b_parts = zip(*(self.lora[part]() for part in self.targets), strict=True)
        low_rank = F.linear(self._normed(x), torch.cat(a_parts))
        if self.config.sequence_parallel:
            low_rank = tensor_parallel.gather_from_sequence_parallel_region(low_rank, group=self.lora_tp_group)
        else:
            low_rank = tensor_parallel.copy_to_tensor_model_parallel_region(low_rank, group=self.lora_tp_group)
        return self._add(base, low_rank, self._grouped_b(b_parts)), bias

    def _normed(self, x: Tensor) -> Tensor:
        """What the base multiplies: Transformer Engine's linear contains the norm before it and does not hand its output out."""
        weight = getattr(self, "layer_norm_weight", None)
        return x if weight is None else F.rms_norm(x, weight.shape, weight, self.config.layernorm_epsilon)

    def _grouped_b(self, b_parts: tuple[Tensor, ...]) -> Tensor:
        """[rows of this tp rank, targets * R]: the B matrices with their rows in the base's order, each in its own columns."""
        parts, count = [], len(self.targets)
        for part, rows in self.group_rows.items():
            if part in self.targets:
                before = self.targets.index(part)
                columns = (before * self.rank, (count - 1 - before) * self.rank)
                parts.append(F.pad(b_parts[before].unflatten(0, (self.num_groups, rows)), columns))
            else:
                parts.append(self.weight.new_zeros(self.num_groups, rows, count * self.rank))
        return torch.cat(parts, dim=1).flatten(0, 1)


class _OutputAdapter(_Adapted):
    """The linear after attention with one adapter."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, tp_group, **kwargs):
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        self.lora_tp_group = tp_group
        self.lora = torch.nn.ModuleDict({"o": Adapter(input_size // tp_group.size(), output_size, self.rank, {"A": 1}, config)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, heads of this tp rank] to ([T(/tp), 1, D], bias that the caller adds)."""
        base, bias = super().forward(x)
        a, b = self.lora["o"]()
        partial_sum = F.linear(x, a)
        if self.config.sequence_parallel:
            low_rank = tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial_sum, group=self.lora_tp_group)
        else:
            low_rank = tensor_parallel.reduce_from_tensor_model_parallel_region(partial_sum, group=self.lora_tp_group)
        return self._add(base, low_rank, b), bias
