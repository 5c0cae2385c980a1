"""The ring axis: causal attention of one ring share, whose keys and values lie on all ranks of the ring.

A share holds, sample after sample, chunk r and chunk 2R-1-r of the sample's 2R chunks, so every rank has the same work. Its queries meet
  - its own rows: one causal block (the two chunks are in order, so the plain triangle is right);
  - chunk j of every rank j < r: all of it lies before both own chunks, one rectangle for all rows;
  - both chunks of every rank j > r: they lie between the two own chunks, one rectangle for the second half of the rows.
Blocks are merged by their LSE. Backward runs over the same blocks with the merged output and LSE, so that gradients add up; sums are fp32.
Source: zigzag ring attention (ring-flash-attention) and Llama 3's all-gather of keys and values (arXiv 2407.21783, section 3.3.2).

Shapes: R ranks, S rows of a share, N query heads, K key/value heads, H head dim; KV is [S, 2K, H], keys before values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.attention.backends import Backend
from megatron_longvila.kernels.reference import accumulation_dtype, merge_blocks
from megatron_longvila.parallel.collectives import reduce_scatter_rows, ring_send_recv, start_gather_rows
from megatron_longvila.parallel.plan import SequenceLayout, share_order

TRANSPORTS = ("all_gather", "p2p")
_KV_TAG, _GRAD_TAG = 1, 2


@dataclass(frozen=True)
class RingCall:
    """What one attention call needs besides its tensors; equal on all ranks but for `rank`.

    Attributes:
        rank: place in the ring; group: the ring's process group, unused if layout.ring_size is 1.
        transport: `all_gather` (fast inside a host) or `p2p` (the next block travels while the current one is computed; across hosts).
    """

    layout: SequenceLayout
    rank: int
    group: ProcessGroup | None
    transport: str
    backend: Backend
    scale: float


@dataclass(frozen=True, eq=False)
class Block:
    """Queries `q` (rows of the share) that see every key of `k` (rows of some buffer), or the keys up to their own with `causal`."""

    q: slice
    k: slice
    causal: bool = False


@lru_cache(maxsize=64)
def own_blocks(layout: SequenceLayout) -> tuple[Block, ...]:
    """One causal block per sample, on the share's own rows; together they cover every row once."""
    return tuple(Block(rows, rows, causal=True) for rows, _ in _samples(layout))


@lru_cache(maxsize=64)
def gathered_blocks(layout: SequenceLayout, rank: int) -> tuple[Block, ...]:
    """Rectangles against the other ranks' keys; `k` counts rows of the padded pack, where each rectangle's chunks are neighbours."""
    blocks = []
    for rows, chunk in _samples(layout):
        start = rows.start * layout.ring_size
        if rank > 0:
            blocks.append(Block(rows, slice(start, start + rank * chunk)))
        if rank < layout.ring_size - 1:
            between = slice(start + (rank + 1) * chunk, start + (2 * layout.ring_size - 1 - rank) * chunk)
            blocks.append(Block(slice(rows.start + chunk, rows.stop), between))
    return tuple(blocks)


@lru_cache(maxsize=256)
def visiting_blocks(layout: SequenceLayout, rank: int, source: int) -> tuple[Block, ...]:
    """Rectangles against the share of rank `source`; `k` counts rows of that share."""
    if source < rank:
        return tuple(Block(rows, slice(rows.start, rows.start + chunk)) for rows, chunk in _samples(layout))
    return tuple(Block(slice(rows.start + chunk, rows.stop), rows) for rows, chunk in _samples(layout))


def _samples(layout: SequenceLayout) -> Iterator[tuple[slice, int]]:
    """Each sample's rows in a share, and its chunk length."""
    start = 0
    for length in layout.share_sample_lengths:
        yield slice(start, start + length), length // 2
        start += length


@lru_cache(maxsize=16)
def gathered_row(layout: SequenceLayout, device: torch.device) -> Tensor:
    """Where each row of the padded pack lies among the gathered shares. int64 [total_rows]."""
    order = np.concatenate([share_order(layout, rank) for rank in range(layout.ring_size)])
    return torch.from_numpy(np.argsort(order)).to(device)


def ring_attention(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, call: RingCall) -> Tensor:
    """Causal attention within each sample over the whole ring; rows laid out as `call.layout` says. Returns out_SNH, differentiable.

    Every rank of the ring must call it with its own share. Collectives per call: none for R = 1; with `all_gather` one gather in forward,
    one gather and one reduce-scatter in backward; with `p2p` R-1 transfers in forward, 2(R-1) in backward.
    """
    assert q_SNH.shape[0] == call.layout.share_rows, (tuple(q_SNH.shape), call.layout)
    return _RingAttention.apply(q_SNH, k_SKH, v_SKH, call)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, call: RingCall) -> Tensor:
        if call.layout.ring_size == 1:
            out, lse = _attend_own(q, k, v, call, q.dtype)
        else:
            forward = {"all_gather": _forward_all_gather, "p2p": _forward_p2p}[call.transport]
            out, lse = forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()  # a summed loss sends an expanded scalar, which kernels cannot read
        if ctx.call.layout.ring_size == 1:
            grads = _backward_own(grad_out, q, k, v, out, lse, ctx.call, q.dtype)
        else:
            backward = {"all_gather": _backward_all_gather, "p2p": _backward_p2p}[ctx.call.transport]
            grads = backward(grad_out, q, k, v, out, lse, ctx.call)
        return *(grad.to(q.dtype) for grad in grads), None


