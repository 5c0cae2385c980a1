"""Rotary angles from explicit positions: any order, any packing, exact beyond a million positions.

Base and scaling come from the configuration alone (and from there into the checkpoint): no length changes them, but for `dynamic` scaling
where it is configured.

Shapes: T rows, H head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_longvila.config import LLMConfig, RopeScaling


def inverse_frequencies(llm: LLMConfig, length: int = 0) -> Tensor:
    """fp32 [H / 2] on the CPU: base ** (-2i / H), rescaled by `llm.rope_scaling`. Bit-equal to transformers' rotary initialisers.

    Args:
        length: tokens of the row's longest sample; only `dynamic` scaling looks at it.
    """
    scaling = llm.rope_scaling
    base = llm.rotary_base
    if scaling is not None and scaling.type == "dynamic":
        base = _dynamic_base(llm, scaling, length)
    powers = base ** (torch.arange(0, llm.head_dim, 2, dtype=torch.int64).to(torch.float32) / llm.head_dim)
    frequencies = 1.0 / powers
    if scaling is None or scaling.type == "dynamic":
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        # Not frequencies / factor, which rounds twice where transformers rounds once.
        kept_share = _yarn_kept_share(llm, scaling)
        return 1.0 / (scaling.factor * powers) * (1 - kept_share) + frequencies * kept_share
    return _scale_llama3(frequencies, scaling)


def softmax_scale(llm: LLMConfig) -> float | None:
    """What attention multiplies logits by; None is the usual 1 / sqrt(H).

    YaRN multiplies the cosine and sine of queries and keys by an attention factor. Both together multiply each logit by its square, so the
    square goes here: exact in real numbers, in fp32 whatever the activations' dtype, and no operation more.
    Source: YaRN (arXiv 2309.00071, section 3.4), whose "temperature" this is.
    """
    scaling = llm.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return None
    attention_factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return attention_factor**2 / math.sqrt(llm.head_dim)


def _dynamic_base(llm: LLMConfig, scaling: RopeScaling, length: int) -> float:
    """NTK-aware: the base that stretches the longest wavelength by factor * length / trained - (factor - 1), from the trained length on."""
    trained_length = scaling.original_max_position_embeddings
    stretch = scaling.factor * max(length, trained_length) / trained_length - (scaling.factor - 1)
    return llm.rotary_base * stretch ** (llm.head_dim / (llm.head_dim - 2))


def _yarn_kept_share(llm: LLMConfig, scaling: RopeScaling) -> Tensor:
    """YaRN's ramp, fp32 [H / 2]: 1 where a frequency turns at least beta_fast times within the trained length, 0 below beta_slow turns."""

    def index_of(rotations: float) -> float:
        """The (fractional) index of the frequency that turns `rotations` times within the trained length."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return llm.head_dim * math.log(turns) / (2 * math.log(llm.rotary_base))

    # The bounds, their rounding and the clamp to H - 1 (not H / 2 - 1) are transformers'.
    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), llm.head_dim - 1)
    ramp = (torch.arange(llm.head_dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are divided by `factor`, those between are blended linearly in 1 / wavelength."""
    low, high, trained_length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept_share = (trained_length / wavelengths - low) / (high - low)
    blended = (1 - kept_share) * frequencies / scaling.factor + kept_share * frequencies
    scaled = torch.where(wavelengths > trained_length / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < trained_length / high, frequencies, scaled)


def rotary_angles(positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles for Megatron's `apply_rotary_pos_emb`, which takes their cosine and sine in fp32 and rounds those to the activation's dtype.

    The product is made in fp64 and wrapped into [-pi, pi) before it is rounded, because an fp32 angle near 1,000,000 is off by up to 0.03.

    Args:
        positions_T: int64 [T] on any device.
        inv_freq: fp32 or fp64 [H / 2], same device.

    Returns:
        fp32 [T, 1, 1, H]: the H / 2 angles twice (rotate-half layout).
    """
    angles = torch.outer(positions_T.double(), inv_freq.double())
    angles = (torch.remainder(angles + math.pi, 2 * math.pi) - math.pi).float()
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def rotary_table(positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Cosines and sines for the fused rotary kernel: the same angles as `rotary_angles`, made once for all layers, nothing rounded before.

    Args:
        positions_T: int64 [T] on any device.
        inv_freq: fp32 or fp64 [H / 2], same device.

    Returns:
        fp32 [T, 1, 1, H]: H / 2 cosines, then H / 2 sines; each the nearest fp32 value to that of the fp64 angle.
    """
    angles = torch.outer(positions_T.double(), inv_freq.double())
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()[:, None, None, :]
