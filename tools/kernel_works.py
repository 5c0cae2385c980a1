"""What benchmark_kernels times: each operation with its inputs, the values it has to move, and what its peers call for the same work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.kernels.choice import REFERENCE, Kernels
from megatron_longvila.training.loss import cross_entropy

from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl  # isort: skip
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy  # isort: skip
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd  # isort: skip


@dataclass
class Work:
    """One operation at one size.

    Attributes:
        inputs: floating inputs of `function` get gradients unless listed in `constants`.
        function: (kernels, *inputs) -> result, differentiable if `differentiable`.
        values: how many values of the activations' dtype forward has to move, and backward.
        peers: other implementations, (*inputs) -> result.
    """

    inputs: tuple[Tensor, ...]
    function: Callable
    values: tuple[int, int]
    constants: tuple[int, ...] = ()
    differentiable: bool = True
    peers: dict[str, Callable] = field(default_factory=dict)


class Works:
    """Builders of the operations, one method each, at given sizes."""

    def __init__(self, sizes: argparse.Namespace, dtype: torch.dtype, device: torch.device):
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.heads = tuple(map(int, sizes.heads.split("/")))  # of queries, of keys and values

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, in the dtype under test unless another is given."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def pack_qkv(self) -> Work:
        (num_heads, num_kv_heads), rows, head_dim = self.heads, self.sizes.rows, self.sizes.head_dim
        width, size = (num_heads + 2 * num_kv_heads) * head_dim, self.sizes.ulysses_size
        angles = self.normal(rows, head_dim // 2, dtype=torch.float32)
        table = torch.cat((angles.cos(), angles.sin()), dim=1)
        inputs = self.normal(rows, width), self.normal(width), table
        both = torch.cat((angles, angles), dim=1)[:, None, None]
        return Work(
            inputs,
            lambda kernels, *x: kernels.pack_qkv(*x, num_kv_heads, size),
            (2 * rows * width, 2 * rows * width),
            constants=(2,),
            peers={"Megatron-Core": lambda qkv, bias, _: _megatron_pack(qkv, bias, both, num_kv_heads, size)},
        )

    def swap_into(self) -> Work:
        size, rows, num_heads, head_dim = self.sizes.ulysses_size, self.sizes.rows, self.heads[0], self.sizes.head_dim
        x = self.normal(size, rows, num_heads // size, head_dim)
        out = x.new_empty(rows, size, num_heads // size, head_dim)

        def function(kernels: Kernels, x: Tensor) -> Tensor:
            kernels.swap_into(out, x)
            return out

        return Work((x,), function, (2 * x.numel(), 0), differentiable=False)

    def merge_into(self) -> Work:
        shape = rows, num_heads, _ = self.sizes.rows, self.heads[0], self.sizes.head_dim
        lse, block_lse = (self.normal(num_heads, rows, dtype=torch.float32).t() for _ in range(2))
        out, block_out = self.normal(*shape, dtype=torch.float32), self.normal(*shape)
        per_value = 4 // out.new_empty(0, dtype=self.dtype).element_size()  # fp32 sums, read and written

        def merge(kernels: Kernels, *x: Tensor) -> Tensor:
            kernels.merge_into(*x)
            return x[0]

        return Work((out, lse, block_out, block_lse), merge, ((2 * per_value + 1) * out.numel(), 0), differentiable=False)

    def take_rows(self) -> Work:
        inputs = self.normal(self.sizes.rows, self.sizes.hidden_size), torch.randperm(self.sizes.rows, device=self.device)
        return Work(inputs, lambda kernels, *x: kernels.take_rows(*x), (2 * inputs[0].numel(),) * 2)

    def place_rows(self) -> Work:
        rows = self.sizes.rows
        index = torch.randperm(rows, device=self.device)[: rows * 3 // 4]
        inputs = self.normal(rows, self.sizes.hidden_size), self.normal(len(index), self.sizes.hidden_size), index
        # forward reads what it keeps and what it places; backward writes both gradients
        return Work(inputs, lambda kernels, *x: kernels.place_rows(*x), (2 * inputs[0].numel(), 2 * inputs[0].numel() + inputs[1].numel()))

    def rms_norm(self) -> Work:
        x, weight = self.normal(self.sizes.rows, 1, self.sizes.hidden_size), self.normal(self.sizes.hidden_size)
        peers = {"Transformer Engine": _te_norm("RMSNorm", weight)} if _has_te() else {}
        return Work((x, weight), lambda kernels, *x: kernels.rms_norm(*x, 1e-6), (2 * x.numel(), 3 * x.numel()), peers=peers)

    def layer_norm(self) -> Work:
        """Of the vision tower's width."""
        width = self.sizes.vision_hidden_size
        x, weight, bias = self.normal(self.sizes.rows, 1, width), self.normal(width), self.normal(width)
        peers = {"Transformer Engine": _te_norm("LayerNorm", weight)} if _has_te() else {}
        return Work((x, weight, bias), lambda kernels, *x: kernels.layer_norm(*x, 1e-6), (2 * x.numel(), 3 * x.numel()), peers=peers)

    def swiglu(self) -> Work:
        x = self.normal(self.sizes.rows, 1, 2 * self.sizes.ffn_hidden_size)
        # Megatron's fused functions are compiled ones: tens of seconds on a CPU.
        peers = {} if platform.is_cpu() else {"Megatron-Core fused": lambda x: bias_swiglu_impl(x, None, False, False)}
        if _has_te():
            peers["Transformer Engine"] = _te_swiglu()
        values = (x.numel() * 3 // 2, x.numel() * 5 // 2)
        return Work((x,), lambda kernels, x: kernels.swiglu(x), values, peers=peers)

    def cross_entropy(self) -> Work:
        logits = self.normal(self.sizes.loss_rows, self.sizes.vocab_size)
        labels = torch.randint(0, self.sizes.vocab_size, (self.sizes.loss_rows,), device=self.device)

        def losses(kernels: Kernels, logits: Tensor, labels: Tensor) -> Tensor:
            if kernels is REFERENCE:
                return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            return cross_entropy(logits, labels, kernels)

        group = torch.distributed.group.WORLD
        peers = {"Megatron-Core": lambda logits, labels: cross_entropy(logits, labels, REFERENCE)}
        if not platform.is_cpu():
            peers["Megatron-Core fused"] = lambda logits, labels: fused_vocab_parallel_cross_entropy(
                logits[:, None], labels[:, None], group
            )
        if _has_te():
            peers["Transformer Engine"] = _te_cross_entropy
        return Work((logits, labels), losses, (logits.numel(), 2 * logits.numel()), peers=peers)


WORKS = ("pack_qkv", "swap_into", "merge_into", "take_rows", "place_rows", "rms_norm", "layer_norm", "swiglu", "cross_entropy")


def _megatron_pack(qkv: Tensor, bias: Tensor, angles: Tensor, num_kv_heads: int, size: int) -> Tensor:
    """Bias, Megatron's rotary of queries and keys, one copy into the send buffer: a pass for each."""
    x = (qkv + bias).unflatten(1, (num_kv_heads, -1, angles.shape[-1]))
    queries, keys, values = x[:, :, :-2].flatten(1, 2), x[:, :, -2], x[:, :, -1]
    rotated = [_apply_rotary_pos_emb_bshd(part[:, None], angles).squeeze(1) for part in (queries, keys)]
    return torch.cat([part.unflatten(1, (size, -1)).transpose(0, 1) for part in (*rotated, values)], dim=2)


def _has_te() -> bool:
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def _te_norm(name: str, weight: Tensor) -> Callable:
    import transformer_engine.pytorch

    norm = getattr(transformer_engine.pytorch, name)(weight.shape[0], eps=1e-6, device=weight.device, dtype=weight.dtype)
    return lambda x, *_: norm(x)  # its own parameters: their gradients are computed all the same


def _te_swiglu() -> Callable:
    from transformer_engine.pytorch.ops import SwiGLU

    return SwiGLU()


def _te_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits[:, None], labels[:, None], 0.0, False, None)
