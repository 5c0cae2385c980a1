"""The ulysses axis: one all-to-all turns a piece of the sequence with all heads into the whole ring share with a group of heads.

Whole GQA groups travel, so keys and values are never repeated. Long sequences travel in parts, groups of each rank's key/value heads with
their queries: one part is on its way while attention computes another. Source: DeepSpeed-Ulysses (arXiv 2309.14509).

Shapes: U ranks, P parts, T rows of this cp rank, N query and K key/value heads of this tensor-parallel rank, M = (N + 2K) / (U * P), H head
dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_longvila.parallel.plan import SequenceLayout

# A part is worth its kernel calls if each still keeps a GPU busy: rows of a sample times query heads of one call, at least.
PART_WORK = 3 << 16
MAX_PARTS = 2  # four parts take 3% longer than two on 2 H200, 32/8 heads, 32K tokens


def num_parts(layout: SequenceLayout, num_heads: int, num_kv_heads: int) -> int:
    """How many parts each rank's heads travel in; the same on all ranks. One with a ring, whose own transfers the rows of a rank hide."""
    if layout.ulysses_size == 1 or layout.ring_size > 1:
        return 1
    rows = sum(length**2 for length in layout.sample_lengths) // layout.total_rows  # of the sample that a typical score is in
    work = rows * num_heads // layout.ulysses_size
    num_keys = num_kv_heads // layout.ulysses_size
    return max(parts for parts in range(1, MAX_PARTS + 1) if parts == 1 or (num_keys % parts == 0 and work >= parts * PART_WORK))


def pack_heads(tensors: Sequence[Tensor], ulysses_size: int, parts: int = 1) -> Tensor:
    """[T, heads, H] each -> the send buffers [P, U, T, M, H]: block u of part p holds the p-th part of the u-th group of heads of every
    tensor, one tensor after another.

    One copy, and one in backward. `kernels.pack_qkv` writes the same from the projection's output, with bias and rotary.
    """
    return _PackHeads.apply(ulysses_size, parts, *tensors)


def head_counts(packed_PUTMH: Tensor, num_queries_per_key: int) -> tuple[int, int]:
    """(query heads, key heads) of one block of a send buffer."""
    num_keys = packed_PUTMH.shape[3] // (num_queries_per_key + 2)
    return num_keys * num_queries_per_key, num_keys


class _PackHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ulysses_size: int, parts: int, *tensors: Tensor) -> Tensor:
        ctx.widths = [x.shape[1] // (ulysses_size * parts) for x in tensors]
        num_rows, _, head_dim = tensors[0].shape
        packed = tensors[0].new_empty(parts, ulysses_size, num_rows, sum(ctx.widths), head_dim)
        for target, x in zip(packed.split(ctx.widths, dim=3), tensors, strict=True):
            target.copy_(x.unflatten(1, (ulysses_size, parts, -1)).permute(2, 1, 0, 3, 4))
        return packed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, *(part.permute(2, 1, 0, 3, 4).flatten(1, 3) for part in grad.split(ctx.widths, dim=3))
