"""One list of cases for every kernel: the CPU tests run it in Triton's interpreter, the GPU tests on the GPU, the benchmark at full size.

A case is random inputs in some dtype and a function of (kernels, inputs). `check` runs it three times, with Triton, with the plain twin in
the same dtype, and with the twin in fp64, and compares outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_longvila.kernels.choice import Kernels, get_kernels


@dataclass(frozen=True)
class Case:
    """Inputs and what to compute from them.

    Attributes:
        inputs: floating tensors that stay in fp32 keep their values in `exact`; integer tensors are handed on.
        function: (kernels, *inputs) -> outputs.
        gradients: indices of the inputs whose gradients are compared; none for operations that are not differentiable.
    """

    inputs: tuple[Tensor | None, ...]
    function: Callable
    gradients: tuple[int, ...] = ()


def _random(device, *shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values; the same on every device."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


def pack_qkv(dtype, device, rows=37, heads=(6, 2), head_dim=16, ulysses_size=2, parts=1, bias=True) -> Case:
    num_heads, num_kv_heads = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = _random(device, rows, width + 8, dtype=dtype)[:, :width]  # rows apart
    angles = 100 * _random(device, rows, head_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    inputs = (qkv, _random(device, width, dtype=dtype) if bias else None, table)
    return Case(inputs, lambda kernels, *x: (kernels.pack_qkv(*x, num_kv_heads, ulysses_size, parts),), (0, 1) if bias else (0,))


def swap_into(dtype, device, ranks=3, rows=11, heads=2, head_dim=24) -> Case:
    """Both ways, between a block for each rank and one of two parts of wider rows."""

    def function(kernels, x_UTNH):
        wide_TUPNH = x_UTNH.new_zeros(rows, ranks, 2, heads, head_dim)
        back_UTNH = torch.empty_like(x_UTNH)
        kernels.swap_into(wide_TUPNH[:, :, 1], x_UTNH)
        kernels.swap_into(back_UTNH, wide_TUPNH[:, :, 1])
        return wide_TUPNH, back_UTNH

    return Case((_random(device, ranks, rows, heads, head_dim, dtype=dtype),), function)


def merge_into(dtype, device, rows=29, heads=3, head_dim=24) -> Case:
    """Row slices of larger buffers, LSEs stored by head as attention kernels give them, one side at times without keys."""
    out, block_out = _random(device, rows + 4, heads, head_dim)[2:-2], _random(device, rows, heads, head_dim, dtype=dtype)
    lse, block_lse = 10 * _random(device, heads, rows + 4).t()[2:-2], 10 * _random(device, heads, rows).t()
    lse[1], block_lse[2] = float("-inf"), float("-inf")
    lse[3], block_lse[3] = 300.0, -300.0

    def function(kernels, out, lse, block_out, block_lse):
        merged, merged_lse = (x.clone(memory_format=torch.preserve_format) for x in (out, lse))
        kernels.merge_into(merged, merged_lse, block_out, block_lse)
        return merged, merged_lse

    return Case((out, lse, block_out, block_lse), function)


def take_rows(dtype, device, rows=13, taken=7, width=2500) -> Case:
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:taken].to(device)
    return Case((_random(device, rows, width, dtype=dtype), index), lambda kernels, *x: (kernels.take_rows(*x),), (0,))


def place_rows(dtype, device, rows=13, placed=7, width=2500) -> Case:
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:placed].to(device)
    inputs = (_random(device, rows, width, dtype=dtype), _random(device, placed, width, dtype=dtype), index)
    return Case(inputs, lambda kernels, *x: (kernels.place_rows(*x),), (0, 1))


def rms_norm(dtype, device, rows=5, width=300, eps=1e-6) -> Case:
    weight = 1 + 0.1 * _random(device, width)
    inputs = (_random(device, rows, 2, width, dtype=dtype), weight.to(dtype))
    return Case(inputs, lambda kernels, *x: (kernels.rms_norm(*x, eps),), (0, 1))


def layer_norm(dtype, device, rows=5, width=300, eps=1e-6) -> Case:
    weight, bias = 1 + 0.1 * _random(device, width), _random(device, width)
    inputs = (3 + _random(device, rows, 2, width, dtype=dtype), weight.to(dtype), bias.to(dtype))
    return Case(inputs, lambda kernels, *x: (kernels.layer_norm(*x, eps),), (0, 1, 2))


def swiglu(dtype, device, rows=5, width=1500) -> Case:
    return Case((_random(device, rows, 2 * width, dtype=dtype, scale=3.0),), lambda kernels, x: (kernels.swiglu(x),), (0,))


def cross_entropy(dtype, device, rows=6, width=9000, first_column=700, meaningless=200) -> Case:
    """Some labels lie in other ranks' columns; the last columns only pad the vocabulary."""
    logits = _random(device, rows, width, dtype=dtype, scale=4.0)
    logits[:, width - meaningless :] = float("-inf")
    labels = torch.arange(rows, device=device) * (width // 4) + 300  # the first below, the last above
    whole_lse = 2 + torch.logsumexp(logits.float(), dim=1)  # as if other ranks had more of it

    def function(kernels, logits, whole_lse, weights, labels):
        gradient = kernels.cross_entropy_gradient(logits, labels, first_column, whole_lse, weights)
        return *kernels.lse_and_target(logits, labels, first_column), gradient

    return Case((logits, whole_lse, _random(device, rows), labels), function)


CASES: dict[str, tuple[Callable[..., Case], dict]] = {
    "pack_qkv": (pack_qkv, {}),
    "pack_qkv one rank, odd head, no bias": (pack_qkv, dict(rows=1, heads=(7, 1), head_dim=10, ulysses_size=1, bias=False)),
    "pack_qkv as many keys as queries": (pack_qkv, dict(rows=70, heads=(4, 4), head_dim=8, ulysses_size=4)),
    "pack_qkv two parts": (pack_qkv, dict(rows=20, heads=(12, 4), parts=2)),
    "pack_qkv three parts, two heads each": (pack_qkv, dict(rows=33, heads=(24, 12), head_dim=8, parts=3)),
    "pack_qkv no rows": (pack_qkv, dict(rows=0)),
    "swap_into": (swap_into, {}),
    "swap_into wide": (swap_into, dict(ranks=2, rows=3, heads=9, head_dim=128)),
    "swap_into no rows": (swap_into, dict(rows=0)),
    "merge_into": (merge_into, {}),
    "take_rows": (take_rows, {}),
    "take_rows all": (take_rows, dict(rows=9, taken=9, width=8)),
    "take_rows none": (take_rows, dict(rows=3, taken=0)),
    "place_rows": (place_rows, {}),
    "place_rows none": (place_rows, dict(placed=0)),
    "rms_norm": (rms_norm, {}),
    "layer_norm": (layer_norm, {}),
    "swiglu": (swiglu, {}),
    "cross_entropy": (cross_entropy, {}),
}


def run(case: Case, kernels: Kernels, exact: bool = False) -> list[Tensor]:
    """Outputs, then gradients for one fixed gradient of the first output. `exact` computes in fp64."""
    inputs = [x.detach().double() if exact and x is not None and x.is_floating_point() else x for x in case.inputs]
    inputs = [x.detach().requires_grad_() if i in case.gradients else x for i, x in enumerate(inputs)]
    outputs = case.function(kernels, *inputs)
    if not case.gradients:
        return list(outputs)
    grad_out = _random("cpu", *outputs[0].shape).to(case.inputs[0].dtype).to(outputs[0].device, outputs[0].dtype)
    gradients = torch.autograd.grad(outputs, [inputs[i] for i in case.gradients], grad_out)
    return [output.detach() for output in outputs] + list(gradients)


def max_error(values: Tensor, right: Tensor) -> float:
    """Largest absolute difference; infinities have to be the same."""
    if not values.numel():
        return 0.0
    same = values.double() == right.double()
    return torch.where(same, 0.0, (values.double() - right.double()).abs()).nan_to_num(nan=float("inf")).max().item()


def check(case: Case) -> None:
    """Each output and gradient of Triton's kernel loses at most twice what the twin loses in the same dtype, and one ulp of the largest."""
    device = case.inputs[0].device
    reference = get_kernels("reference", device)
    results = run(case, get_kernels("triton", device)), run(case, reference), run(case, reference, exact=True)
    for place, (value, eager, right) in enumerate(zip(*results, strict=True)):
        assert value.shape == right.shape and value.dtype == eager.dtype, (place, value.shape, right.shape, value.dtype, eager.dtype)
        largest = right[right.isfinite()].abs().max().item() if right.isfinite().any() else 0.0
        bound = 2 * max_error(eager, right) + torch.finfo(value.dtype).eps * largest
        error = max_error(value, right)
        assert error <= bound, f"result {place} is off by {error:.2e}, allowed {bound:.2e}"
