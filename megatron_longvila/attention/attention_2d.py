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
    return _Attention2D.apply(call, ulysses, packed, *head_counts(packed, q_TNH.shape[1] // k_TKH.shape[1]))


def packed_attention_2d(packed_UTMH: Tensor, num_queries_per_key: int, call: RingCall, ulysses: ProcessGroup | None) -> Tensor:
    """`attention_2d` of what `kernels.pack_qkv` wrote: the buffer is sent as it is. Returns out_TNH, differentiable."""
    heads = head_counts(packed_UTMH, num_queries_per_key)
    if call.layout.ulysses_size == 1:
        return _Attention2D.apply(call, None, *packed_UTMH.squeeze(0).split((heads[0], heads[1], heads[1]), dim=1))
    return _Attention2D.apply(call, ulysses, packed_UTMH, *heads)


class _Attention2D(torch.autograd.Function):
    """Without a ulysses group: (q, k, v) -> out, all [S, heads, H]. With one: (send buffer [U, T, M, H], query and key heads in it)
    -> out_TNH.

    Packing and unpacking of the output and its gradient are inside, so that what is sent lives no longer than its transfer.
    """

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
        if ulysses is None:
            return out
        return call.kernels.unpack_heads(start_exchange_blocks(out.unflatten(0, (ulysses.size(), -1)), ulysses).wait())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor):
        saved, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if ctx.ulysses is None:
            grad_out = grad_out.contiguous()  # a summed loss sends an expanded scalar, which kernels cannot read
            return None, None, *gradients(grad_out, saved, kept, ctx.call)
        size = ctx.ulysses.size()
        grad_out = start_exchange_blocks(_by_rank(grad_out, size, ctx.call), ctx.ulysses).wait().flatten(0, 1)
        packed = gradients(grad_out, saved, kept, ctx.call, packed=True)
        return None, None, start_exchange_blocks(packed.unflatten(0, (size, -1)), ctx.ulysses).wait(), None, None


def _by_rank(x_TNH: Tensor, size: int, call: RingCall) -> Tensor:
    """[T, N, H] -> [U, T, N/U, H], contiguous: the adjoint of `unpack_heads`, which is the same swap of two axes."""
    return call.kernels.unpack_heads(x_TNH.unflatten(1, (size, -1))).unflatten(1, (x_TNH.shape[0], -1))
