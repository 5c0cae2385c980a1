"""Cross entropy over some columns of the vocabulary, from half-precision logits: one pass forward, one backward. Twins: `reference`.

No fp32 copy of the logits exists. The sums over tensor-parallel ranks are the caller's (training/loss.py).

Shapes: L rows, V columns of this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192  # values of one step of a row


@triton.jit
def _lse_kernel(logits_ptr, labels_ptr, lse_ptr, target_ptr, stride, first_column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    largest, total = -1e30, 0.0  # below every finite logit, and -inf minus it is still -inf
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(logits + columns, mask=columns < WIDTH, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(values - new), axis=0)
        largest = new
    column = tl.load(labels_ptr + row) - first_column
    inside = (column >= 0) & (column < WIDTH)
    tl.store(lse_ptr + row, largest + tl.log(total))
    tl.store(target_ptr + row, tl.load(logits + column, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits_ptr, labels_ptr, lse_ptr, grad_ptr, out_ptr, width, stride, first_column, COLUMNS: tl.constexpr):
    pieces = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    values = tl.load(logits_ptr + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    column = tl.load(labels_ptr + row) - first_column
    probs = tl.exp(values - tl.load(lse_ptr + row)) - tl.where(columns == column, 1.0, 0.0)
    out = (probs * tl.load(grad_ptr + row)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, out, mask=inside)


def lse_and_target(logits_LV: Tensor, labels_L: Tensor, first_column: int) -> tuple[Tensor, Tensor]:
    """`reference.lse_and_target` for fp32, fp16 and bf16; finite logits above -1e30, or -inf. Not differentiable."""
    num_rows, width = logits_LV.shape
    assert logits_LV.stride(1) == 1 and labels_L.is_contiguous(), (logits_LV.stride(), labels_L.stride())
    lse_L, target_L = (logits_LV.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        _lse_kernel[(num_rows,)](
            logits_LV, labels_L, lse_L, target_L, logits_LV.stride(0), first_column, WIDTH=width, COLUMNS=_columns(width), num_warps=8
        )
    return lse_L, target_L


def cross_entropy_gradient(logits_LV: Tensor, labels_L: Tensor, first_column: int, lse_L: Tensor, grad_L: Tensor) -> Tensor:
    """`reference.cross_entropy_gradient` for fp32, fp16 and bf16; contiguous, in the dtype of the logits."""
    num_rows, width = logits_LV.shape
    assert logits_LV.stride(1) == 1 and lse_L.dtype == torch.float32, (logits_LV.stride(), lse_L.dtype)
    out_LV = logits_LV.new_empty(num_rows, width)
    columns = _columns(width)
    if num_rows:
        _gradient_kernel[(num_rows * triton.cdiv(width, columns),)](
            logits_LV,
            labels_L.contiguous(),
            lse_L.contiguous(),
            grad_L.float().contiguous(),
            out_LV,
            width,
            logits_LV.stride(0),
            first_column,
            COLUMNS=columns,
            num_warps=8,
        )
    return out_LV


def _columns(width: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(width))
