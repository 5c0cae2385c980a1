"""LayerNorm forward and backward, one pass each: everything in fp32, rounded once. Twin: `reference`.

Shapes: T rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the backward pass at most: each sums the gradients of weight and bias over its rows and writes an fp32 line of D values each.
BACKWARD_PROGRAMS = 1024


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, scale_ptr, width, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    x = tl.where(inside, x - mean, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=0) / width + eps))  # not the approximations: every value has this error
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (x * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, scale_ptr, grad_x_ptr, partial_ptr, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((COLUMNS,), tl.float32)
    grad_bias = tl.zeros((COLUMNS,), tl.float32)
    for step in range(ROWS):
        row = program * ROWS + step
        here = row < num_rows
        inside = columns < tl.where(here, width, 0)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=here, other=0.0)
        scale = tl.load(scale_ptr + row, mask=here, other=0.0)
        x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, x - mean, 0.0) * scale
        grad_weight += grad * normed
        grad_bias += grad
        grad *= weight
        grad_x = (grad - tl.sum(grad, axis=0) / width - normed * (tl.sum(grad * normed, axis=0) / width)) * scale
        tl.store(grad_x_ptr + row * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    line = partial_ptr + program * 2 * width + columns
    tl.store(line, grad_weight, mask=columns < width)
    tl.store(line + width, grad_bias, mask=columns < width)


def _warps(columns: int) -> int:
    """16 values per thread, at most 16 warps."""
    return min(max(columns // 512, 1), 16)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = weight.shape[0]
        out, (mean, scale) = torch.empty_like(x), x.new_empty(2, x.numel() // width, dtype=torch.float32)
        columns = triton.next_power_of_2(width)
        if scale.numel():
            _forward_kernel[(scale.numel(),)](
                x, weight, bias, out, mean, scale, width, eps, COLUMNS=columns, num_warps=_warps(columns)
            )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, scale = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        num_rows, width, columns = scale.numel(), weight.shape[0], triton.next_power_of_2(weight.shape[0])
        # A power of two, so that batches of many lengths need few compiled kernels.
        rows = triton.next_power_of_2(max(triton.cdiv(num_rows, BACKWARD_PROGRAMS), 1))
        programs = triton.cdiv(num_rows, rows)
        partial = x.new_empty(programs, 2, width, dtype=torch.float32)
        if num_rows:
            _backward_kernel[(programs,)](
                grad, x, weight, mean, scale, grad_x, partial, num_rows, width, ROWS=rows, COLUMNS=columns, num_warps=_warps(columns)
            )
        grad_weight, grad_bias = partial.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm` for fp32, fp16 and bf16, any leading shape. Sums of gradients are taken in fp32 in a fixed order."""
    assert x.shape[-1] == weight_D.shape[0] == bias_D.shape[0], (x.shape, weight_D.shape, bias_D.shape)
    return _LayerNorm.apply(x, weight_D, bias_D, eps)
