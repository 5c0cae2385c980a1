"""The ulysses axis: one all-to-all turns a piece of the sequence with all heads into the whole ring share with a group of heads.

Whole GQA groups travel, so keys and values are never repeated. Source: DeepSpeed-Ulysses (arXiv 2309.14509).

Shapes: U ranks, T rows of this cp rank, S = U*T rows of the ring share;
N query and K key/value heads of this tensor-parallel rank, H head dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longvila.parallel.collectives import exchange_blocks


def qkv_to_heads(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """[T, N, H], [T, K, H], [T, K, H] -> [S, N/U, H], [S, K/U, H], [S, K/U, H] in one all-to-all, and one in backward.

    The results are views of one receive buffer [S, (N + 2K)/U, H]: the attention kernels read it by strides, nothing is unpacked.
    """
    size = dist.get_world_size(group)
    by_rank = [x.unflatten(1, (size, x.shape[1] // size)).transpose(0, 1) for x in (q_TNH, k_TKH, v_TKH)]  # each [U, T, heads/U, H]
    received = exchange_blocks(torch.cat(by_rank, dim=2), group).flatten(0, 1)
    q_SNH, k_SKH, v_SKH = received.split([x.shape[2] for x in by_rank], dim=1)
    return q_SNH, k_SKH, v_SKH
