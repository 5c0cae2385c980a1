"""RMSNorm and LayerNorm with the constructor Megatron's layer specs call.

Megatron's torch fallback refuses sequence parallelism, and Transformer Engine's norms are not there on a CPU. These run anywhere. With
sequence parallelism each tp rank sees other rows, so a norm's gradient has to be summed over tp: `sequence_parallel` on the parameters
asks Megatron's `finalize_model_grads` for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.kernels.choice import REFERENCE, Kernels


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, any leading shape, any floating dtype.

    The mean is taken in fp32. The plain kernel rounds the normalised value to x's dtype before the weight multiplies it, as Qwen2 and Llama
    of transformers do; the Triton kernel rounds once, at the end (Megatron and Transformer Engine multiply first, too).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, kernels: Kernels = REFERENCE):
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.weight = _parameter(torch.ones(hidden_size), config)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension, any leading shape, any floating dtype."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, kernels: Kernels = REFERENCE):
        super().__init__()
        self.eps, self.kernels = eps, kernels
        self.weight = _parameter(torch.ones(hidden_size), config)
        self.bias = _parameter(torch.zeros(hidden_size), config)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


def _parameter(value: Tensor, config) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(value.to(platform.device(), config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter
