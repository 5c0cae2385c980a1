"""Choosing a backend, and refusing private operations that changed."""

import pytest
import torch

from megatron_longvila import platform
from megatron_longvila.attention import backends


@pytest.mark.skipif(not platform.is_cpu(), reason="about machines without a GPU")
def test_a_cpu_gets_the_reference_and_refuses_the_gpu_backends():
    assert backends.get_backend("auto").name == "reference"
    for name in ("cudnn", "flash"):
        with pytest.raises(ValueError, match=f"{name}.*needs an NVIDIA GPU.*'reference' or 'auto'"):
            backends.get_backend(name)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'fast' is unknown.*cudnn.*flash.*reference.*auto"):
        backends.get_backend("fast")


def test_the_schemas_of_the_installed_torch_are_accepted():
    backends.check_schemas(*backends.ACCEPTED_SCHEMAS)
    assert all(backends.live_schemas().values())


@pytest.mark.parametrize("live", ["aten::op(Tensor q) -> Tensor", ""])
def test_a_changed_or_missing_operation_is_refused_with_both_schemas(monkeypatch, live):
    name = "_scaled_dot_product_flash_attention"
    monkeypatch.setattr(backends, "live_schemas", lambda: {name: live})
    with pytest.raises(RuntimeError) as caught:
        backends.check_schemas(name)
    for words in (torch.__version__, live or "missing", backends.ACCEPTED_SCHEMAS[name][0], "'reference'"):
        assert words in str(caught.value)


@pytest.mark.parametrize("backend", [backends.CudnnBackend, backends.FlashBackend])
@pytest.mark.parametrize(("num_rows", "num_keys", "causal"), [(24, 24, True), (24, 40, False)])
def test_the_private_operations_take_our_arguments(backend, num_rows, num_keys, causal):
    """On meta tensors: argument order, shapes and dtypes of the real operations, without a GPU. tests/gpu checks the numbers."""
    backend = object.__new__(backend)  # the constructor refuses a machine without a GPU
    packed = torch.empty(num_rows, 12, 64, dtype=torch.bfloat16, device="meta")
    q = packed[:, :8]  # strided, as the all-to-all delivers it
    k, v = torch.empty(2, num_keys, 2, 64, dtype=torch.bfloat16, device="meta")
    out, lse = backend.forward(q, k, v, causal=causal, scale=0.1)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, torch.bfloat16, (num_rows, 8), torch.float32)
    dq, dk, dv = backend.backward(torch.empty_like(out), q, k, v, out, lse, causal=causal, scale=0.1)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


def test_heads_that_a_gpu_backend_cannot_do_are_refused_with_the_way_out():
    cudnn = object.__new__(backends.CudnnBackend)  # the constructor refuses a machine without a GPU
    with pytest.raises(ValueError, match="bfloat16 or float16, not torch.float32.*'reference'"):
        cudnn.check(head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="head_dim=192 .*at most 128.*flash"):
        cudnn.check(head_dim=192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head_dim=60 .*multiple of 8"):
        cudnn.check(head_dim=60, dtype=torch.bfloat16)
    cudnn.check(head_dim=128, dtype=torch.bfloat16)
