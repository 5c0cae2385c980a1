"""RMSNorm forward and backward, one pass each: everything in fp32, rounded once. Twin: `reference`.

Shapes: T rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the backward pass at most: each sums the weight's gradient over its rows and writes one fp32 line of D values.
BACKWARD_PROGRAMS = 1024


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, out_ptr, scale_ptr, width, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=0) / width + eps))  # not the approximations: every value has this error
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((COLUMNS,), tl.float32)
    for step in range(ROWS):
        row = program * ROWS + step
        inside = columns < tl.where(row < num_rows, width, 0)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < num_rows, other=0.0)
        normed = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
        grad_weight += grad * normed
        grad *= weight
        grad_x = (grad - normed * (tl.sum(grad * normed, axis=0) / width)) * scale
        tl.store(grad_x_ptr + row * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=columns < width)


def warps(values: int) -> int:
    """16 values per thread, at most 16 warps."""
    return min(max(values // 512, 1), 16)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = weight.shape[0]
        out, scale = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
        columns = triton.next_power_of_2(width)
        if scale.numel():
            _forward_kernel[(scale.numel(),)](x, weight, out, scale, width, eps, COLUMNS=columns, num_warps=warps(columns))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        num_rows, width, columns = scale.numel(), weight.shape[0], triton.next_power_of_2(weight.shape[0])
        # A power of two, so that batches of many lengths need few compiled kernels.
        rows = triton.next_power_of_2(max(triton.cdiv(num_rows, BACKWARD_PROGRAMS), 1))
        programs = triton.cdiv(num_rows, rows)
        partial = x.new_empty(programs, width, dtype=torch.float32)
        if num_rows:
            _backward_kernel[(programs,)](
                grad, x, weight, scale, grad_x, partial, num_rows, width, ROWS=rows, COLUMNS=columns, num_warps=warps(columns)
            )
        return grad_x, partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` for fp32, fp16 and bf16, any leading shape. The weight's gradient is summed in fp32 in a fixed order."""
    assert x.shape[-1] == weight_D.shape[0], (x.shape, weight_D.shape)
    return _RMSNorm.apply(x, weight_D, eps)
