"""Megatron's core attention for one sequence spread over ulysses x ring ranks; the module that a layer spec names as `core_attention`.

Shapes: T rows of this cp rank, N query heads and K key/value heads of this tensor-parallel rank, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila.attention.attention_2d import attention_2d, packed_attention_2d
from megatron_longvila.attention.backends import Backend
from megatron_longvila.attention.ring import TRANSPORTS, RingCall
from megatron_longvila.kernels.choice import REFERENCE, Kernels
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import SequenceLayout
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


@dataclass
class SequenceParams(PackedSeqParams):
    """How Megatron carries the layout of a micro-batch to every layer.

    The format is "sbhd" on purpose: with "thd" Megatron drops the batch dimension and looks for cumulative lengths.
    """

    qkv_format: str = "sbhd"
    layout: SequenceLayout | None = None


class CoreAttention(torch.nn.Module):
    """2D attention over packed samples. A pure function of q, k and v: recomputing it issues the same collectives in the same order.

    Args:
        config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection: given by Megatron.
        groups: process groups; backend: computes one block; transport: `all_gather` or `p2p`; kernels: what surrounds the blocks;
            crosses_hosts: whether rings do. Given by the layer spec.

    Raises:
        ValueError: heads that ulysses cannot split, dropout, a window, or a head dim or dtype that the backend cannot do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection=None,
        *,
        groups: Groups,
        backend: Backend,
        transport: str,
        kernels: Kernels = REFERENCE,
        crosses_hosts: bool = False,
    ):
        super().__init__()
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal, (attention_type, attn_mask_type)
        _check(config, groups, transport)
        backend.check(head_dim=config.kv_channels, dtype=config.params_dtype)
        self.groups, self.backend, self.transport, self.kernels = groups, backend, transport, kernels
        self.crosses_hosts = crosses_hosts
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.ring_rank = dist.get_rank(groups.ring) if groups.mesh.ring_size > 1 else 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceParams | None = None,
    ) -> Tensor:
        """[T, 1, N, H], [T, 1, K, H], [T, 1, K, H] -> [T, 1, N*H]. The mask is the layout's: causal within each sample."""
        assert attention_mask is None and attention_bias is None, "the layout is the mask"
        layout, (num_rows, batch_size) = packed_seq_params.layout, query.shape[:2]
        assert batch_size == 1 and num_rows == layout.local_rows, (tuple(query.shape), layout)
        out = attention_2d(query.squeeze(1), key.squeeze(1), value.squeeze(1), self._call(layout), self.groups.ulysses)
        return out.reshape(num_rows, 1, -1)

    def attend_packed(self, packed_PUTMH: Tensor, num_queries_per_key: int, packed_seq_params: SequenceParams) -> Tensor:
        """`forward` of what `kernels.pack_qkv` wrote: [P, U, T, M, H] -> [T, 1, N*H]."""
        layout, num_rows = packed_seq_params.layout, packed_PUTMH.shape[2]
        assert num_rows == layout.local_rows, (tuple(packed_PUTMH.shape), layout)
        out = packed_attention_2d(packed_PUTMH, num_queries_per_key, self._call(layout), self.groups.ulysses)
        return out.reshape(num_rows, 1, -1)

    def _call(self, layout: SequenceLayout) -> RingCall:
        ring = self.ring_rank, self.groups.ring, self.transport
        return RingCall(layout, *ring, self.backend, self.scale, self.kernels, self.crosses_hosts)


def _check(config: TransformerConfig, groups: Groups, transport: str) -> None:
    """Refuse what this attention does not compute."""
    mesh = groups.mesh
    shards = mesh.ulysses_size * mesh.tp_size
    for name in ("num_query_groups", "num_attention_heads"):
        if getattr(config, name) % shards:
            raise ValueError(
                f"{name}={getattr(config, name)} must be divisible by ulysses_size * tp_size = {mesh.ulysses_size} * {mesh.tp_size}; "
                f"lower parallel.ulysses_size and raise parallel.ring_size"
            )
    if config.attention_dropout:
        raise ValueError(f"attention_dropout={config.attention_dropout}, but attention over several ranks has no dropout; set it to 0")
    if config.window_size is not None or config.softmax_type != "vanilla":
        raise ValueError(
            f"window_size={config.window_size} and softmax_type={config.softmax_type!r} are not supported; use None and 'vanilla'"
        )
    if transport not in TRANSPORTS:
        raise ValueError(f"ring transport {transport!r} is unknown; choose one of {TRANSPORTS}")
