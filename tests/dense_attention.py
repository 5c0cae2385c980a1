"""The attention oracle: every score of a pack at once, masked, softmaxed, differentiated by autograd. Shares no code with the package."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, sample_lengths: tuple[int, ...], scale: float) -> Tensor:
    """Causal attention within each sample of a pack; returns [T, N, H]. Key/value heads are repeated the way Hugging Face does."""
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = k_TKH.repeat_interleave(repeats, dim=1), v_TKH.repeat_interleave(repeats, dim=1)
    sample_T = torch.repeat_interleave(torch.arange(len(sample_lengths)), torch.tensor(sample_lengths)).to(q_TNH.device)
    visible_TT = (sample_T[:, None] == sample_T[None, :]) & torch.ones_like(sample_T, dtype=torch.bool).expand(len(sample_T), -1).tril()
    scores = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) * scale
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~visible_TT, float("-inf")).softmax(dim=-1), v_TNH)


def dense_gradients(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, grad_out_TNH: Tensor, sample_lengths: tuple[int, ...], scale: float
) -> list[Tensor]:
    """[out, dq, dk, dv] of `dense_attention` in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_TNH, k_TKH, v_TKH))
    out = dense_attention(q, k, v, sample_lengths, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out_TNH.double())]


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, in fp64."""
    return ((value.double() - exact).norm() / exact.norm()).item()
