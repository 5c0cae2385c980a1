"""The decoder's self-attention with one kernel between the projection of q, k and v and the all-to-all, instead of bias, rotary and copies.

Shapes: T rows of this cp rank, D hidden size, N query and K key/value heads of this tensor-parallel rank, H head dim, U ulysses ranks,
C = K * (N / K + 2) * H columns of the projection.
"""

from __future__ import annotations

from torch import Tensor

from megatron_longvila.attention.core_attention import SequenceParams
from megatron_longvila.attention.ulysses import num_parts
from megatron_longvila.kernels.choice import Kernels
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import tensor_parallel  # isort: skip
from megatron.core.transformer.attention import SelfAttention  # isort: skip


class FusedSelfAttention(SelfAttention):
    """Megatron's self-attention on `kernels.pack_qkv`; parameters and their names are the same.

    The rotary argument is a table of cosines and sines (`rope.rotary_table`), not Megatron's angles. Needs at least one key/value head per
    tensor-parallel rank.
    """

    def __init__(self, *args, kernels: Kernels, **kwargs):
        super().__init__(*args, **kwargs)
        assert self.config.num_query_groups >= self.world_size and not self.config.qk_layernorm
        self.kernels = kernels
        # The kernel adds the bias. Transformer Engine's linear does not look at this any more; it adds the bias itself and returns none.
        self.linear_qkv.skip_bias_add = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceParams | None = None,
        **others,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, D] ([T / tp, 1, D] with sequence_parallel) -> (the same shape, bias of the output projection or None).

        Args:
            rotary_pos_emb: fp32 [T, 1, 1, H], the rotary table.
            others: what Megatron's layer hands on for inference; all None.
        """
        assert attention_mask is None and all(value is None for value in others.values()), others
        qkv_T1C, bias_C = self.linear_qkv(hidden_states)
        inputs = qkv_T1C.squeeze(1), bias_C, rotary_pos_emb.squeeze((1, 2))

        def attend(qkv_TC: Tensor, bias_C: Tensor | None, table_TH: Tensor) -> Tensor:
            num_heads, num_kv_heads = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
            layout = packed_seq_params.layout
            parts = num_parts(layout, num_heads, num_kv_heads)
            packed_PUTMH = self.kernels.pack_qkv(qkv_TC, bias_C, table_TH, num_kv_heads, layout.ulysses_size, parts)
            return self.core_attention.attend_packed(packed_PUTMH, num_heads // num_kv_heads, packed_seq_params)

        if self.checkpoint_core_attention and self.training:
            out_T1C = tensor_parallel.checkpoint(attend, False, *inputs)  # keeps the projection's output alone
        else:
            out_T1C = attend(*inputs)
        return self.linear_proj(out_T1C)
