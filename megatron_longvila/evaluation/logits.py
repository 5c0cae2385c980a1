"""Logits of whole sequences, on any mesh without pipeline stages: what is compared with other implementations.

Shapes: L tokens of an unpadded row, T padded rows of this cp rank, F frames of the row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.models.longvila import LongVILA
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import PLACEHOLDER_ID, RowSpec, plan_row
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # isort: skip


@torch.no_grad()
def row_logits(
    model: LongVILA,
    config: Config,
    groups: Groups,
    ids_L: np.ndarray,
    *,
    frames_FHWC: Tensor | None = None,
    positions_L: np.ndarray | None = None,
) -> Tensor:
    """Logits at every token of one row that is one sample. Collective; the same on every rank.

    Args:
        ids_L: int64; PLACEHOLDER_ID at the visual tokens of the frames, which follow each other.
        frames_FHWC: uint8 [F, S, S, 3], all frames of the row on every rank; None for text.
        positions_L: rotary positions, int64; 0, 1, 2, ... unless given.

    Returns:
        [L, V] in the parameters' dtype, without the columns that pad the vocabulary.

    Raises:
        ValueError: the mesh has pipeline stages.
    """
    mesh, tokens_per_frame = groups.mesh, config.model.tokens_per_frame
    if mesh.pp_size > 1:
        raise ValueError(f"pp_size={mesh.pp_size}: logits of whole sequences exist on meshes with pp_size=1 only; spread over tp or cp")
    starts = tuple(np.flatnonzero(ids_L == PLACEHOLDER_ID)[::tokens_per_frame].tolist())
    multiple = mesh.tp_size if config.parallel.sequence_parallel else 1
    plans = plan_row(
        RowSpec((len(ids_L),), starts, tokens_per_frame), ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size, row_multiple=multiple
    )
    plan = plans[groups.cp.rank()]
    source_T = np.maximum(plan.row_source_T, 0)
    positions_T = plan.positions_T
    if positions_L is not None:
        positions_T = positions_L[source_T]
        # What transformers takes for the length where dynamic scaling asks for one.
        plan = replace(plan, layout=replace(plan.layout, longest_sample=int(positions_L.max()) + 1))
    ids_T = torch.from_numpy(np.where(plan.is_padding_T, 0, ids_L[source_T]))
    if frames_FHWC is None:
        size = config.model.vision.image_size
        frames_FHWC = torch.empty(0, size, size, 3, dtype=torch.uint8)
    mine_FHWC = frames_FHWC[plan.frames.start : plan.frames.stop]
    inputs = (tensor.to(platform.device()) for tensor in (mine_FHWC, ids_T, torch.from_numpy(positions_T)))
    hidden_T1D = model(*inputs, plan)
    decoder = model.language_model
    weight = decoder.shared_embedding_or_output_weight() if decoder.share_embeddings_and_output_weights else None
    local_T1V, _ = decoder.output_layer(hidden_T1D, weight=weight)
    logits_TV = gather_from_tensor_model_parallel_region(local_T1V, group=groups.tp)[:, 0, : config.model.llm.vocab_size]
    shares = [torch.empty_like(logits_TV) for _ in plans]
    dist.all_gather(shares, logits_TV.contiguous(), group=groups.cp)
    logits_LV = logits_TV.new_empty(len(ids_L), logits_TV.shape[1])
    for other, share_TV in zip(plans, shares, strict=True):
        real_T = ~other.is_padding_T
        logits_LV[torch.from_numpy(other.row_source_T[real_T])] = share_TV[torch.from_numpy(real_T)]
    return logits_LV
