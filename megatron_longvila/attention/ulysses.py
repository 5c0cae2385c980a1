"""The ulysses axis: one all-to-all turns a piece of the sequence with all heads into the whole ring share with a group of heads.

Whole GQA groups travel, so keys and values are never repeated. Source: DeepSpeed-Ulysses (arXiv 2309.14509).

Shapes: U ranks, T rows of this cp rank, N query and K key/value heads of this tensor-parallel rank, M = (N + 2K) / U, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_heads(tensors: Sequence[Tensor], ulysses_size: int) -> Tensor:
    """[T, heads, H] each -> the send buffer [U, T, M, H]: block u holds the u-th group of heads of every tensor, one tensor after another.

    One copy, and one in backward. `kernels.pack_qkv` writes the same from the projection's output, with bias and rotary.
    """
    return _PackHeads.apply(ulysses_size, *tensors)


def head_counts(packed_UTMH: Tensor, num_queries_per_key: int) -> tuple[int, int]:
    """(query heads, key heads) of a send buffer."""
    num_keys = packed_UTMH.shape[2] // (num_queries_per_key + 2)
    return num_keys * num_queries_per_key, num_keys


class _PackHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ulysses_size: int, *tensors: Tensor) -> Tensor:
        ctx.widths = [x.shape[1] // ulysses_size for x in tensors]
        num_rows, _, head_dim = tensors[0].shape
        packed = tensors[0].new_empty(ulysses_size, num_rows, sum(ctx.widths), head_dim)
        for part, x in zip(packed.split(ctx.widths, dim=2), tensors, strict=True):
            part.copy_(x.unflatten(1, (ulysses_size, -1)).transpose(0, 1))
        return packed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return None, *(part.transpose(0, 1).flatten(1, 2) for part in grad.split(ctx.widths, dim=2))
