"""2D attention as one autograd function: heads all-to-all, ring, all-to-all back; the same road in reverse for gradients.

Shapes: U ulysses ranks, T rows of this cp rank, S = U*T rows of the ring share, N query and K key/value heads of this tensor-parallel rank,
M = (N + 2K) / U heads of the send buffer, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.attention.ring import RingCall, attend, gradients
from megatron_longvila.attention.ulysses import head_counts, pack_heads
from megatron_longvila.parallel.collectives import start_exchange_blocks


def attention_2d(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, call: RingCall, ulysses: ProcessGroup | None) -> Tensor:
    """Causal attention within each sample of the pack that `call.layout` describes. Returns out_TNH, differentiable.

    Every rank of the cp group calls it with its own rows; `ulysses` is unused where that axis has one rank. Collectives on that axis: one
    all-to-all for queries, keys and values, one for the output; in backward one for its gradient, one for theirs. On the ring: see ring.py.
    Nothing waits for the device, and nothing is planned again for a layout that was seen before.
    """
    size = call.layout.ulysses_size
    if size == 1:
        return _Attention2D.apply(call, None, q_TNH, k_TKH, v_TKH)
    packed = pack_heads((q_TNH, k_TKH, v_TKH), size)
    return call.kernels.unpack_heads(_Attention2D.apply(call, ulysses, packed, *head_counts(packed, q_TNH.shape[1] // k_TKH.shape[1])))


def packed_attention_2d(packed_UTMH: Tensor, num_queries_per_key: int, call: RingCall, ulysses: ProcessGroup | None) -> Tensor:
    """`attention_2d` of what `kernels.pack_qkv` wrote: the buffer is sent as it is. Returns out_TNH, differentiable."""
    heads = head_counts(packed_UTMH, num_queries_per_key)
    if call.layout.ulysses_size == 1:
        return _Attention2D.apply(call, None, *packed_UTMH.squeeze(0).split((heads[0], heads[1], heads[1]), dim=1))
    return call.kernels.unpack_heads(_Attention2D.apply(call, ulysses, packed_UTMH, *heads))


class _Attention2D(torch.autograd.Function):
    """Without a ulysses group: (q, k, v) -> out, all [S, heads, H]. With one: (send buffer [U, T, M, H], query and key heads in it)
    -> [U, T, N/U, H], the heads of each rank for the own rows."""

    @staticmethod
    def forward(ctx, call: RingCall, ulysses: ProcessGroup | None, *inputs) -> Tensor:
        ctx.call, ctx.ulysses = call, ulysses
        if ulysses is None:
            q, k, v = inputs
        else:
            packed, num_queries, num_keys = inputs
            # Views of the receive buffer: attention kernels read it by strides.
            q, k, v = start_exchange_blocks(packed, ulysses).wait().flatten(0, 1).split((num_queries, num_keys, num_keys), dim=1)
        out, lse, kept = attend(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out if ulysses is None else start_exchange_blocks(out.unflatten(0, (ulysses.size(), -1)), ulysses).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):
        saved, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if ctx.ulysses is None:
            grad_out = grad_out.contiguous()  # a summed loss sends an expanded scalar, which kernels cannot read
            return None, None, *gradients(grad_out, saved, kept, ctx.call)
        grad_out = start_exchange_blocks(grad_out, ctx.ulysses).wait().flatten(0, 1)
        q, k, v = saved[:3]
        buffer = q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])
        gradients(grad_out, saved, kept, ctx.call, into=buffer.split((q.shape[1], k.shape[1], v.shape[1]), dim=1))
        return None, None, start_exchange_blocks(buffer.unflatten(0, (ctx.ulysses.size(), -1)), ctx.ulysses).wait(), None, None
