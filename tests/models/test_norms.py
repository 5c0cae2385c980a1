"""Norms round like transformers' and carry Megatron's sequence-parallel mark."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_longvila.models.norms import LayerNorm, RMSNorm


def norm_config(dtype=torch.float32, sequence_parallel=False):
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype):
    qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(7, 2, 96, generator=generator)).to(dtype)
    weight = torch.randn(96, generator=generator).to(dtype)
    outputs, grads = [], []
    for norm in (RMSNorm(norm_config(dtype), 96, eps=1e-6), qwen2.Qwen2RMSNorm(96, eps=1e-6).to(dtype)):
        norm.weight.data.copy_(weight)
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.float().square().sum().backward()
        outputs.append(out)
        grads.append((leaf.grad.float(), norm.weight.grad.float()))
    # The same fp32 mean may be summed in another order, so one rounding of the result may differ.
    assert (outputs[0] - outputs[1]).abs().max() <= torch.finfo(dtype).eps * outputs[1].abs().max()
    for ours, expected in zip(*grads, strict=True):
        assert (ours - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_layer_norm_equals_torch():
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    norm = LayerNorm(norm_config(), 40, eps=1e-3)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-3).sqrt() * norm.weight + norm.bias)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("norm_class", [RMSNorm, LayerNorm])
def test_parameters_are_marked_for_the_sum_over_tp(norm_class, sequence_parallel):
    norm = norm_class(norm_config(torch.bfloat16, sequence_parallel), 8)
    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * len(list(norm.parameters()))
    assert all(p.dtype == torch.bfloat16 for p in norm.parameters())
