"""cuDNN and flash on the GPU against fp64: whole blocks, and the ring's schedule with merged output and LSE (no transfers, one GPU).

    LONGVILA_GPU_TESTS=1 python -m pytest tests/gpu  # 128K, 512K and 1M tokens included

Up to 32K tokens every row is compared, and the bound is twice what one call of torch's own scaled_dot_product_attention loses in bf16 on
the same samples. Beyond, 64 rows (output, dQ) and 64 keys (dK, dV) are, and the bound is three roundings to bf16. Blocks of many heads, so
large that 32 bits do not count their values, are compared with the same heads in smaller calls.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import HEAD_DIM, NAMES, SCALE, random_qkv, ring_on_one_device, sampled_errors
from host_waits import later_step_never_waits

from dense_attention import relative_error
from megatron_longvila.attention import ring
from megatron_longvila.attention.attention_2d import attention_2d
from megatron_longvila.attention.backends import Backend, get_backend
from megatron_longvila.kernels import reference
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.parallel.plan import pad_samples

pytestmark = pytest.mark.gpu

HEADS = [(7, 1), (8, 2), (28, 4), (32, 8), (12, 2)]
PACKS = [(2048,), (1920,), (1000,), (8192,), (1024, 37, 1, 700, 333), (4096, 2, 3000)]
LONG_PACKS = [(32768,), (19991, 12777)]
SCHEDULES = [(1, "all_gather", None), (1, "all_gather", 8192), (2, "p2p", None), (4, "all_gather", None), (4, "p2p", 4096)]
RECTANGLES = [(512, 4096), (4096, 512), (1000, 333), (1, 333), (333, 1), (3, 2), (1, 1), (32768, 1024), (777, 32768)]
BACKENDS = ["cudnn", "flash"]
# The output is rounded to bf16, and so are the probabilities and their gradients before the products they enter: 2**-9 each.
SAMPLED_BOUND = 3 * 2**-9


def _exact(q, k, v, grad_out, causal: bool):
    """[out, dq, dk, dv] of one block in fp64, in pieces that fit (the CPU tests check this twin against dense attention)."""
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    pieces = dict(causal=causal, scale=SCALE, max_scores=1 << 28)
    out, lse = reference.attention_forward(q, k, v, **pieces)
    return [out, *reference.attention_backward(grad_out, q, k, v, out, lse, **pieces)]


def _torch_sdpa(q, k, v, grad_out, causal: bool):
    """The same from torch's public function."""
    leaves = [x.detach().transpose(0, 1).unsqueeze(0).clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    out.backward(grad_out.transpose(0, 1).unsqueeze(0))
    return [x.squeeze(0).transpose(0, 1) for x in (out.detach(), *(leaf.grad for leaf in leaves))]


def _by_sample(function, tensors, lengths: tuple[int, ...]):
    """Apply a function of one causal block to every sample of a pack."""
    parts = [function(*piece, True) for piece in zip(*(x.split(lengths) for x in tensors), strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _backend(name: str, tile: int | None) -> Backend:
    backend = get_backend(name)
    backend.forward_tile = tile
    return backend


def check_ring(name: str, heads: tuple[int, int], lengths: tuple[int, ...], device="cuda", schedules=SCHEDULES) -> None:
    """Every schedule loses at most twice what one call of torch's attention loses."""
    for ring_size, transport, tile in schedules:
        layout = pad_samples(lengths, ulysses_size=1, ring_size=ring_size)
        tensors = random_qkv(layout.total_rows, heads, device=device)
        exact = _by_sample(_exact, tensors, layout.sample_lengths)
        eager = _by_sample(_torch_sdpa, tensors, layout.sample_lengths)
        allowed = [2 * relative_error(*pair) for pair in zip(eager, exact, strict=True)]
        kernels = get_kernels("auto", torch.device(device))
        values = ring_on_one_device(tensors, layout, _backend(name, tile), transport, kernels)[:4]
        for part, value, right, bound in zip(NAMES, values, exact, allowed, strict=True):
            error = relative_error(value, right)
            assert error <= bound, f"{part} off by {error:.1e}, allowed {bound:.1e}: {name}, ring {ring_size} {transport}, tile {tile}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_merged_blocks_are_as_exact_as_one_call(name, heads, lengths):
    check_ring(name, heads, lengths)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", LONG_PACKS, ids=str)
@pytest.mark.parametrize("heads", [(7, 1), (32, 8)], ids=str)
def test_merged_blocks_are_as_exact_at_32k(name, heads, lengths):
    check_ring(name, heads, lengths, schedules=[SCHEDULES[1], SCHEDULES[3]])


def _require_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, {free:.0f} are there")


LONG = [
    *((128 << 10, heads, name, schedule) for heads in HEADS for name in BACKENDS for schedule in ((1, "all_gather", None),)),
    *((128 << 10, (7, 1), name, schedule) for name in BACKENDS for schedule in ((1, "all_gather", 32768), (4, "all_gather", None))),
    *((128 << 10, (28, 4), "cudnn", schedule) for schedule in ((2, "p2p", None), (4, "p2p", 16384))),
    *((512 << 10, (7, 1), name, schedule) for name in BACKENDS for schedule in ((1, "all_gather", None), (1, "all_gather", 32768))),
    (512 << 10, (28, 4), "cudnn", (1, "all_gather", None)),
    *((1024 << 10, (7, 1), "cudnn", schedule) for schedule in ((1, "all_gather", None), (1, "all_gather", 32768))),
    (1024 << 10, (7, 1), "flash", (1, "all_gather", None)),
    (1024 << 10, (32, 8), "cudnn", (1, "all_gather", None)),  # 2**32 values in q: past what an int32 can count
]


def check_sampled(name: str, heads: tuple[int, int], lengths: tuple[int, ...], schedule, device="cuda") -> None:
    """64 rows and 64 keys against fp64."""
    ring_size, transport, tile = schedule
    layout = pad_samples(lengths, ulysses_size=1, ring_size=ring_size)
    tensors = random_qkv(layout.total_rows, heads, device=device)
    kernels = get_kernels("auto", torch.device(device))
    values = ring_on_one_device(tensors, layout, _backend(name, tile), transport, kernels)
    errors = sampled_errors(tensors, values, layout)
    print(name, heads, lengths, schedule, {key: f"{error:.1e}" for key, error in errors.items()})
    assert errors.pop("lse") < 1e-4  # fp32 sums of products of bf16 inputs; the LSE is below 20
    assert max(errors.values()) <= SAMPLED_BOUND, errors


@pytest.mark.parametrize(("num_rows", "heads", "name", "schedule"), LONG, ids=str)
def test_sampled_rows_of_long_sequences(num_rows, heads, name, schedule):
    # q, out, their gradients and copies of them, and flash's dK and dV for all query heads
    _require_memory(num_rows * HEAD_DIM * (heads[0] * 18 + heads[1] * 24) / 2**30 + 4)
    check_sampled(name, heads, (num_rows,), schedule)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("schedule", [(1, "all_gather", None), (1, "all_gather", 8192), (4, "p2p", None)], ids=str)
def test_sampled_rows_of_a_long_pack(name, schedule):
    check_sampled(name, (8, 2), (65000, 37, 30011, 1, 128, 35895), schedule)


def check_rectangle(backend: Backend, num_rows: int, num_keys: int, device="cuda") -> None:
    """A block that no row shares with its own keys, output, LSE and gradients."""
    q, _, _, grad_out = random_qkv(num_rows, (8, 2), device=device)
    _, k, v, _ = random_qkv(num_keys, (8, 2), device=device)
    exact, eager = (function(q, k, v, grad_out, False) for function in (_exact, _torch_sdpa))
    out, lse = backend.forward(q, k, v, causal=False, scale=SCALE)
    assert lse.dtype == torch.float32 and lse.shape == (num_rows, 8)
    exact_lse = reference.attention_forward(q.double(), k.double(), v.double(), causal=False, scale=SCALE)[1]
    assert (lse - exact_lse).abs().max() < 1e-4  # fp32 sums of products of bf16 inputs; the LSE is below 20
    values = (out, *backend.backward(grad_out, q, k, v, out, lse, causal=False, scale=SCALE))
    for name, value, right, peer in zip(NAMES, values, exact, eager, strict=True):
        assert value.shape == right.shape and value.dtype == torch.bfloat16
        # One ulp of the largest value on top, and the fp32 noise that is left where the exact gradient is zero (dq and dk with one key).
        bound = 2 * (peer - right).abs().max() + 2**-8 * right.abs().max() + 1e-4
        assert (value - right).abs().max() <= bound, name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("num_rows", "num_keys"), RECTANGLES)
def test_rectangles(name, num_rows, num_keys):
    check_rectangle(get_backend(name), num_rows, num_keys)


# rows, keys, heads: 2**32, 1.25 * 2**31 and 2**31 values of queries; 2**32 of keys, once each query head has its own
WIDE = [(1 << 16, 1 << 16, heads) for heads in ((512, 128), (320, 80), (256, 64))] + [(1 << 13, 1 << 19, (64, 16))]


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Norm of each head of [T, N, ...]: [N]."""
    return x.transpose(0, 1).flatten(1).norm(dim=1)


def wide_errors(backend: Backend, num_rows: int, num_keys: int, heads: tuple[int, int], parts: int = 4) -> dict[str, float]:
    """Largest relative difference of a head's 1,024 rows between one call for all heads and a call for each of `parts` groups of them.

    A fault of all calls does not show here: `test_sampled_rows_of_long_sequences` has the like against fp64.
    """
    q, _, _, grad_out = random_qkv(num_rows, heads)
    _, k, v, _ = random_qkv(num_keys, (1, heads[1]))
    call = dict(causal=num_rows == num_keys, scale=SCALE)
    out, lse = backend.forward(q, k, v, **call)
    whole = (out, lse, *backend.backward(grad_out, q, k, v, out, lse, **call))
    errors = {name: [] for name in (NAMES[0], "lse", *NAMES[1:])}
    for index, (go, *qkv) in enumerate(zip(*(x.chunk(parts, dim=1) for x in (grad_out, q, k, v)), strict=True)):
        right = backend.forward(*qkv, **call)
        for name, value, part in zip(errors, whole, (*right, *backend.backward(go, *qkv, *right, **call)), strict=True):
            pairs = zip(value.chunk(parts, dim=1)[index].split(1024), part.split(1024), strict=True)
            errors[name] += [_norms(one.float() - two.float()) / _norms(two.float()) for one, two in pairs]
    return {name: torch.stack(found).amax().item() for name, found in errors.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("num_rows", "num_keys", "heads"), WIDE, ids=str)
def test_more_values_than_32_bits_count(name, num_rows, num_keys, heads):
    # bf16: q, out, their gradients twice, and fp32 sums of dQ; k and v, and of each query head, their gradients
    _require_memory(HEAD_DIM * (num_rows * heads[0] * 16 + num_keys * (heads[1] * 8 + heads[0] * 4)) / 2**30 + 4)
    errors = wide_errors(get_backend(name), num_rows, num_keys, heads)
    print(name, num_rows, num_keys, heads, {key: f"{error:.1e}" for key, error in errors.items()})
    assert all(error <= 2**-7 for error in errors.values()), errors  # bf16, and sums in another order; a NaN is not below


@pytest.mark.parametrize("name", BACKENDS)
def test_no_host_sync_once_a_layout_is_known(name):
    layout = pad_samples((1024, 37, 700), ulysses_size=1, ring_size=1)
    q, k, v, grad_out = random_qkv(layout.total_rows, (8, 2))
    call = ring.RingCall(layout, 0, None, "all_gather", _backend(name, 256), SCALE, get_kernels("auto", q.device))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    later_step_never_waits(lambda: attention_2d(*leaves, call, None).backward(grad_out))
