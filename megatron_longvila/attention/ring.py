"""The ring axis: causal attention of one ring share, whose keys and values lie on all ranks of the ring.

A share holds, sample after sample, chunk r and chunk 2R-1-r of the sample's 2R chunks, so every rank has the same work. Its queries meet
  - its own rows: one causal block (the two chunks are in order, so the plain triangle is right);
  - chunk j of every rank j < r: all of it lies before both own chunks, one rectangle for all rows;
  - both chunks of every rank j > r: they lie between the two own chunks, one rectangle for the second half of the rows.
Blocks are merged by their LSE. Backward runs over the same blocks with the merged output and LSE, so that gradients add up; sums are fp32.

Keys and values of the other ranks travel while the own rows are computed, and what was received is kept for backward: only gradients
travel there, and they do so while the own rows are computed. No key gets gradients from two blocks of one rank, so the parts of dK and dV
are sent in the dtype the kernel wrote, without loss, and added in fp32 by the rank that owns the rows. Between hosts, groups of heads
travel one after the other, so that the first are computed with, and their gradients return, while the others are still on their way.
The sums of grad_out * out over a row's heads (delta), which every block of the row needs, are not handed on: the kernels take none and make
them again in each call, a pass over two of the six tensors that a block reads.
Source: zigzag ring attention (ring-flash-attention) and Llama 3's all-gather of keys and values (arXiv 2407.21783, section 3.3.2).

Shapes: R ranks, S rows of a share, N query heads, K key/value heads, H head dim; KV is [S, 2K, H], keys before values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.attention.backends import Backend
from megatron_longvila.attention.blocks import (
    Block,
    Rows,
    Scattered,
    add,
    fits_as_gathered,
    gathered_blocks,
    gathered_row,
    num_sent,
    own_blocks,
    pack_row,
    put,
    sent_rows,
    take,
    visiting_blocks,
)
from megatron_longvila.kernels.choice import REFERENCE, Kernels
from megatron_longvila.kernels.reference import accumulation_dtype
from megatron_longvila.parallel.collectives import PendingRows, ring_send_recv, start_exchange_blocks, start_gather_rows
from megatron_longvila.parallel.plan import SequenceLayout

TRANSPORTS = ("all_gather", "p2p")
# Of one rank's keys and values with `p2p` between hosts, if there are as many key/value heads; fewer for packs, whose blocks are small.
# Inside a host the own rows hide a whole transfer, and larger blocks are faster.
HEAD_GROUPS = 4
LONG_RING = 4  # ranks from which one fp32 sum of dQ takes less memory than the parts of it in the dtype that kernels write


@dataclass(frozen=True)
class RingCall:
    """What one attention call needs besides its tensors; equal on all ranks but for `rank`.

    Attributes:
        rank: place in the ring; group: the ring's process group, unused if layout.ring_size is 1.
        transport: `all_gather` (one transfer, few large blocks; inside a host) or `p2p` (one transfer per other rank, each computed with
            while the next ones travel, and only rows that are looked at; across hosts).
        kernels: merge blocks and unpack heads.
        crosses_hosts: whether the ring's ranks are on several hosts.
    """

    layout: SequenceLayout
    rank: int
    group: ProcessGroup | None
    transport: str
    backend: Backend
    scale: float
    kernels: Kernels = REFERENCE
    crosses_hosts: bool = False


def attend(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, call: RingCall) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Causal attention within each sample over the whole ring; rows laid out as `call.layout` says. Not differentiable: see `gradients`.

    Every rank of the ring must call it with its own share. Collectives: none for R = 1, one gather with `all_gather`, R-1 exchanges between
    pairs for each group of heads with `p2p`.

    Returns:
        (out_SNH, lse_SN, the keys and values received from other ranks, which `gradients` wants back).
    """
    assert q_SNH.shape[0] == call.layout.share_rows, (tuple(q_SNH.shape), call.layout)
    visits = visits_of(call, k_SKH.shape[1], call.backend.forward_tile, _short(q_SNH, call))
    arriving = _send_kv(k_SKH, v_SKH, visits, call)
    running = _Softmax(q_SNH, k_SKH, v_SKH, call)  # while keys and values travel
    kept = []
    for kv, visit in zip(arriving, visits, strict=True):
        for block in visit.blocks:
            running.add(block, *take(kv, block.k).chunk(2, dim=1), visit.query_heads(q_SNH, k_SKH))
        kept.append(kv)
    return *running.result(), kept


