"""Rows taken and placed by a map, forward and backward, each in one pass without atomics. Twins: `reference`.

All four directions are one kernel: each row of the result comes from a row of one tensor, or else from its own row of another (or is zero).

Shapes: V visual tokens, R rows of the map, T rows of the result, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # values of one program


@triton.jit
def _select_kernel(x_ptr, base_ptr, source_ptr, out_ptr, width, HAS_BASE: tl.constexpr, COLUMNS: tl.constexpr):
    pieces = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(source_ptr + row)
    taken = tl.where(source >= 0, width, 0)  # how many columns come from x: all or none
    values = tl.load(x_ptr + source * width + columns, mask=columns < taken, other=0.0)
    if HAS_BASE:
        base = tl.load(base_ptr + row * width + columns, mask=(columns >= taken) & (columns < width), other=0.0)
        values = tl.where(columns < taken, values, base)
    tl.store(out_ptr + row * width + columns, values, mask=columns < width)


def _select(x_RD: Tensor, source_T: Tensor, base_TD: Tensor | None = None) -> Tensor:
    """out[t] = x[source[t]], or base[t] (0 without a base) where source[t] is -1."""
    num_rows, width = source_T.shape[0], x_RD.shape[1]
    x_RD, base_TD = x_RD.contiguous(), None if base_TD is None else base_TD.contiguous()
    out_TD = x_RD.new_empty(num_rows, width)
    if out_TD.numel():
        _select_kernel[(num_rows * triton.cdiv(width, COLUMNS),)](
            x_RD, base_TD, source_T, out_TD, width, HAS_BASE=base_TD is not None, COLUMNS=COLUMNS
        )
    return out_TD


def _inverse(rows_R: Tensor, num_rows: int) -> Tensor:
    """int64 [num_rows]: where in `rows` each row stands, -1 where it does not."""
    source = rows_R.new_full((num_rows,), -1)
    return source.scatter_(0, rows_R, torch.arange(rows_R.shape[0], device=rows_R.device))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return _select(x, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _select(grad, _inverse(index, ctx.num_rows)), None


def take_rows(x_VD: Tensor, index_R: Tensor) -> Tensor:
    """`reference.take_rows` for any dtype; index_R int64, each row at most once."""
    return _TakeRows.apply(x_VD, index_R)


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        source = _inverse(rows, base.shape[0])
        ctx.save_for_backward(rows, source)
        return _select(x, source, base)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        rows, source = ctx.saved_tensors
        grad_base = grad_x = None
        if ctx.needs_input_grad[0]:
            own = torch.arange(grad.shape[0], device=grad.device)
            grad_base = _select(grad, torch.where(source < 0, own, -1))
        if ctx.needs_input_grad[1]:
            grad_x = _select(grad, rows)
        return grad_base, grad_x, None


def place_rows(base_TD: Tensor, x_RD: Tensor, rows_R: Tensor) -> Tensor:
    """`reference.place_rows` for any dtype, the same for base and x; rows_R int64, each row at most once."""
    assert base_TD.dtype == x_RD.dtype and x_RD.shape == (rows_R.shape[0], base_TD.shape[1]), (base_TD.shape, x_RD.shape, rows_R.shape)
    return _PlaceRows.apply(base_TD, x_RD, rows_R)
