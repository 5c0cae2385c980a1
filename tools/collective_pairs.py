"""What peers and older schemes are built from: all-to-all of heads and all-gather of rows, each beside its adjoint.

The package needs none of them: its attention starts transfers and computes meanwhile. Shapes: T rows held by this rank, N heads, D anything
behind the rows, P ranks of the group. A rank may hold no row at all: it still takes part, in forward and in backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.parallel.collectives import start_gather_rows

# torch 2.13 renamed the operation and warns at every use of the old name, which is the only one torch 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _ExchangeBlocks(torch.autograd.Function):
    """All-to-all of P equal blocks. Adjoint: itself."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return _ExchangeBlocks.apply(grad_out, ctx.group), None


def exchange_blocks(x: Tensor, group: ProcessGroup) -> Tensor:
    """[P, ...] -> [P, ...]: block j goes to rank j of `group`, block i of the result came from rank i."""
    assert x.shape[0] == dist.get_world_size(group), (tuple(x.shape), dist.get_world_size(group))
    return x if x.shape[0] == 1 else _ExchangeBlocks.apply(x, group)


def sequence_to_heads(x_TNH: Tensor, group: ProcessGroup) -> Tensor:
    """[T, N, H] -> [P*T, N/P, H]: from all heads of this rank's rows to this rank's heads of all rows (rows of rank 0 first).

    Any number of dimensions may follow N. Adjoint: `heads_to_sequence`. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
    """
    size, num_rows, num_heads = dist.get_world_size(group), *x_TNH.shape[:2]
    assert num_heads % size == 0, f"{num_heads} heads over {size} ranks"
    by_rank = x_TNH.unflatten(1, (size, num_heads // size)).transpose(0, 1)  # [P, T, N/P, H]; packed by the one copy in exchange_blocks
    return exchange_blocks(by_rank, group).reshape(size * num_rows, num_heads // size, *x_TNH.shape[2:])


def heads_to_sequence(x_SNH: Tensor, group: ProcessGroup) -> Tensor:
    """[P*T, N, H] -> [T, P*N, H]: from this rank's heads of all rows to all heads of this rank's rows. Adjoint: `sequence_to_heads`."""
    size, num_rows, num_heads = dist.get_world_size(group), *x_SNH.shape[:2]
    assert num_rows % size == 0, f"{num_rows} rows over {size} ranks"
    by_head_group = exchange_blocks(x_SNH.unflatten(0, (size, num_rows // size)), group)  # [P, T, N, H]
    return by_head_group.transpose(0, 1).reshape(num_rows // size, size * num_heads, *x_SNH.shape[2:])


class _GatherRows(torch.autograd.Function):
    """All-gather of equal row blocks. Adjoint: reduce-scatter with sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return start_gather_rows(x, group).wait()

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return _ReduceScatterRows.apply(grad_out, ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    """Sum over the group, keep the own block of rows. Adjoint: all-gather."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return _GatherRows.apply(grad_out, ctx.group), None


def gather_rows(x_TD: Tensor, group: ProcessGroup) -> Tensor:
    """[T, D] -> [P*T, D], rows of rank 0 first; T equal on all ranks. Adjoint: `reduce_scatter_rows`."""
    return x_TD if dist.get_world_size(group) == 1 else _GatherRows.apply(x_TD, group)


def reduce_scatter_rows(x_SD: Tensor, group: ProcessGroup) -> Tensor:
    """[P*T, D] -> [T, D]: sum over the ranks of `group`, rank i keeps block i. Adjoint: `gather_rows`. Sums in the dtype of x."""
    size = dist.get_world_size(group)
    assert x_SD.shape[0] % size == 0, f"{x_SD.shape[0]} rows over {size} ranks"
    return x_SD if size == 1 else _ReduceScatterRows.apply(x_SD, group)
