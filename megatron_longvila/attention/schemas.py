"""Schemas of torch's private attention operations: what backends.py was written for, and a refusal of anything else.

To add a torch version: print `live_schemas()` there, read what changed, run tests/gpu, add it to `ACCEPTED_SCHEMAS`.
"""

from __future__ import annotations

import torch

_FORWARD_RESULT = "(Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
ACCEPTED_SCHEMAS: dict[str, tuple[str, ...]] = {
    "_scaled_dot_product_cudnn_attention": (
        "aten::_scaled_dot_product_cudnn_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> "
        + _FORWARD_RESULT
        + "Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)",
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "aten::_scaled_dot_product_cudnn_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
        "SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)",
    ),
    "_scaled_dot_product_flash_attention": (
        "aten::_scaled_dot_product_flash_attention(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None) -> "
        + _FORWARD_RESULT
        + "Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "aten::_scaled_dot_product_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
        "Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    ),
    "_flash_attention_forward": tuple(
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
        "SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
        "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None" + more + ") -> "
        "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
        for more in ("", ", Tensor? block_table=None, int? num_splits=None")
    ),
    "_flash_attention_backward": (
        "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, "
        "Tensor unused, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
        "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        "Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    ),
}


def live_schemas() -> dict[str, str]:
    """Schemas of the private operations in the torch that runs, by name; '' where an operation is missing."""
    operations = {name: getattr(torch.ops.aten, name, None) for name in ACCEPTED_SCHEMAS}
    return {name: "" if operation is None else str(operation.default._schema) for name, operation in operations.items()}


def check_schemas(*names: str) -> None:
    """Raise a RuntimeError naming the versions if one of these operations is not as accepted."""
    live = live_schemas()
    for name in names:
        if live[name] not in ACCEPTED_SCHEMAS[name]:
            raise RuntimeError(
                f"aten.{name} of torch {torch.__version__} is not the one known from torch 2.11 to 2.13:\n"
                f"  here  {live[name] or 'missing'}\n  known {' | '.join(ACCEPTED_SCHEMAS[name])}\n"
                f"install a known torch, set model.attention_backend to 'reference', or check the change, run tests/gpu "
                f"and add the schema to ACCEPTED_SCHEMAS"
            )
