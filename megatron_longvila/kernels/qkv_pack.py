"""Bias, rotary and packing of Q|K|V for the ulysses all-to-all in one pass, and the copy between rows and blocks. Twins: `reference`.

One read of the projection's output and one write of the send buffer, instead of a pass each for bias, rotary of q, rotary of k and three
copies. Everything is computed in fp32 and rounded once.

Shapes: T rows, K key/value heads, G query heads per key/value head, N = K * G query heads, H head dim, C = K * (G + 2) * H, U ranks,
P parts, M = (N + 2K) / (U * P) heads of one rank and part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of one program. A program holds BLOCK x H / 2 cosines and sines in registers for all heads of a group.
FORWARD_ROWS, BACKWARD_ROWS = 16, 64
COPY_COLUMNS = 1024


@triton.jit
def _pack_kernel(
    qkv_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    num_rows,
    qkv_stride,
    ranks,
    parts,
    groups_per_block,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: some rows of one group of heads. Groups are the fast axis, so that their programs share the table in the L2 cache."""
    group = tl.program_id(0) % GROUPS
    rows = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    table = table_ptr + rows[:, None] * (2 * HALF) + columns[None, :]
    cos = tl.load(table, mask=inside, other=0.0)
    sin = tl.load(table + HALF, mask=inside, other=0.0)
    block, local_group = group // groups_per_block, group % groups_per_block
    place = (block % parts) * ranks + block // parts  # parts outside, ranks inside
    heads = groups_per_block * (QUERIES + 2)  # of one row in one block
    out_rows = out_ptr + ((place.to(tl.int64) * num_rows + rows) * heads)[:, None] * (2 * HALF) + columns[None, :]
    for slot in tl.static_range(QUERIES + 2):
        source = (group * (QUERIES + 2) + slot) * (2 * HALF)
        qkv = qkv_ptr + rows[:, None] * qkv_stride + source + columns[None, :]
        first = tl.load(qkv, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(qkv + HALF, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = bias_ptr + source + columns
            first += tl.load(bias, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
            second += tl.load(bias + HALF, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
        if slot < QUERIES:
            head = local_group * QUERIES + slot
        else:
            head = groups_per_block * slot + local_group  # keys behind all queries, values behind all keys
        if slot <= QUERIES:
            rotated = first * cos - second * sin
            second = second * cos + first * sin
            first = rotated
        out = out_rows + head * (2 * HALF)
        tl.store(out, first.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pack_backward_kernel(
    grad_ptr,
    table_ptr,
    out_ptr,
    partial_ptr,
    num_rows,
    ranks,
    parts,
    groups_per_block,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The adjoint: rotates back, unpacks, and sums its rows for the bias into its own line of `partial`, in fp32."""
    group, line = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS
    rows = line.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    table = table_ptr + rows[:, None] * (2 * HALF) + columns[None, :]
    cos = tl.load(table, mask=inside, other=0.0)
    sin = tl.load(table + HALF, mask=inside, other=0.0)
    block, local_group = group // groups_per_block, group % groups_per_block
    place = (block % parts) * ranks + block // parts
    heads = groups_per_block * (QUERIES + 2)
    grad_rows = grad_ptr + ((place.to(tl.int64) * num_rows + rows) * heads)[:, None] * (2 * HALF) + columns[None, :]
    width = GROUPS * (QUERIES + 2) * 2 * HALF
    for slot in tl.static_range(QUERIES + 2):
        if slot < QUERIES:
            head = local_group * QUERIES + slot
        else:
            head = groups_per_block * slot + local_group
        grad = grad_rows + head * (2 * HALF)
        first = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(grad + HALF, mask=inside, other=0.0).to(tl.float32)
        if slot <= QUERIES:
            rotated = first * cos + second * sin
            second = second * cos - first * sin
            first = rotated
        target = (group * (QUERIES + 2) + slot) * (2 * HALF)
        out = out_ptr + rows[:, None] * width + target + columns[None, :]
        tl.store(out, first.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            partial = partial_ptr + line.to(tl.int64) * width + target + columns
            tl.store(partial, tl.sum(first, axis=0), mask=columns < HALF)
            tl.store(partial + HALF, tl.sum(second, axis=0), mask=columns < HALF)


class _PackQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor | None, table: Tensor, num_kv_heads: int, ulysses_size: int, num_parts: int) -> Tensor:
        (num_rows, width), head_dim = qkv.shape, table.shape[1]
        heads, blocks = width // head_dim, ulysses_size * num_parts
        out = qkv.new_empty(num_parts, ulysses_size, num_rows, heads // blocks, head_dim)
        ctx.sizes = dict(GROUPS=num_kv_heads, QUERIES=heads // num_kv_heads - 2, HALF=head_dim // 2)
        ctx.blocks = ulysses_size, num_parts, num_kv_heads // blocks
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(table)
        if num_rows:
            _pack_kernel[(triton.cdiv(num_rows, FORWARD_ROWS) * num_kv_heads,)](
                qkv,
                bias,
                table,
                out,
                num_rows,
                qkv.stride(0),
                *ctx.blocks,
                **ctx.sizes,
                HAS_BIAS=bias is not None,
                ROWS=FORWARD_ROWS,
                COLUMNS=triton.next_power_of_2(head_dim // 2),
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (table,), grad = ctx.saved_tensors, grad.contiguous()
        num_rows, num_heads = grad.shape[2], ctx.sizes["GROUPS"] * (ctx.sizes["QUERIES"] + 2)
        width = num_heads * grad.shape[4]
        lines = triton.cdiv(num_rows, BACKWARD_ROWS)
        has_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        out = grad.new_empty(num_rows, width)
        partial = grad.new_empty(lines, width, dtype=torch.float32) if has_bias else None
        if num_rows:
            _pack_backward_kernel[(lines * ctx.sizes["GROUPS"],)](
                grad,
                table,
                out,
                partial,
                num_rows,
                *ctx.blocks,
                **ctx.sizes,
                HAS_BIAS=has_bias,
                ROWS=BACKWARD_ROWS,
                COLUMNS=triton.next_power_of_2(table.shape[1] // 2),
            )
        return out, partial.sum(0).to(ctx.bias_dtype) if has_bias else None, None, None, None, None


def pack_qkv(qkv_TC: Tensor, bias_C: Tensor | None, table_TH: Tensor, num_kv_heads: int, ulysses_size: int, num_parts: int = 1) -> Tensor:
    """`reference.pack_qkv` for fp32, fp16 and bf16. Rows of qkv may lie apart, the values of a row may not. Its gradient is contiguous.

    The gradient of the bias is summed in fp32, block after block in a fixed order.
    """
    head_dim, blocks = table_TH.shape[1], ulysses_size * num_parts
    assert qkv_TC.stride(1) == 1 and head_dim % 2 == 0 and num_kv_heads % blocks == 0, (qkv_TC.stride(), head_dim, num_kv_heads, blocks)
    assert qkv_TC.shape[1] % (num_kv_heads * head_dim) == 0 and table_TH.shape[0] == qkv_TC.shape[0], (qkv_TC.shape, table_TH.shape)
    assert table_TH.dtype == torch.float32 and table_TH.is_contiguous(), (table_TH.dtype, table_TH.stride())
    return _PackQKV.apply(qkv_TC, bias_C, table_TH, num_kv_heads, ulysses_size, num_parts)


@triton.jit
def _swap_kernel(
    x_ptr, out_ptr, num_inner, width, x_outer_stride, x_inner_stride, out_outer_stride, out_inner_stride, COLUMNS: tl.constexpr
):
    """out[o, i] = x[i, o] for rows of `width` values: one program copies up to COLUMNS values of one of them."""
    pieces = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)  # of out
    outer, inner = row // num_inner, row % num_inner
    columns = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x_ptr + inner * x_outer_stride + outer * x_inner_stride + columns, mask=columns < width)
    tl.store(out_ptr + outer * out_outer_stride + inner * out_inner_stride + columns, values, mask=columns < width)


def swap_into(out_BANH: Tensor, x_ABNH: Tensor) -> None:
    """`reference.swap_into` for any dtype; the heads of one place must lie together, places may lie anywhere."""
    assert out_BANH.shape[:2] == x_ABNH.shape[1::-1] and out_BANH.shape[2:] == x_ABNH.shape[2:], (out_BANH.shape, x_ABNH.shape)
    if out_BANH.numel() == 0:
        return
    assert out_BANH[0, 0].is_contiguous() and x_ABNH[0, 0].is_contiguous(), (out_BANH.stride(), x_ABNH.stride())
    (num_outer, num_inner), width = out_BANH.shape[:2], out_BANH[0, 0].numel()
    grid = (num_outer * num_inner * triton.cdiv(width, COPY_COLUMNS),)
    strides = (*x_ABNH.stride()[:2], *out_BANH.stride()[:2])
    _swap_kernel[grid](x_ABNH, out_BANH, num_inner, width, *strides, COLUMNS=COPY_COLUMNS)