def _attend_own(q: Tensor, k: Tensor, v: Tensor, call: RingCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The causal blocks on the share's own rows. Returns (out in `dtype`, lse)."""
    blocks = own_blocks(call.layout)
    if len(blocks) == 1:
        out, lse = call.backend.forward(q, k, v, causal=True, scale=call.scale)
        return out.to(dtype), lse
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype)).t()  # rows contiguous, as kernels want it
    for block in blocks:
        out[block.q], lse[block.q] = call.backend.forward(q[block.q], k[block.k], v[block.k], causal=True, scale=call.scale)
    return out, lse


def _backward_own(grad_out, q, k, v, out, lse, call: RingCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend_own` in `dtype`, given the merged out and lse. Returns (dq, dk, dv)."""
    blocks = own_blocks(call.layout)
    if len(blocks) == 1:
        return tuple(x.to(dtype) for x in call.backend.backward(grad_out, q, k, v, out, lse, causal=True, scale=call.scale))
    dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v))
    for block in blocks:
        rows = block.q
        dq[rows], dk[rows], dv[rows] = call.backend.backward(
            grad_out[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], causal=True, scale=call.scale
        )
    return dq, dk, dv


class _Forward:
    """A running softmax over the blocks of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: RingCall):
        self.q, self.call = q, call
        self.out, self.lse = _attend_own(q, k, v, call, accumulation_dtype(q.dtype))

    def add(self, block: Block, kv: Tensor) -> None:
        """Fold in one rectangle; `kv` holds exactly its keys and values."""
        k, v = kv.chunk(2, dim=1)
        out, lse = self.call.backend.forward(self.q[block.q], k, v, causal=False, scale=self.call.scale)
        self.out[block.q], self.lse[block.q] = merge_blocks(self.out[block.q], self.lse[block.q], out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out in the dtype of q, lse)."""
        return self.out.to(self.q.dtype), self.lse


class _Backward:
    """Gradients of the own rows, summed over the blocks of one call."""

    def __init__(self, grad_out, q, k, v, out, lse, call: RingCall):
        self.rows, self.call = (grad_out, q, out, lse), call
        self.dq, self.dk, self.dv = _backward_own(grad_out, q, k, v, out, lse, call, accumulation_dtype(q.dtype))

    def add(self, block: Block, kv: Tensor) -> Tensor:
        """Add one rectangle's part to dq; returns its part of dKV, [rows of kv, 2K, H] in the accumulation dtype."""
        grad_out, q, out, lse = (x[block.q] for x in self.rows)
        dq, dk, dv = self.call.backend.backward(grad_out, q, *kv.chunk(2, dim=1), out, lse, causal=False, scale=self.call.scale)
        self.dq[block.q] += dq
        return torch.cat((dk, dv), dim=1).to(self.dq.dtype)

    def result(self, dkv_from_others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv); `dkv_from_others` is what the other ranks' queries gave to the own keys and values."""
        dk, dv = dkv_from_others.chunk(2, dim=1)
        return self.dq, self.dk + dk, self.dv + dv


def _forward_all_gather(q: Tensor, k: Tensor, v: Tensor, call: RingCall) -> tuple[Tensor, Tensor]:
    gathering = start_gather_rows(torch.cat((k, v), dim=1), call.group)
    forward = _Forward(q, k, v, call)  # while keys and values travel
    kv, row = gathering.wait(), gathered_row(call.layout, q.device)
    for block in gathered_blocks(call.layout, call.rank):
        forward.add(block, kv.index_select(0, row[block.k]))
    return forward.result()


def _backward_all_gather(grad_out, q, k, v, out, lse, call: RingCall) -> tuple[Tensor, Tensor, Tensor]:
    gathering = start_gather_rows(torch.cat((k, v), dim=1), call.group)
    backward = _Backward(grad_out, q, k, v, out, lse, call)
    kv, row = gathering.wait(), gathered_row(call.layout, q.device)
    dkv = kv.new_zeros(kv.shape, dtype=backward.dq.dtype)
    for block in gathered_blocks(call.layout, call.rank):
        rows = row[block.k]
        dkv.index_copy_(0, rows, backward.add(block, kv.index_select(0, rows)))  # no two blocks share a key
    return backward.result(reduce_scatter_rows(dkv, call.group))


def _forward_p2p(q: Tensor, k: Tensor, v: Tensor, call: RingCall) -> tuple[Tensor, Tensor]:
    ring_size = call.layout.ring_size
    travelling = ring_send_recv(torch.cat((k, v), dim=1), call.group, tag=_KV_TAG)
    forward = _Forward(q, k, v, call)
    for step in range(1, ring_size):
        kv = travelling.wait()
        if step < ring_size - 1:
            travelling = ring_send_recv(kv, call.group, tag=_KV_TAG)
        for block in visiting_blocks(call.layout, call.rank, (call.rank - step) % ring_size):
            forward.add(block, kv[block.k])
    return forward.result()


def _backward_p2p(grad_out, q, k, v, out, lse, call: RingCall) -> tuple[Tensor, Tensor, Tensor]:
    """dKV follows its keys and values around the ring, one step behind, and comes home with the last transfer."""
    ring_size = call.layout.ring_size
    travelling = ring_send_recv(torch.cat((k, v), dim=1), call.group, tag=_KV_TAG)
    backward = _Backward(grad_out, q, k, v, out, lse, call)
    returning = None
    for step in range(1, ring_size):
        kv = travelling.wait()
        if step < ring_size - 1:
            travelling = ring_send_recv(kv, call.group, tag=_KV_TAG)
        dkv = kv.new_zeros(kv.shape, dtype=backward.dq.dtype)
        for block in visiting_blocks(call.layout, call.rank, (call.rank - step) % ring_size):
            dkv[block.k] = backward.add(block, kv[block.k])
        if returning is not None:
            dkv += returning.wait()
        returning = ring_send_recv(dkv, call.group, tag=_GRAD_TAG)
    return backward.result(returning.wait())
