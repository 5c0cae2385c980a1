"""One more block of keys folded into a running softmax: one read of the block, one read and write of the sum. Twin: `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 8  # (row, head) pairs of one program


@triton.jit
def _merge_kernel(
    out_ptr,
    lse_ptr,
    block_out_ptr,
    block_lse_ptr,
    num_pairs,
    num_heads,
    out_stride_T,
    out_stride_N,
    lse_stride_T,
    lse_stride_N,
    block_stride_T,
    block_stride_N,
    block_lse_stride_T,
    block_lse_stride_N,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)  # 32 bits count them, and divide faster; offsets need 64
    row, head = (pairs // num_heads).to(tl.int64), (pairs % num_heads).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    real = pairs < num_pairs
    inside = real[:, None] & (columns < HEAD_DIM)[None, :]
    lse_at = lse_ptr + row * lse_stride_T + head * lse_stride_N
    lse = tl.load(lse_at, mask=real, other=0.0)
    block_lse = tl.load(block_lse_ptr + row * block_lse_stride_T + head * block_lse_stride_N, mask=real, other=0.0).to(tl.float32)
    largest = tl.maximum(lse, block_lse)
    # Both exponents are at most 0: no overflow, and a side without keys (-inf) gets weight 0.
    old, new = tl.exp(lse - largest), tl.exp(block_lse - largest)
    total = old + new
    old_share, new_share = tl.div_rn(old, total), tl.div_rn(new, total)
    out_at = out_ptr + (row * out_stride_T + head * out_stride_N)[:, None] + columns[None, :]
    block_at = block_out_ptr + (row * block_stride_T + head * block_stride_N)[:, None] + columns[None, :]
    out = tl.load(out_at, mask=inside, other=0.0)
    block_out = tl.load(block_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, out * old_share[:, None] + block_out * new_share[:, None], mask=inside)
    tl.store(lse_at, largest + tl.log(total), mask=real)


def merge_into(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> None:
    """`reference.merge_into` for fp32 sums and blocks of any dtype; strides are free except in H."""
    num_rows, num_heads, head_dim = out_TNH.shape
    assert out_TNH.dtype == lse_TN.dtype == torch.float32, (out_TNH.dtype, lse_TN.dtype)
    assert out_TNH.stride(2) == block_out_TNH.stride(2) == 1 and block_out_TNH.shape == out_TNH.shape, (out_TNH.shape, block_out_TNH.shape)
    assert lse_TN.shape == block_lse_TN.shape == (num_rows, num_heads), (lse_TN.shape, block_lse_TN.shape)
    pairs = num_rows * num_heads
    if pairs == 0:
        return
    _merge_kernel[(triton.cdiv(pairs, PAIRS),)](
        out_TNH,
        lse_TN,
        block_out_TNH,
        block_lse_TN,
        pairs,
        num_heads,
        *out_TNH.stride()[:2],
        *lse_TN.stride(),
        *block_out_TNH.stride()[:2],
        *block_lse_TN.stride(),
        HEAD_DIM=head_dim,
        PAIRS=PAIRS,
        COLUMNS=triton.next_power_of_2(head_dim),
    )
