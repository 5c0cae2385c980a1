"""Frequencies equal transformers' bit for bit; angles stay exact where fp32 products do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_longvila.config import LLMConfig, RopeScaling
from megatron_longvila.models.rope import inverse_frequencies, rotary_angles

transformers = pytest.importorskip("transformers")

LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SCALINGS = {"none": None, "linear": RopeScaling("linear", factor=4.0), "llama3": LLAMA3}


def hf_rope_parameters(llm: LLMConfig) -> dict:
    """The `rope_parameters` of a transformers config."""
    scaling = llm.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": llm.rotary_base}
    parameters = {"rope_type": scaling.type, "rope_theta": llm.rotary_base, "factor": scaling.factor}
    if scaling.type == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        parameters |= {name: getattr(scaling, name) for name in names}
    return parameters


def hf_rotary(llm: LLMConfig) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=llm.head_dim * 2, num_attention_heads=2, head_dim=llm.head_dim,
        max_position_embeddings=llm.max_position_embeddings, rope_parameters=hf_rope_parameters(llm),
    )  # fmt: skip
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base, head_dim", [(1e4, 64), (5e5, 128), (1e6, 128)])
def test_frequencies_equal_transformers(scaling, base, head_dim):
    llm = LLMConfig(rotary_base=base, head_dim=head_dim, rope_scaling=SCALINGS[scaling])
    expected = hf_rotary(llm).inv_freq
    assert torch.equal(inverse_frequencies(llm), expected)
    if scaling != "none":
        assert not torch.equal(inverse_frequencies(replace(llm, rope_scaling=None)), expected)


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
