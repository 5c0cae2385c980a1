"""2D attention as autograd functions: heads all-to-all, ring, all-to-all back; the same road in reverse for gradients.

Shapes: U ulysses ranks, P parts of a rank's heads, T rows of this cp rank, S = U*T rows of the ring share, N query and K key/value heads of
this tensor-parallel rank, M = (N + 2K) / (U * P) heads of one block of the send buffers, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.attention.ring import RingCall, attend, gradients
from megatron_longvila.attention.ulysses import head_counts, num_parts, pack_heads
from megatron_longvila.parallel.collectives import PendingRows, start_exchange_blocks


def attention_2d(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, call: RingCall, ulysses: ProcessGroup | None) -> Tensor:
    """Causal attention within each sample of the pack that `call.layout` describes. Returns out_TNH, differentiable.

    Every rank of the cp group calls it with its own rows; `ulysses` is unused where that axis has one rank. Collectives on that axis, for
    each part of the heads: one all-to-all for queries, keys and values, one for the output; in backward one for its gradient, one for
    theirs. On the ring: see ring.py. Nothing waits for the device, and nothing is planned again for a layout that was seen before.
    """
    if call.layout.ulysses_size == 1:
        return _RingAttention.apply(call, q_TNH, k_TKH, v_TKH)
    parts = num_parts(call.layout, q_TNH.shape[1], k_TKH.shape[1])
    packed = pack_heads((q_TNH, k_TKH, v_TKH), call.layout.ulysses_size, parts)
    return packed_attention_2d(packed, q_TNH.shape[1] // k_TKH.shape[1], call, ulysses)


def packed_attention_2d(packed_PUTMH: Tensor, num_queries_per_key: int, call: RingCall, ulysses: ProcessGroup | None) -> Tensor:
    """`attention_2d` of what `kernels.pack_qkv` wrote: the buffers are sent as they are. Returns out_TNH, differentiable."""
    heads = head_counts(packed_PUTMH, num_queries_per_key)
    if call.layout.ulysses_size == 1:
        return _RingAttention.apply(call, *packed_PUTMH.squeeze((0, 1)).split((heads[0], heads[1], heads[1]), dim=1))
    return _UlyssesAttention.apply(call, ulysses, packed_PUTMH, heads)


class _RingAttention(torch.autograd.Function):
    """(q, k, v) -> out, all [S, heads, H]."""

    @staticmethod
    def forward(ctx, call: RingCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.call = call
        out, lse, kept = attend(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):
        # Contiguous: a summed loss sends an expanded scalar, which kernels cannot read.
        return None, *gradients(grad_out.contiguous(), ctx.saved_tensors[:5], ctx.saved_tensors[5:], ctx.call)


class _UlyssesAttention(torch.autograd.Function):
    """Send buffers [P, U, T, M, H] -> out_TNH, part after part: while one is computed, the next arrives and the one before leaves.

    Packing and unpacking of the output and its gradient are inside, so that what is sent lives no longer than its transfer. The transfers
    of a part are started before the kernels of the next, which would take every processor of a GPU first.
    """

    @staticmethod
    def forward(ctx, call: RingCall, ulysses: ProcessGroup, packed: Tensor, heads: tuple[int, int]) -> Tensor:
        ctx.call, ctx.ulysses, ctx.shape = call, ulysses, packed.shape
        parts, size, num_rows, _, head_dim = packed.shape
        saved, leaving = [], []
        for pending in [start_exchange_blocks(part, ulysses) for part in packed.unbind()]:
            # Views of the receive buffer: attention kernels read it by strides.
            q, k, v = pending.wait().flatten(0, 1).split((heads[0], heads[1], heads[1]), dim=1)
            out, lse, kept = attend(q, k, v, call)
            leaving.append(start_exchange_blocks(out.unflatten(0, (size, num_rows)), ulysses))
            saved += (q, k, v, out, lse, *kept)
        ctx.save_for_backward(*saved)
        out = packed.new_empty(num_rows, size * parts * heads[0], head_dim)
        for pending, part_TUNH in zip(leaving, _parts(out, packed.shape), strict=True):
            call.kernels.swap_into(part_TUNH, pending.wait())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):
        parts, size, num_rows = ctx.shape[:3]
        saved = ctx.saved_tensors
        of_part = [saved[i : i + len(saved) // parts] for i in range(0, len(saved), len(saved) // parts)]
        arriving = [_send_part(part_TUNH, ctx.call, ctx.ulysses) for part_TUNH in _parts(grad_out.contiguous(), ctx.shape)]
        result, leaving = grad_out.new_empty(ctx.shape), []
        for pending, tensors, target in zip(arriving, of_part, result.unbind(), strict=True):
            packed = gradients(pending.wait().flatten(0, 1), tensors[:5], tensors[5:], ctx.call, packed=True)
            leaving.append(start_exchange_blocks(packed.unflatten(0, (size, num_rows)), ctx.ulysses, target))
            del packed
        for pending in leaving:
            pending.wait()
        return None, None, result, None


def _parts(x_TNH: Tensor, packed_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views [T, U, N/(U*P), H] of each part's heads of every rank."""
    return x_TNH.unflatten(1, (packed_shape[1], packed_shape[0], -1)).unbind(2)


def _send_part(part_TUNH: Tensor, call: RingCall, ulysses: ProcessGroup) -> PendingRows:
    """Begin to send one part of the output's gradient to the ranks that computed it."""
    num_rows, size, *heads = part_TUNH.shape
    by_rank_UTNH = part_TUNH.new_empty(size, num_rows, *heads)
    call.kernels.swap_into(by_rank_UTNH, part_TUNH)
    return start_exchange_blocks(by_rank_UTNH, ulysses)
