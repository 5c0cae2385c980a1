"""SwiGLU forward and backward, one pass each; backward needs the input alone. Twin: `reference`.

Shapes: T rows, F hidden size of the MLP on this tensor-parallel rank; a row is F gates, then F values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # values of one program


@triton.jit
def _forward_kernel(x_ptr, out_ptr, width, COLUMNS: tl.constexpr):
    pieces = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    x = x_ptr + row * 2 * width + columns
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_ptr, x_ptr, grad_x_ptr, width, COLUMNS: tl.constexpr):
    pieces = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    offset = row * 2 * width + columns
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + offset + width, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(grad_x_ptr + offset, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_x_ptr + offset + width, (grad * gate * share).to(grad_x_ptr.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        if out.numel():
            _forward_kernel[(out.numel() // width * triton.cdiv(width, COLUMNS),)](x, out, width, COLUMNS=COLUMNS)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,), grad = ctx.saved_tensors, grad.contiguous()
        grad_x, width = torch.empty_like(x), grad.shape[-1]
        if grad.numel():
            _backward_kernel[(grad.numel() // width * triton.cdiv(width, COLUMNS),)](grad, x, grad_x, width, COLUMNS=COLUMNS)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """`reference.swiglu` for fp32, fp16 and bf16, any leading shape; computed in fp32, rounded once."""
    assert x.shape[-1] % 2 == 0, x.shape
    return _SwiGLU.apply(x)
