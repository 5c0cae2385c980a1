"""Frequencies equal transformers' bit for bit; angles stay exact where fp32 products do not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_longvila.config import LLMConfig, RopeScaling
from megatron_longvila.models.rope import inverse_frequencies, rotary_angles, rotary_table, softmax_scale

transformers = pytest.importorskip("transformers")

SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", factor=4.0),
    "dynamic": RopeScaling("dynamic", factor=2.0, original_max_position_embeddings=8192),
    "llama3": RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn, all named": RopeScaling(
        "yarn", factor=16.0, original_max_position_embeddings=2048, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5
    ),
    "yarn, factor 1": RopeScaling("yarn", factor=1.0, original_max_position_embeddings=8192),
    "yarn, ramp of no width": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=21.0, beta_slow=20.5),
}


def hf_config(llm: LLMConfig):
    """The transformers config of `llm`'s rotary embedding; `dynamic` scales beyond its max_position_embeddings there."""
    scaling, max_positions = llm.rope_scaling, llm.max_position_embeddings
    rope = {"rope_type": scaling.type if scaling else "default", "rope_theta": llm.rotary_base}
    fields = {
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("beta_fast", "beta_slow", "original_max_position_embeddings"),
    }
    if scaling is not None:
        rope |= {name: getattr(scaling, name) for name in ("factor", *fields.get(scaling.type, ()))}
        rope |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
        max_positions = scaling.original_max_position_embeddings if scaling.type == "dynamic" else max_positions
    return transformers.LlamaConfig(
        hidden_size=llm.head_dim * 2, num_attention_heads=2, head_dim=llm.head_dim, max_position_embeddings=max_positions,
        rope_parameters=rope,
    )  # fmt: skip


def hf_rotary(llm: LLMConfig) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(hf_config(llm))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base, head_dim", [(1e4, 64), (5e5, 128), (1e6, 128), (3_580_165_449, 128)])
def test_frequencies_equal_transformers(scaling, base, head_dim):
    llm = LLMConfig(rotary_base=base, head_dim=head_dim, rope_scaling=SCALINGS[scaling])
    rotary = hf_rotary(llm)
    assert torch.equal(inverse_frequencies(llm), rotary.inv_freq)
    scale = softmax_scale(llm) or head_dim**-0.5
    assert scale == pytest.approx(rotary.attention_scaling**2 * head_dim**-0.5, rel=1e-15)
    plain = replace(llm, rope_scaling=None)
    if scaling not in ("none", "dynamic", "yarn, factor 1"):  # which change nothing within the trained length, or at all
        assert not torch.equal(inverse_frequencies(plain), rotary.inv_freq)


@pytest.mark.parametrize("length", [1, 8192, 8193, 100_000, 1_176_000])
def test_dynamic_frequencies_follow_the_length_as_transformers_do(length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llm = LLMConfig(rope_scaling=SCALINGS["dynamic"])
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf_config(llm), torch.device("cpu"), seq_len=length)
    assert torch.equal(inverse_frequencies(llm, length), expected)
    assert torch.equal(expected, inverse_frequencies(replace(llm, rope_scaling=None))) == (length <= 8192)


@pytest.mark.parametrize("length", [0, 40_000, 1_176_000])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "dynamic"])
def test_a_longer_context_alone_changes_nothing(scaling, length):
    llm = LLMConfig(rope_scaling=SCALINGS[scaling])
    longer = replace(llm, max_position_embeddings=1_048_576)
    assert torch.equal(inverse_frequencies(llm), inverse_frequencies(longer, length))
    assert softmax_scale(llm) == softmax_scale(longer)


def test_angles_are_exact_beyond_a_million_positions():
    inv_freq = inverse_frequencies(LLMConfig())
    positions = torch.tensor([0, 1, 402_432, 1_176_000, 2_097_151])
    angles = rotary_angles(positions, inv_freq)[:, 0, 0, : len(inv_freq)]
    assert angles.dtype == torch.float32 and angles.abs().max() <= np.pi
    exact = np.outer(positions.numpy().astype(np.longdouble), inv_freq.numpy().astype(np.longdouble))
    # Half a unit in the last place of an fp32 number in [2, 4), and as much again for pi itself rounded to fp64 over 2e6 / 2 pi turns.
    bound = 2**-23 + 1e-9
    for ours, reference in ((angles.double().cos(), np.cos(exact)), (angles.double().sin(), np.sin(exact))):
        assert np.abs(ours.numpy() - reference.astype(np.float64)).max() <= bound
    naive = torch.outer(positions.float(), inv_freq).double().cos().numpy()
    assert np.abs(naive - np.cos(exact).astype(np.float64)).max() > 1e-3  # what the fp64 product is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_queries_equal_transformers(dtype):
    import megatron_longvila.platform.mcore  # noqa: F401  isort: skip  (fixes before the first Megatron import)
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    llm = LLMConfig(head_dim=64)
    positions = torch.tensor([0, 5, 3, 63, 17])
    q_TNH = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = hf_rotary(llm)(q_TNH, positions[None])
    expected_BNTH, _ = apply_rotary_pos_emb(q_TNH.transpose(0, 1)[None], q_TNH.transpose(0, 1)[None], cos, sin)
    got_T1NH = _apply_rotary_pos_emb_bshd(q_TNH[:, None], rotary_angles(positions, inverse_frequencies(llm)))
    assert got_T1NH.dtype == dtype
    # Angles below 64 differ by at most 4e-6 (fp32 product against the rounded exact one): the cosine may round to a neighbour.
    error = (got_T1NH[:, 0] - expected_BNTH[0].transpose(0, 1)).abs().max()
    assert error <= q_TNH.abs().max() * (2 * torch.finfo(dtype).eps + 1e-5)


def test_the_table_of_the_fused_kernel_is_exact_beyond_a_million_positions():
    """Cosine and sine of the exact angle, in fp64 from Python's own functions, to half an ulp of fp32."""
    positions, inv_freq = torch.tensor([0, 1, 999_983, 3_000_017]), inverse_frequencies(LLMConfig(head_dim=8))
    table = rotary_table(positions, inv_freq)
    assert table.shape == (4, 1, 1, 8) and table.dtype == torch.float32
    angles = [[int(position) * float(frequency) for frequency in inv_freq] for position in positions]
    exact = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles], dtype=torch.float64)
    assert (table[:, 0, 0].double() - exact).abs().max() <= 2**-25
