"""LayerNorm forward and backward, one pass each: everything in fp32, rounded once. Twin: `reference`.

Shapes: T rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_longvila.kernels.rms_norm import warps

# Values that a program has in its registers at once, as whole rows. Four times as many take 1.4 times as long forward and 3.6 times as
# long backward at SigLIP's width, whose rows come one to a program (tools/benchmark_results/layer_norm_sizes_h200.json).
TILE_VALUES = 2048
# Programs of the backward pass at most: each sums the gradients of weight and bias over its rows and writes an fp32 line of D values each.
BACKWARD_PROGRAMS = 1024


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, scale_ptr, num_rows, width, eps, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    x = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps))  # not the approximations: every value has this error
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    out = x * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, scale_ptr, grad_x_ptr, partial_ptr, num_rows, width,
    STEPS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((COLUMNS,), tl.float32)
    grad_bias = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        rows = (program * STEPS + step) * TILE + tl.arange(0, TILE)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        places = rows[:, None] * width + columns[None, :]
        grad = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = tl.where(inside, tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32) - mean, 0.0) * scale
        grad_weight += tl.sum(grad * normed, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        grad *= weight[None, :]
        shift, slope = tl.sum(grad, axis=1) / width, tl.sum(grad * normed, axis=1) / width
        grad_x = (grad - shift[:, None] - normed * slope[:, None]) * scale
        tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    line = partial_ptr + program * 2 * width + columns
    tl.store(line, grad_weight, mask=columns < width)
    tl.store(line + width, grad_bias, mask=columns < width)


def _tile(width: int) -> dict[str, int]:
    """Whole rows of one program, and its warps."""
    columns = triton.next_power_of_2(width)
    tile = max(TILE_VALUES // columns, 1)
    return {"TILE": tile, "COLUMNS": columns, "num_warps": warps(tile * columns)}


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = weight.shape[0]
        num_rows, sizes = x.numel() // width, _tile(width)
        out, mean, scale = torch.empty_like(x), *(x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
        if num_rows:
            _forward_kernel[(triton.cdiv(num_rows, sizes["TILE"]),)](x, weight, bias, out, mean, scale, num_rows, width, eps, **sizes)
        ctx.save_for_backward(x, weight, mean, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, scale = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        num_rows, width, sizes = scale.numel(), weight.shape[0], _tile(weight.shape[0])
        tiles = triton.cdiv(num_rows, sizes["TILE"])
        # A power of two, so that batches of many lengths need few compiled kernels.
        steps = triton.next_power_of_2(max(triton.cdiv(tiles, BACKWARD_PROGRAMS), 1))
        programs = triton.cdiv(tiles, steps)
        partial = x.new_empty(programs, 2, width, dtype=torch.float32)
        if num_rows:
            _backward_kernel[(programs,)](grad, x, weight, mean, scale, grad_x, partial, num_rows, width, STEPS=steps, **sizes)
        grad_weight, grad_bias = partial.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm` for fp32, fp16 and bf16, any leading shape. Sums of gradients are taken in fp32 in a fixed order."""
    assert x.shape[-1] == weight_D.shape[0] == bias_D.shape[0], (x.shape, weight_D.shape, bias_D.shape)
    return _LayerNorm.apply(x, weight_D, bias_D, eps)
