"""CoreAttention on one rank's rows of a pack that all ranks know: what the tests on gloo ranks build, feed and differentiate.

Shapes: T rows of this cp rank, H head dim.
"""

from __future__ import annotations

import torch

from megatron_longvila.attention.backends import get_backend

HEAD_DIM = 8


def core_attention(groups, heads, dtype, transport="all_gather", crosses_hosts=False, **changes):
    """The module for `heads` = (query, key/value) on the reference backend; `changes` go to Megatron's configuration."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_longvila.attention.core_attention import CoreAttention

    settings = dict(
        num_layers=1,
        hidden_size=heads[0] * HEAD_DIM,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        params_dtype=dtype,
    )
    return CoreAttention(
        TransformerConfig(**{**settings, **changes}),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        groups=groups,
        backend=get_backend("reference"),
        transport=transport,
        crosses_hosts=crosses_hosts,
    )


def global_tensors(layout, heads, dtype):
    """q, k, v and the gradient of the output for the whole pack; the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(layout.total_rows, num_heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for num_heads in (heads[0], heads[1], heads[1], heads[0])
    ]


def run_step(attention, layout, tensors, call=None):
    """[out, dq, dk, dv] of this cp rank's rows, each [T, heads, H]; `call` wraps the module (recompute)."""
    from megatron_longvila.attention.core_attention import SequenceParams

    q, k, v, grad_out = tensors
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    params = SequenceParams(layout=layout)

    def forward(q, k, v):
        return attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), packed_seq_params=params)

    out = forward(q, k, v) if call is None else call(forward, q, k, v)
    assert out.shape == (layout.local_rows, 1, q.shape[1] * HEAD_DIM)
    out = out.reshape(q.shape)
    out.backward(grad_out)  # not autograd.grad, which Megatron's checkpoint refuses
    return [out.detach(), q.grad, k.grad, v.grad]