def gradients(
    grad_out: Tensor, saved: tuple[Tensor, ...], kept: list[Tensor], call: RingCall, packed: bool = False
) -> tuple[Tensor, ...] | Tensor:
    """Gradients of `attend`.

    Args:
        saved: (q, k, v, out, lse) of the forward call; kept: what it received.
        packed: return one tensor, as the ulysses all-to-all sends it.

    Collectives: none for R = 1, one all-to-all with `all_gather`, R-1 exchanges between pairs for each group of heads with `p2p`.

    Returns:
        (dq_SNH, dk_SKH, dv_SKH) in the dtype of q; with `packed` these side by side, [S, N + 2K, H].
    """
    q, k, v = saved[:3]
    if call.layout.ring_size == 1:
        return _own_gradients(grad_out, saved, call, packed)
    visits, dtype = visits_of(call, k.shape[1], short=_short(q, call)), accumulation_dtype(q.dtype)
    dq_parts, returning = [], []
    dq = q.new_zeros(q.shape, dtype=dtype) if call.transport == "p2p" and call.layout.ring_size >= LONG_RING else None
    for kv, visit in zip(kept, visits, strict=True):
        returning.append(_send_dkv(_visit_gradients(grad_out, saved, kv, visit, call, dq_parts), visit, call))
        if dq is not None:
            _add_parts(dq, dq_parts)
    own_dq, *own_dkv = _own_gradients(grad_out, saved, call)  # while gradients travel
    dq = own_dq.to(dtype) if dq is None else dq.add_(own_dq)
    dk, dv = (x.to(dtype) for x in own_dkv)
    del own_dq, own_dkv
    _add_parts(dq, dq_parts)
    for visit, pending in zip(visits, returning, strict=True):
        _add_dkv((dk[:, visit.kv_heads], dv[:, visit.kv_heads]), pending.wait(), visit, call)
    result, parts = _room(q, k, packed)
    for part, grad in zip(parts, (dq, dk, dv), strict=True):
        part.copy_(grad)
    return result


@dataclass(frozen=True, eq=False)
class Visit:
    """Keys and values that arrive in one transfer: the key/value heads, the blocks they are in, and from how many ranks back they came."""

    kv_heads: slice
    blocks: tuple[Block, ...]
    step: int
    tag: int

    def query_heads(self, q: Tensor, k: Tensor) -> slice:
        """The query heads that look at these key/value heads."""
        group = q.shape[1] // k.shape[1]
        return slice(self.kv_heads.start * group, self.kv_heads.stop * group)


def visits_of(call: RingCall, num_kv_heads: int, tile: int | None = None, short: int = 0) -> tuple[Visit, ...]:
    """Every transfer to this rank, in the order of arrival. `tile` and `short`: as in `own_blocks`."""
    groups = HEAD_GROUPS if call.crosses_hosts else 1
    return _planned_visits(call.layout, call.rank, call.transport, num_kv_heads, groups, tile, short)


