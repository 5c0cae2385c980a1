"""Every Triton kernel on the GPU against its twin and fp64: small odd shapes, the shapes of Qwen2-7B, and more than 2^31 values."""

import kernel_cases
import pytest
import torch
from host_waits import later_step_never_waits
from kernel_cases import CASES, check

from megatron_longvila.kernels.choice import get_kernels

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Qwen2-7B, 4096 rows of a rank; SigLIP so400m, four frames.
FULL_SIZE = {
    "pack_qkv": dict(rows=4096, heads=(28, 4), head_dim=128, ulysses_size=4),
    "swap_into": dict(ranks=4, rows=4096, heads=7, head_dim=128),
    "merge_into": dict(rows=4096, heads=28, head_dim=128),
    "take_rows": dict(rows=4096, taken=4000, width=3584),
    "place_rows": dict(rows=4096, placed=4000, width=3584),
    "rms_norm": dict(rows=2048, width=3584),
    "layer_norm": dict(rows=2048, width=1152),
    "swiglu": dict(rows=1024, width=18944),
    "cross_entropy": dict(rows=256, width=152064, meaningless=416),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_small(name, dtype):
    build, sizes = CASES[name]
    check(build(DTYPES[dtype], torch.device("cuda"), **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name, dtype):
    check(getattr(kernel_cases, name)(DTYPES[dtype], torch.device("cuda"), **FULL_SIZE[name]))


def _merged(kernels, block_out_TNH):
    """The blocks folded into themselves with LSEs that grow with the head."""
    out, lse = block_out_TNH.float(), torch.arange(28.0, device=block_out_TNH.device).repeat(len(block_out_TNH), 1)
    kernels.merge_into(out, lse, 2 * block_out_TNH, lse.flip(1))
    return out


def _swapped(kernels, x_TUNH):
    """From rows to a block for each rank and back into one part of twice as wide rows."""
    blocks_UTNH = x_TUNH.new_empty(x_TUNH.shape[1], x_TUNH.shape[0], *x_TUNH.shape[2:])
    kernels.swap_into(blocks_UTNH, x_TUNH)
    wide_TUPNH = x_TUNH.new_zeros(*x_TUNH.shape[:2], 2, *x_TUNH.shape[2:])
    kernels.swap_into(wide_TUPNH[:, :, 1], blocks_UTNH)
    return wide_TUPNH


def _cross_entropy_gradient(kernels, logits_LV):
    labels = torch.full((len(logits_LV),), 150_000, device=logits_LV.device)
    lse, target = kernels.lse_and_target(logits_LV, labels, 0)
    return kernels.cross_entropy_gradient(logits_LV, labels, 0, lse, lse - target)


# Each row of the result depends on its own row alone, so the last rows must come out the same when they are computed by themselves.
ROW_WISE = {
    "pack_qkv": ((480_000, 4608), lambda k, x: k.pack_qkv(x, None, x[:, :128].float(), 4, 1)[0, 0]),
    "pack_qkv's last rank": ((480_000, 4608), lambda k, x: k.pack_qkv(x, None, x[:, :128].float(), 4, 4)[0, 3]),
    "pack_qkv's last part": ((480_000, 4608), lambda k, x: k.pack_qkv(x, None, x[:, :128].float(), 4, 2, 2)[1, 1]),
    "swap_into": ((310_000, 2, 28, 128), _swapped),
    "merge_into": ((610_000, 28, 128), _merged),
    "take_rows": ((610_000, 3584), lambda k, x: k.take_rows(x, torch.arange(len(x), device=x.device))),
    "place_rows": ((610_000, 3584), lambda k, x: k.place_rows(x, 3 * x[-1:], torch.full((1,), len(x) - 1, device=x.device))),
    "rms_norm": ((610_000, 3584), lambda k, x: k.rms_norm(x, x.new_full((3584,), 1.5), 1e-6)),
    "layer_norm": ((1_900_000, 1152), lambda k, x: k.layer_norm(x, x.new_full((1152,), 1.5), x.new_full((1152,), 0.5), 1e-6)),
    "swiglu": ((57_000, 37_888), lambda k, x: k.swiglu(x)),
    "cross_entropy": ((14_500, 152_064), _cross_entropy_gradient),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_more_values_than_32_bits_count(name):
    shape, function = ROW_WISE[name]
    kernels = get_kernels("triton", torch.device("cuda"))
    whole = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    assert whole.numel() > 2**31
    results = []
    for x in (whole, whole[-64:].clone()):
        leaf = x.detach().requires_grad_()
        out = function(kernels, leaf)
        result = [out.detach()[-64:]]
        if out.requires_grad and name not in ("merge_into", "cross_entropy"):
            result += [grad[-64:] for grad in torch.autograd.grad(out, leaf, torch.ones_like(out))]
        results.append(result)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_no_host_sync(name):
    device = torch.device("cuda")
    case = getattr(kernel_cases, name)(torch.bfloat16, device, **FULL_SIZE[name])
    kernels = get_kernels("triton", device)
    leaves = [x.detach().requires_grad_() if i in case.gradients else x for i, x in enumerate(case.inputs)]

    def step():
        outputs = case.function(kernels, *leaves)
        if case.gradients:
            torch.autograd.grad(outputs, [leaves[i] for i in case.gradients], torch.ones_like(outputs[0]))

    later_step_never_waits(step)
