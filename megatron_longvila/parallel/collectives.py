"""Collectives: the exchange of rows, which is its own adjoint, and transfers that autograd functions start and compute beside.

Shapes: T rows held by this rank, D anything behind the rows, P ranks of the group.
All tensors live on the device of the group's backend; any floating dtype. A rank may hold, send or receive no row at all: it still takes
part, in forward and in backward.

The rule for callers: whether an input requires a gradient must not differ between the ranks of a group. A rank whose input does not
require one skips the collective of the backward pass, and the other ranks then wait for it forever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed the operation and warns at every use of the old name, which is the only one torch 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of row blocks of any length. Adjoint: itself, with the counts swapped."""

    @staticmethod
    def forward(ctx, x: Tensor, send_counts: list[int], recv_counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.send_counts, ctx.recv_counts, ctx.group = send_counts, recv_counts, group
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), recv_counts, send_counts, group=group)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return _ExchangeRows.apply(grad_out, ctx.recv_counts, ctx.send_counts, ctx.group), None, None, None


def exchange_rows(x_TD: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send the first `send_counts[0]` rows to rank 0 of `group`, the next to rank 1, and so on.

    Returns [sum(recv_counts), D], rows from rank 0 first. Adjoint: itself with the counts swapped. The counts come from a plan that all
    ranks share: send_counts[j] here equals recv_counts[i] on rank j. Zeros are allowed anywhere.
    """
    size = dist.get_world_size(group)
    assert len(send_counts) == len(recv_counts) == size, (send_counts, recv_counts, size)
    assert sum(send_counts) == x_TD.shape[0], (send_counts, tuple(x_TD.shape))
    if size == 1:
        return x_TD
    return _ExchangeRows.apply(x_TD, list(send_counts), list(recv_counts), group)


class PendingRows:
    """Rows on their way. `wait` hands them over, once; on a GPU it makes the current stream wait, not the host."""

    def __init__(self, received: Tensor, sent: Tensor, works: list[dist.Work]):
        self._received, self._sent, self._works = received, sent, works  # `sent` must outlive the transfer

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        received = self._received
        self._works, self._sent, self._received = [], None, None
        return received


def start_gather_rows(x_TD: Tensor, group: ProcessGroup) -> PendingRows:
    """Begin an all-gather [T, D] -> [P*T, D]. Not differentiable: a building block for autograd functions that compute meanwhile."""
    x_TD = x_TD.contiguous()
    out = x_TD.new_empty(dist.get_world_size(group) * x_TD.shape[0], *x_TD.shape[1:])
    return PendingRows(out, x_TD, [_all_gather(out, x_TD, group=group, async_op=True)])


def start_exchange_blocks(x: Tensor, group: ProcessGroup, out: Tensor | None = None) -> PendingRows:
    """Begin an all-to-all of equal blocks [P, ...] -> [P, ...]: block j goes to rank j, block i of the result came from rank i.

    Not differentiable. `out`, contiguous and shaped like x, receives if it is given.
    """
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    return PendingRows(out, x, [dist.all_to_all_single(out, x, group=group, async_op=True)])


def ring_send_recv(x_TD: Tensor, group: ProcessGroup, *, step: int = 1, recv_rows: int | None = None, tag: int = 0) -> PendingRows:
    """Begin to send x to the rank `step` places on in `group`, and to receive rows of the same kind from the rank as many places back.

    Not differentiable. Transfers in flight together are started in the same order on all ranks (NCCL matches them by order) and carry
    different tags (gloo matches them by tag).

    Args:
        recv_rows: rows to receive, as many as are sent by default.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    x_TD = x_TD.contiguous()
    out = x_TD.new_empty(x_TD.shape[0] if recv_rows is None else recv_rows, *x_TD.shape[1:])
    to, source = (dist.get_global_rank(group, (rank + places) % size) for places in (step, -step))
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x_TD, to, group, tag), dist.P2POp(dist.irecv, out, source, group, tag)])
    return PendingRows(out, x_TD, works)