@lru_cache(maxsize=64)
def _planned_visits(
    layout: SequenceLayout, rank: int, transport: str, num_kv_heads: int, head_groups: int, tile: int | None, short: int
) -> tuple[Visit, ...]:
    if layout.ring_size == 1:
        return ()
    if transport == "all_gather":
        return (Visit(slice(0, num_kv_heads), gathered_blocks(layout, rank, tile, short), 0, 0),)
    groups = math.gcd(num_kv_heads, max(1, head_groups // len(layout.sample_lengths)))
    width = num_kv_heads // groups
    return tuple(
        Visit(slice(start, start + width), visiting_blocks(layout, rank, (rank - step) % layout.ring_size, tile, short), step, tag)
        for tag, (step, start) in enumerate(itertools.product(range(1, layout.ring_size), range(0, num_kv_heads, width)))
    )


def _send_kv(k: Tensor, v: Tensor, visits: tuple[Visit, ...], call: RingCall) -> Iterator[Tensor]:
    """Begin to exchange keys and values; yields each buffer when the caller asks for it, not before it is there."""
    layout, rank, size = call.layout, call.rank, call.layout.ring_size
    pending = []
    for visit in visits:
        kv = torch.cat((k[:, visit.kv_heads], v[:, visit.kv_heads]), dim=1)
        if call.transport == "all_gather":
            pending.append(start_gather_rows(kv, call.group))
            continue
        sent = take(kv, sent_rows(layout, rank, (rank + visit.step) % size))
        num_rows = num_sent(layout, (rank - visit.step) % size, rank)
        pending.append(ring_send_recv(sent, call.group, step=visit.step, recv_rows=num_rows, tag=visit.tag))
    if call.transport == "all_gather" and not fits_as_gathered(layout):
        return (gathered.wait().index_select(0, gathered_row(layout, k.device)) for gathered in pending)
    return (exchange.wait() for exchange in pending)


def _send_dkv(dkv: Tensor, visit: Visit, call: RingCall) -> PendingRows:
    """Begin to send the gradients of a received buffer to the ranks it came from, and to receive those of the own rows."""
    layout, rank, size = call.layout, call.rank, call.layout.ring_size
    if call.transport == "all_gather":
        by_rank = dkv if fits_as_gathered(layout) else dkv.index_select(0, pack_row(layout, dkv.device))
        return start_exchange_blocks(by_rank.unflatten(0, (size, layout.share_rows)), call.group)
    num_rows = num_sent(layout, rank, (rank + visit.step) % size)
    return ring_send_recv(dkv, call.group, step=-visit.step, recv_rows=num_rows, tag=visit.tag)


def _add_dkv(sums: tuple[Tensor, Tensor], received: Tensor, visit: Visit, call: RingCall) -> None:
    """Add what other ranks' queries gave to the own keys and values."""
    layout, rank = call.layout, call.rank
    if call.transport == "all_gather":
        received, rows = received.sum(0, dtype=sums[0].dtype), slice(0, layout.share_rows)
    else:
        rows = sent_rows(layout, rank, (rank + visit.step) % layout.ring_size)
    for total, part in zip(sums, received.chunk(2, dim=1), strict=True):
        add(total, rows, part)


class _Softmax:
    """A running softmax over the blocks of one call: `out` is normalised and in the accumulation dtype as soon as there are rectangles."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: RingCall):
        self.q, self.call = q, call
        blocks = own_blocks(call.layout, call.backend.forward_tile, _short(q, call))
        causal, rectangles = [x for x in blocks if x.causal], [x for x in blocks if not x.causal]
        merged = call.layout.ring_size > 1 or rectangles
        dtype = accumulation_dtype(q.dtype)
        if len(causal) == 1:
            out, self.lse = _block_forward(q, k, v, causal[0], call)
            self.out = out.to(dtype) if merged else out
        else:
            self.out = q.new_empty(q.shape, dtype=dtype if merged else q.dtype)
            self.lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype).t()  # rows contiguous, as kernels want it
        for block in causal if len(causal) > 1 else ():
            self.out[block.q], self.lse[block.q] = _block_forward(q[block.q], k[block.k], v[block.k], block, call)
        for block in rectangles:
            self.add(block, k[block.k], v[block.k], slice(0, q.shape[1]))

    def add(self, block: Block, k: Tensor, v: Tensor, heads: slice) -> None:
        """Fold in one rectangle of some query heads; `k` and `v` hold exactly its keys and values."""
        sums = self.out[:, heads], self.lse[:, heads]
        out, lse = (take(x, block.q) for x in sums)
        self.call.kernels.merge_into(out, lse, *_block_forward(take(self.q[:, heads], block.q), k, v, block, self.call))
        if isinstance(block.q, Scattered):  # else `out` and `lse` are views
            for total, part in zip(sums, (out, lse), strict=True):
                put(total, block.q, part)

    def result(self) -> tuple[Tensor, Tensor]:
        """(out in the dtype of q, lse)."""
        return self.out.to(self.q.dtype), self.lse


def _short(q: Tensor, call: RingCall) -> int:
    """Rows up to which the backend takes neighbouring samples in one call."""
    return call.backend.packed_rows(q.shape[1], q.shape[2])


def _block_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, call: RingCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a block, whose rows and keys these are."""
    if block.lengths:
        return call.backend.forward_packed(q, k, v, block.lengths, block.key_lengths, causal=block.causal, scale=call.scale)
    return call.backend.forward(q, k, v, causal=block.causal, scale=call.scale)


def _block_gradients(
    grad_out: Tensor, saved: tuple[Tensor, ...], block: Block, keys, call: RingCall, heads: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block of `keys` = (k, v) and some query heads, given the merged out and lse."""
    q, _, _, out, lse = saved
    tensors = *(take(x[:, heads], block.q) for x in (grad_out, q)), *keys, *(take(x[:, heads], block.q) for x in (out, lse))
    if block.lengths:
        return call.backend.backward_packed(*tensors, block.lengths, block.key_lengths, causal=block.causal, scale=call.scale)
    return call.backend.backward(*tensors, causal=block.causal, scale=call.scale)


def _visit_gradients(
    grad_out: Tensor, saved: tuple[Tensor, ...], kv: Tensor, visit: Visit, call: RingCall, dq_parts: list[tuple[Rows, slice, Tensor]]
) -> Tensor:
    """Gradient of what one transfer brought, in its layout; the parts of dq (rows, heads, values) go to `dq_parts`."""
    dkv = kv.new_zeros(kv.shape) if call.transport == "all_gather" else torch.empty_like(kv)  # a gathered row may go unseen
    heads = visit.query_heads(saved[0], saved[1])
    for block in visit.blocks:
        dq, *dkv_block = _block_gradients(grad_out, saved, block, take(kv, block.k).chunk(2, dim=1), call, heads)
        for part, grad in zip(dkv.chunk(2, dim=1), dkv_block, strict=True):
            put(part, block.k, grad)
        dq_parts.append((block.q, heads, dq))
    return dkv


def _add_parts(dq: Tensor, dq_parts: list[tuple[Rows, slice, Tensor]]) -> None:
    """Add the parts of dq to their sum, and forget them."""
    for rows, heads, part in dq_parts:
        add(dq[:, heads], rows, part)
    dq_parts.clear()


def _own_gradients(grad_out: Tensor, saved: tuple[Tensor, ...], call: RingCall, packed: bool = False) -> tuple[Tensor, ...] | Tensor:
    """Gradients of the causal blocks on the own rows, in the dtype of q; see `gradients`."""
    q, k, v = saved[:3]
    blocks = own_blocks(call.layout, short=_short(q, call))  # never cut: kernels lose no speed on long blocks in backward
    if len(blocks) == 1:
        grads = _block_gradients(grad_out, saved, blocks[0], (k, v), call)
        return torch.cat(grads, dim=1) if packed else grads  # there is room only now that the kernel's workspace is free again
    result, parts = _room(q, k, packed)
    for block in blocks:
        grads = _block_gradients(grad_out, saved, block, (k[block.k], v[block.k]), call)
        for part, grad in zip(parts, grads, strict=True):
            part[block.q] = grad
    return result


def _room(q: Tensor, k: Tensor, packed: bool) -> tuple[tuple[Tensor, ...] | Tensor, tuple[Tensor, ...]]:
    """(what `gradients` returns, not yet written; its parts dq, dk and dv)."""
    heads = (q.shape[1], k.shape[1], k.shape[1])
    if packed:
        result = q.new_empty(q.shape[0], sum(heads), q.shape[2])
        return result, result.split(heads, dim=1)
    parts = tuple(q.new_empty(q.shape[0], num_heads, q.shape[2]) for num_heads in heads)
    return parts, parts
