"""Choosing a backend, and refusing private operations that changed."""

import pytest
import torch

from megatron_longvila import platform
from megatron_longvila.attention import backends, schemas


@pytest.mark.skipif(not platform.is_cpu(), reason="about machines without a GPU")
def test_a_cpu_gets_its_own_kernel_and_refuses_those_of_a_gpu():
    assert backends.get_backend("auto").name == "cpu"
    for name in ("cudnn", "flash"):
        with pytest.raises(ValueError, match=f"{name}.*needs an NVIDIA GPU.*'reference' or 'auto'"):
            backends.get_backend(name)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'fast' is unknown.*cudnn.*flash.*reference.*auto"):
        backends.get_backend("fast")


def test_the_schemas_of_the_installed_torch_are_accepted():
    schemas.check_schemas(*schemas.ACCEPTED_SCHEMAS)
    assert all(schemas.live_schemas().values())


@pytest.mark.skipif(not platform.is_cpu(), reason="the CPU's kernel")
@pytest.mark.parametrize("shape", [(1, 1, True), (37, 37, True), (600, 600, True), (24, 41, False), (5, 1, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cpu_kernel_equals_the_reference_with_a_merged_lse(dtype, shape):
    """Output and LSE of one block; gradients for an output and an LSE that saw other keys too, given in both memory orders."""
    num_rows, num_keys, causal = shape
    backend, twin = backends.get_backend("cpu"), backends.get_backend("reference")
    generator = torch.Generator().manual_seed(num_rows)
    # Strided views, as the all-to-all delivers them.
    q, k, v = torch.randn(max(num_rows, num_keys), 10, 16, dtype=dtype, generator=generator).split([6, 2, 2], dim=1)
    q, k, v = q[:num_rows], k[:num_keys], v[:num_keys]
    grad_out = torch.randn(q.shape, dtype=dtype, generator=generator)
    out, lse = backend.forward(q, k, v, causal=causal, scale=0.3)
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype is torch.float64 else dict(rtol=1e-5, atol=1e-5)
    for value, expected in zip((out, lse), twin.forward(q, k, v, causal=causal, scale=0.3), strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, **tolerance)
    out, lse = out + 0.1 * grad_out, lse + 0.7
    expected = twin.backward(grad_out, q, k, v, out, lse, causal=causal, scale=0.3)
    for order in (lse.contiguous(), lse.t().contiguous().t()):
        for gradient, right in zip(backend.backward(grad_out, q, k, v, out, order, causal=causal, scale=0.3), expected, strict=True):
            assert gradient.shape == right.shape
            torch.testing.assert_close(gradient, right, **tolerance)
    with pytest.raises(ValueError, match="float16.*'reference'"):
        backend.check(head_dim=16, dtype=torch.float16)


@pytest.mark.parametrize("live", ["aten::op(Tensor q) -> Tensor", ""])
def test_a_changed_or_missing_operation_is_refused_with_both_schemas(monkeypatch, live):
    name = "_scaled_dot_product_flash_attention"
    monkeypatch.setattr(schemas, "live_schemas", lambda: {name: live})
    with pytest.raises(RuntimeError) as caught:
        schemas.check_schemas(name)
    for words in (torch.__version__, live or "missing", schemas.ACCEPTED_SCHEMAS[name][0], "'reference'"):
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
    sizes = (7, 1, 16), (7, 1, num_keys - 8)
    out, lse = backend.forward_packed(q, k, v, *sizes, causal=causal, scale=0.1)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, torch.bfloat16, (num_rows, 8), torch.float32)
    grads = backend.backward_packed(torch.empty_like(out), q, k, v, out, lse, *sizes, causal=causal, scale=0.1)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_heads_that_a_gpu_backend_cannot_do_are_refused_with_the_way_out():
    cudnn = object.__new__(backends.CudnnBackend)  # the constructor refuses a machine without a GPU
    with pytest.raises(ValueError, match="bfloat16 or float16, not torch.float32.*'reference'"):
        cudnn.check(head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match="head_dim=192 .*at most 128.*flash"):
        cudnn.check(head_dim=192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head_dim=60 .*multiple of 8"):
        cudnn.check(head_dim=60, dtype=torch.bfloat16)
    cudnn.check(head_dim=128, dtype=torch.bfloat16)


def reference_inside(monkeypatch, limit: int) -> tuple[backends.CudnnBackend, list[int]]:
    """(cuDNN's backend with the reference's products inside, the key/value heads of each backward call)."""
    seen = []

    def products(self, grad_out, q, k, v, out, lse, causal, scale):
        seen.append(k.shape[1])
        return backends.reference.attention_backward(grad_out, q, k, v, out, lse, causal=causal, scale=scale)

    monkeypatch.setattr(backends.CudnnBackend, "_backward_call", products)
    monkeypatch.setattr(backends, "MAX_BACKWARD_VALUES", limit)
    return object.__new__(backends.CudnnBackend), seen  # the constructor refuses a machine without a GPU


# key/value heads with 3 query heads of 8 values each, on 256 rows: 6,144 values a key/value head
@pytest.mark.parametrize(("limit", "num_kv_heads", "calls"), [(4, 4, 1), (3, 4, 2), (2, 4, 2), (1, 4, 4), (3, 6, 2), (2, 6, 3), (1, 1, 1)])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(256, 256), (201, 201), (201, 24)])
def test_large_blocks_take_a_backward_call_of_cudnn_for_each_group_of_heads(monkeypatch, num_rows, num_keys, limit, num_kv_heads, calls):
    """In fp64; rows are filled up to 256 before they are counted."""
    backend, seen = reference_inside(monkeypatch, limit * 6144)
    twin, call = backends.get_backend("reference"), dict(causal=num_rows == num_keys, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    q, grad_out = torch.randn(2, num_rows, 3 * num_kv_heads, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, num_keys, num_kv_heads, 8, dtype=torch.float64, generator=generator)
    saved = q, k, v, *twin.forward(q, k, v, **call)
    grads = backend.backward(grad_out, *saved, **call), twin.backward(grad_out, *saved, **call)
    for value, right in zip(*grads, strict=True):
        torch.testing.assert_close(value, right)
    assert seen == [num_kv_heads // calls] * calls


def test_a_key_value_head_that_is_too_much_by_itself_is_refused(monkeypatch):
    backend, _ = reference_inside(monkeypatch, 6143)
    q, k, lse = torch.randn(201, 6, 8), torch.randn(201, 2, 8), torch.randn(201, 6)
    with pytest.raises(ValueError, match="at most 6143 values in backward, but one .* has 6144 .* raise parallel.ring_size or .*'flash'"):
        backend.backward(q, q, k, k, q, lse, causal=True, scale=0.3)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_backward_of_cudnn_gets_output_and_gradient_without_gaps(monkeypatch, calls):
    """torch would take the plan of an earlier call with the same q, k and v for an output with other strides."""
    seen = []

    def operation(grad_out, q, k, v, out, *_, **__):
        seen.extend(x.transpose(1, 2).is_contiguous() for x in (grad_out, out))
        return tuple(torch.empty_like(x) for x in (q, k, v))

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", operation)
    monkeypatch.setattr(backends, "MAX_BACKWARD_VALUES", 256 * 4 * 64 // calls)
    backend = object.__new__(backends.CudnnBackend)  # the constructor refuses a machine without a GPU
    q, grad_out, out = torch.empty(3, 256, 8, 64, dtype=torch.bfloat16, device="meta")[:, :, 2:6].unbind()
    k, v = torch.empty(2, 256, 2, 64, dtype=torch.bfloat16, device="meta")
    backend.backward(grad_out, q, k, v, out, torch.empty(256, 4, device="meta"), causal=True, scale=0.1)
    assert seen == [True, True] * calls


@pytest.mark.parametrize("num_rows", [1, 15, 16, 37])
@pytest.mark.parametrize("num_keys", [None, 24])
def test_rows_that_fill_a_block_up_change_nothing(num_rows, num_keys):
    """With the reference's products inside, in fp64; `num_keys` None is a causal block."""

    class Filling(backends._AtenBackend):
        row_multiple = 16
        seen: list[int] = []

        def _forward(self, q, k, v, causal, scale):
            self.seen.append(q.shape[0])
            return backends.reference.attention_forward(q, k, v, causal=causal, scale=scale)

        def _backward(self, grad_out, q, k, v, out, lse, causal, scale):
            self.seen.append(q.shape[0])
            return backends.reference.attention_backward(grad_out, q, k, v, out, lse, causal=causal, scale=scale)

    backend, twin = object.__new__(Filling), backends.get_backend("reference")
    call = dict(causal=num_keys is None, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    q, grad_out = torch.randn(2, num_rows, 6, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, num_keys or num_rows, 2, 8, dtype=torch.float64, generator=generator)
    out, lse = backend.forward(q, k, v, **call)
    expected = twin.forward(q, k, v, **call)
    got = (out, lse, *backend.backward(grad_out, q, k, v, out, lse, **call))
    for value, right in zip(got, (*expected, *twin.backward(grad_out, q, k, v, *expected, **call)), strict=True):
        assert value.shape == right.shape
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)
    assert set(backend.seen) == {-(-num_rows // 16) * 16}
