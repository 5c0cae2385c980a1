"""Plain-PyTorch twins: the formulas of every kernel, on any device, computed in fp32 (in fp64 for fp64 inputs).

Shapes: T query rows, S key rows, N query heads, K key/value heads, G = N / K query heads per key/value head, H head dim, C rows of a chunk.
Query head n uses key/value head n // G, as in Megatron and Hugging Face. `causal` means that row t sees keys 0..t; it needs T == S.
The log-sum-exp (LSE) is the natural logarithm of the softmax denominator of scale * q k^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time: 2^24 fp32 values are 64 MiB; the backward pass holds three such buffers. Where there are fewer keys than head dims,
# what counts is the fp32 copies of queries, outputs and their gradients: 16 GiB each for a million rows of 32 heads of 128.
MAX_SCORES = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_chunks(q_TNH: Tensor, num_keys: int, max_scores: int) -> list[slice]:
    """Cut query rows so that neither the scores of one piece nor a copy of its queries are more values than `max_scores`."""
    num_rows, num_heads, head_dim = q_TNH.shape
    step = max(1, max_scores // (num_heads * max(num_keys, head_dim)))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _by_kv_head(x_CNH: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[C, N, H] -> [K, G*C, H]: one matrix per key/value head, so that keys and values are never repeated."""
    return x_CNH.to(dtype).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x_KMH: Tensor, num_rows: int) -> Tensor:
    """[K, G*C, H] -> [C, N, H]; the inverse of `_by_kv_head`."""
    return x_KMH.unflatten(1, (-1, num_rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q_KMH: Tensor, k_KSH: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """scale * q k^T as [K, G*C, S], -inf above the diagonal. `rows` are the query rows of the chunk."""
    scores = torch.matmul(q_KMH, k_KSH.transpose(1, 2)) * scale
    if causal:
        row = torch.arange(rows.start, rows.stop, device=scores.device)
        hidden = torch.arange(k_KSH.shape[1], device=scores.device)[None, :] > row[:, None]
        scores.unflatten(1, (-1, row.numel())).masked_fill_(hidden, float("-inf"))
    return scores


def attention_forward(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, *, causal: bool, scale: float, max_scores: int = MAX_SCORES
) -> tuple[Tensor, Tensor]:
    """Softmax attention. Returns (out_TNH in the dtype of q, lse_TN in the accumulation dtype)."""
    (num_rows, num_heads, _), (num_keys, num_kv_heads, _) = q_TNH.shape, k_SKH.shape
    assert not causal or num_rows == num_keys, f"causal needs as many keys as queries, not {num_keys} and {num_rows}"
    dtype = accumulation_dtype(q_TNH.dtype)
    k_KSH, v_KSH = k_SKH.to(dtype).transpose(0, 1), v_SKH.to(dtype).transpose(0, 1)
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    lse_TN = q_TNH.new_empty(num_rows, num_heads, dtype=dtype)
    for rows in _row_chunks(q_TNH, num_keys, max_scores):
        count, last_key = rows.stop - rows.start, rows.stop if causal else num_keys
        scores = _scores(_by_kv_head(q_TNH[rows], num_kv_heads, dtype), k_KSH[:, :last_key], rows, causal, scale)
        lse_KM1 = torch.logsumexp(scores, dim=-1, keepdim=True)
        out_TNH[rows] = _by_row(torch.matmul(scores.sub_(lse_KM1).exp_(), v_KSH[:, :last_key]), count).to(q_TNH.dtype)
        lse_TN[rows] = _by_row(lse_KM1, count).squeeze(-1)
    return out_TNH, lse_TN


def attention_backward(
    grad_out_TNH: Tensor,
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    out_TNH: Tensor,
    lse_TN: Tensor,
    *,
    causal: bool,
    scale: float,
    max_scores: int = MAX_SCORES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block of keys, given the output and the LSE over *all* keys of each row.

    Because exp(scores - lse) is then the final probability, the gradients of several blocks simply add up.
    Returns (dq_TNH, dk_SKH, dv_SKH) in the dtype of q. Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    """
    num_kv_heads, dtype = k_SKH.shape[1], accumulation_dtype(q_TNH.dtype)
    k_KSH, v_KSH = k_SKH.to(dtype).transpose(0, 1), v_SKH.to(dtype).transpose(0, 1)
    dq_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    dk_KSH, dv_KSH = torch.zeros_like(k_KSH), torch.zeros_like(v_KSH)
    for rows in _row_chunks(q_TNH, k_SKH.shape[0], max_scores):
        count, keys = rows.stop - rows.start, slice(0, rows.stop if causal else k_SKH.shape[0])
        q_KMH, grad_KMH = (_by_kv_head(x[rows], num_kv_heads, dtype) for x in (q_TNH, grad_out_TNH))
        delta_KM1 = (grad_KMH * _by_kv_head(out_TNH[rows], num_kv_heads, dtype)).sum(-1, keepdim=True)
        probs = _scores(q_KMH, k_KSH[:, keys], rows, causal, scale)
        probs.sub_(_by_kv_head(lse_TN[rows].unsqueeze(-1), num_kv_heads, dtype)).exp_()
        dv_KSH[:, keys] += torch.matmul(probs.transpose(1, 2), grad_KMH)
        dscores = torch.matmul(grad_KMH, v_KSH[:, keys].transpose(1, 2)).sub_(delta_KM1).mul_(probs).mul_(scale)
        dq_TNH[rows] = _by_row(torch.matmul(dscores, k_KSH[:, keys]), count).to(q_TNH.dtype)
        dk_KSH[:, keys] += torch.matmul(dscores.transpose(1, 2), q_KMH)
    return dq_TNH, dk_KSH.transpose(0, 1).to(q_TNH.dtype), dv_KSH.transpose(0, 1).to(q_TNH.dtype)


def merge_blocks(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Fold one block of keys into a running softmax; returns the new (out_TNH, lse_TN) in the dtype of out_TNH and lse_TN (fp32 or fp64).

    Each row must have seen a key on at least one side (a side without keys has lse -inf). Blocks may come in any order.
    Source: online softmax (arXiv 1805.02867, algorithm 3). Sigmoid, not ratios of exponentials: those overflow past 88 in fp32.
    """
    weight_TN = torch.sigmoid(block_lse_TN - lse_TN)
    merged_TNH = torch.lerp(out_TNH, block_out_TNH.to(out_TNH.dtype), weight_TN.unsqueeze(-1))
    return merged_TNH, torch.logaddexp(lse_TN, block_lse_TN)


def merge_into(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> None:
    """`merge_blocks` in place: out_TNH and lse_TN (fp32 or fp64, any strides) become the merged ones. Not differentiable."""
    merged_TNH, merged_TN = merge_blocks(out_TNH, lse_TN, block_out_TNH, block_lse_TN)
    out_TNH.copy_(merged_TNH)
    lse_TN.copy_(merged_TN)


def pack_qkv(qkv_TC: Tensor, bias_C: Tensor | None, table_TH: Tensor, num_kv_heads: int, ulysses_size: int, num_parts: int = 1) -> Tensor:
    """Bias, rotary and the send buffers of the ulysses all-to-all: everything between the projection and the transfer.

    Args:
        qkv_TC: the projection without its bias; C = K * (G + 2) * H, per key/value head its G query heads, the key, the value (Megatron's
            fused layout).
        bias_C: the projection's bias, or None.
        table_TH: fp32 cosines (first half of H) and sines (second half) of each row's angles; rotate-half pairs i and i + H / 2.
        ulysses_size, num_parts: U ranks, whose heads travel in P parts; K must be a multiple of U * P.

    Returns:
        [P, U, T, (N + 2K) / (U * P), H] in the dtype of qkv. Rank u gets the u-th of U runs of key/value heads with their queries, and
        part p of it is the p-th of P runs of these: their query heads, then their keys, then their values.
    """
    dtype = accumulation_dtype(qkv_TC.dtype)
    x_TC = qkv_TC.to(dtype) if bias_C is None else qkv_TC.to(dtype) + bias_C.to(dtype)
    x_TKJH = x_TC.unflatten(1, (num_kv_heads, -1, table_TH.shape[1]))
    cos, sin = (part[:, None, None] for part in table_TH.to(dtype).chunk(2, dim=1))
    first, second = x_TKJH[:, :, :-1].chunk(2, dim=-1)
    rotated_TKJH = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    parts = (rotated_TKJH[:, :, :-1].flatten(1, 2), rotated_TKJH[:, :, -1], x_TKJH[:, :, -1])
    by_part = [part.unflatten(1, (ulysses_size, num_parts, -1)).permute(2, 1, 0, 3, 4) for part in parts]
    return torch.cat(by_part, dim=3).to(qkv_TC.dtype)


def swap_into(out_BANH: Tensor, x_ABNH: Tensor) -> None:
    """out[b, a] = x[a, b]: between rows of all heads [T, U, N, H] and one block of heads for each ulysses rank [U, T, N, H], both ways.

    Not differentiable. Either side may be a view, one part of the heads of every rank.
    """
    out_BANH.copy_(x_ABNH.transpose(0, 1))


def take_rows(x_VD: Tensor, index_R: Tensor) -> Tensor:
    """Row index[r] of x in row r: [R, D]. No row is taken twice; a row that is not taken gets a zero gradient."""
    return x_VD.index_select(0, index_R)


def place_rows(base_TD: Tensor, x_RD: Tensor, rows_R: Tensor) -> Tensor:
    """A copy of base whose row rows[r] is row r of x: [T, D]. No row is placed twice; the rows of base under them get a zero gradient."""
    return base_TD.index_copy(0, rows_R, x_RD)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in the dtype of x; the mean is taken in fp32 (fp64 for fp64)."""
    return torch.nn.functional.rms_norm(x, weight_D.shape, None, eps) * weight_D


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension, in the dtype of x; mean and variance are taken in fp32 (fp64 for fp64)."""
    return torch.nn.functional.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def lse_and_target(logits_LV: Tensor, labels_L: Tensor, first_column: int) -> tuple[Tensor, Tensor]:
    """Both halves of a cross entropy over some columns of the vocabulary, in fp32 (fp64 for fp64).

    Args:
        logits_LV: columns first_column .. first_column + V of the logits; -inf where a column means nothing.
        labels_L: int64 labels in the whole vocabulary.

    Returns:
        (LSE over these columns, logit of the label or 0 where it lies in other columns), each [L].
    """
    logits_LV = logits_LV.to(accumulation_dtype(logits_LV.dtype))
    column_L = labels_L - first_column
    inside_L = (column_L >= 0) & (column_L < logits_LV.shape[1])
    target_L = logits_LV.gather(1, torch.where(inside_L, column_L, 0)[:, None]).squeeze(1)
    return torch.logsumexp(logits_LV, dim=1), torch.where(inside_L, target_L, 0)


def cross_entropy_gradient(logits_LV: Tensor, labels_L: Tensor, first_column: int, lse_L: Tensor, grad_L: Tensor) -> Tensor:
    """(softmax - one hot) * grad, in the dtype of the logits. `lse_L` is the LSE over the whole vocabulary, grad_L that of each loss."""
    probs_LV = torch.exp(logits_LV.to(lse_L.dtype) - lse_L[:, None])
    columns_V = torch.arange(first_column, first_column + logits_LV.shape[1], device=logits_LV.device)
    return ((probs_LV - (columns_V == labels_L[:, None]).to(lse_L.dtype)) * grad_L[:, None]).to(logits_LV.dtype)
