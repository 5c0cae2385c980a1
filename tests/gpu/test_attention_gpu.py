"""cuDNN and flash on the GPU against fp64: whole blocks, and the ring's schedule with merged output and LSE (no transfers, one GPU).

The bound is twice what one call of torch's own scaled_dot_product_attention loses in bf16 on the same samples.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dense_attention import relative_error
from megatron_longvila.attention import ring
from megatron_longvila.attention.backends import Backend, get_backend
from megatron_longvila.kernels import reference
from megatron_longvila.parallel.plan import pad_samples, share_order

pytestmark = pytest.mark.gpu

HEADS = [(7, 1), (8, 2), (28, 4), (32, 8), (12, 2)]
PACKS = [(2048,), (1920,), (1000,), (8192,), (1024, 37, 1, 700, 333), (4096, 2, 3000)]
RECTANGLES = [(512, 4096), (4096, 512), (1000, 333), (1, 333), (333, 1), (3, 2), (1, 1)]
BACKENDS = ["cudnn", "flash"]
HEAD_DIM = 128
SCALE = 1 / math.sqrt(HEAD_DIM)
NAMES = ("out", "dq", "dk", "dv")


def _random_qkv(num_rows: int, heads: tuple[int, int], dtype=torch.bfloat16, device="cuda") -> tuple[Tensor, ...]:
    """q, k, v as views of one buffer, as the all-to-all delivers them, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(num_rows)
    packed = torch.randn(num_rows, heads[0] + 2 * heads[1], HEAD_DIM, generator=generator, dtype=dtype, device=device)
    grad_out = torch.randn(num_rows, heads[0], HEAD_DIM, generator=generator, dtype=dtype, device=device)
    return *packed.split((heads[0], heads[1], heads[1]), dim=1), grad_out


def _exact(q, k, v, grad_out, causal: bool) -> list[Tensor]:
    """[out, dq, dk, dv] of one block in fp64, in pieces that fit (the CPU tests check this twin against dense attention)."""
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    out, lse = reference.attention_forward(q, k, v, causal=causal, scale=SCALE)
    return [out, *reference.attention_backward(grad_out, q, k, v, out, lse, causal=causal, scale=SCALE)]


def _torch_sdpa(q, k, v, grad_out, causal: bool) -> list[Tensor]:
    """The same from torch's public function."""
    leaves = [x.detach().transpose(0, 1).unsqueeze(0).clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    out.backward(grad_out.transpose(0, 1).unsqueeze(0))
    return [x.squeeze(0).transpose(0, 1) for x in (out.detach(), *(leaf.grad for leaf in leaves))]


def _by_sample(function, tensors, lengths: tuple[int, ...]) -> list[Tensor]:
    """Apply a function of one causal block to every sample of a pack."""
    parts = [function(*piece, True) for piece in zip(*(x.split(lengths) for x in tensors), strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _ring_on_one_gpu(q, k, v, grad_out, layout, backend: Backend) -> list[Tensor]:
    """Every ring rank's blocks in turn; keys, values and their gradients are handed over in memory."""
    out, dq = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv = torch.zeros(k.shape[0], 2 * k.shape[1], HEAD_DIM, dtype=torch.float32, device=k.device)
    kv = torch.cat((k, v), dim=1)
    for rank in range(layout.ring_size):
        call = ring.RingCall(layout, rank, None, "all_gather", backend, SCALE)
        rows = torch.from_numpy(share_order(layout, rank)).to(q.device)
        own = (q[rows], k[rows], v[rows])
        forward = ring._Forward(*own, call)
        for block in ring.gathered_blocks(layout, rank):
            forward.add(block, kv[block.k])
        out[rows], lse = forward.result()
        backward = ring._Backward(grad_out[rows], *own, out[rows], lse, call)
        for block in ring.gathered_blocks(layout, rank):
            dkv[block.k] += backward.add(block, kv[block.k])
        dq[rows], dk, dv = (x.to(q.dtype) if x is backward.dq else x for x in (backward.dq, backward.dk, backward.dv))
        dkv[rows] += torch.cat((dk, dv), dim=1)
    return [out, dq, *dkv.to(q.dtype).chunk(2, dim=1)]


def check_ring(backend: Backend, heads: tuple[int, int], lengths: tuple[int, ...], device="cuda") -> None:
    """Ring sizes 1, 2 and 4 lose at most twice what one call of torch's attention loses."""
    for ring_size in (1, 2, 4):
        layout = pad_samples(lengths, ulysses_size=1, ring_size=ring_size)
        tensors = _random_qkv(layout.total_rows, heads, device=device)
        exact = _by_sample(_exact, tensors, layout.sample_lengths)
        eager = _by_sample(_torch_sdpa, tensors, layout.sample_lengths)
        allowed = [2 * relative_error(*pair) for pair in zip(eager, exact, strict=True)]
        values = _ring_on_one_gpu(*tensors, layout, backend)
        for name, value, right, bound in zip(NAMES, values, exact, allowed, strict=True):
            error = relative_error(value, right)
            assert error <= bound, f"{name} off by {error:.1e}, allowed {bound:.1e}: {backend.name}, ring {ring_size}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_merged_blocks_are_as_exact_as_one_call(name, heads, lengths):
    check_ring(get_backend(name), heads, lengths)


def check_rectangle(backend: Backend, num_rows: int, num_keys: int, device="cuda") -> None:
    """A block that no row shares with its own keys, output, LSE and gradients."""
    q, _, _, grad_out = _random_qkv(num_rows, (8, 2), device=device)
    _, k, v, _ = _random_qkv(num_keys, (8, 2), device=device)
    exact, eager = (function(q, k, v, grad_out, False) for function in (_exact, _torch_sdpa))
    out, lse = backend.forward(q, k, v, causal=False, scale=SCALE)
    assert lse.dtype == torch.float32 and lse.shape == (num_rows, 8)
    exact_lse = reference.attention_forward(q.double(), k.double(), v.double(), causal=False, scale=SCALE)[1]
    assert (lse - exact_lse).abs().max() < 1e-4  # fp32 sums of products of bf16 inputs; the LSE is below 10
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


@pytest.mark.parametrize("name", BACKENDS)
def test_no_host_sync_once_a_layout_is_known(name):
    layout = pad_samples((1024, 37, 700), ulysses_size=1, ring_size=1)
    q, k, v, grad_out = _random_qkv(layout.total_rows, (8, 2))
    call = ring.RingCall(layout, 0, None, "all_gather", get_backend(name), SCALE)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    ring.ring_attention(*leaves, call).backward(grad_out)  # plans and caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ring.ring_attention(*leaves, call).backward(grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
