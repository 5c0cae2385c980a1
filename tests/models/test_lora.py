"""One adapted linear against the formula of LoRA, on Megatron's linear and on one that contains the norm before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_longvila.config import LoraConfig
from oracle import tiny_config
from ranks import run_ranks


def _against_formula(rank, fused_norm, targets):
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from megatron_longvila.checkpoint.hf import split_qkv
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.models.lora import adapt, is_adapter
    from megatron_longvila.models.transformer_config import transformer_config
    from megatron_longvila.parallel.groups import initialize_groups

    class NormedLinear(ColumnParallelLinear):
        """Like Transformer Engine's: the norm's weight is a parameter of the linear."""

        def __init__(self, input_size, *args, **kwargs):
            super().__init__(input_size, *args, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))

        def forward(self, x):
            return super().forward(torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon))

    config = transformer_config(tiny_config(), initialize_groups(Mesh(1, 1, 1, 1, 1), timeout_s=60))
    spec = SimpleNamespace(linear_qkv=NormedLinear if fused_norm else ColumnParallelLinear, linear_proj=RowParallelLinear)
    before = dict(vars(spec))
    adapt(spec, LoraConfig())
    assert vars(spec) == before  # rank 0 builds nothing
    adapt(spec, LoraConfig(rank=3, alpha=6.0, targets=list(targets)))
    if not set(targets) & set("qkv"):
        assert spec.linear_qkv is before["linear_qkv"]
        return
    assert (spec.linear_proj is not RowParallelLinear) == ("o" in targets)
    heads, groups, dim, hidden = 8, 4, 16, 64
    tp_group = torch.distributed.group.WORLD
    linear = spec.linear_qkv(
        hidden, (heads + 2 * groups) * dim, config=config, init_method=config.init_method, bias=True, gather_output=False,
        skip_bias_add=False, tp_group=tp_group,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    assert {name for name, _ in linear.named_parameters() if "lora" in name} == {f"lora.{t}.{m}" for t in targets if t != "o" for m in "AB"}
    assert all(is_adapter(f"x.layers.3.self_attention.linear_qkv.{n}") == ("lora" in n) for n, _ in linear.named_parameters())

    x = torch.randn(5, 1, hidden, generator=generator)
    normed = torch.nn.functional.rms_norm(x, (hidden,), linear.layer_norm_weight, config.layernorm_epsilon) if fused_norm else x
    got = split_qkv(linear(x)[0].flatten(0, 1).t(), groups, dim)
    weights, biases = split_qkv(linear.weight, groups, dim), split_qkv(linear.bias, groups, dim)
    for part, found, weight, bias in zip("qkv", got, weights, biases, strict=True):
        want = normed[:, 0] @ weight.t() + bias
        if part in targets:
            want = want + 6.0 / 3 * (normed[:, 0] @ linear.lora[part].A.t() @ linear.lora[part].B.t())
        assert (found.t() - want).abs().max() <= 1e-5 * want.abs().max(), part


@pytest.mark.parametrize("fused_norm", [False, True])
@pytest.mark.parametrize("targets", ["qkvo", "vq", "o"])
def test_adapted_linear_is_the_formula(fused_norm, targets):
    run_ranks(_against_formula, 1, fused_norm, targets)
