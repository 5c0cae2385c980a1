"""Rotary angles from explicit positions: any order, any packing, exact beyond a million positions.

Shapes: T rows, H head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_longvila.config import LLMConfig, RopeScaling


def inverse_frequencies(llm: LLMConfig) -> Tensor:
    """fp32 [H / 2] on the CPU: base ** (-2i / H), rescaled by `llm.rope_scaling`. Bit-equal to transformers' rotary initialisers."""
    exponents = torch.arange(0, llm.head_dim, 2, dtype=torch.int64).to(torch.float32) / llm.head_dim
    frequencies = 1.0 / llm.rotary_base**exponents
    if llm.rope_scaling is None:
        return frequencies
    if llm.rope_scaling.type == "linear":
        return frequencies / llm.rope_scaling.factor
    return _scale_llama3(frequencies, llm.rope_scaling)


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
