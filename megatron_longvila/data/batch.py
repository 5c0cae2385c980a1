"""A row of packed samples, and the part of it that one rank of a context-parallel group trains on.

Shapes: L tokens of the unpadded row, T padded rows of this cp rank, F frames of this cp rank, S side of a frame.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from megatron_longvila.data.conversation import Encoded
from megatron_longvila.parallel.plan import IGNORE_INDEX, RankPlan, RowSpec

PADDING_TOKEN_ID = 0  # looked up like any other id, so it must lie in every vocabulary; its rows carry no label


@dataclass(frozen=True, eq=False)
class Row:
    """One pack of whole samples. Without samples it is a padding row: one token, no label.

    Attributes:
        numbers: of the samples, in the index.
        sample_ids: what metrics and reports call them.
    """

    numbers: tuple[int, ...]
    sample_ids: tuple[str, ...]
    samples: tuple[Encoded, ...]
    tokens_per_frame: int

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each sample, then the end of the row."""
        return tuple(np.cumsum([0, *map(len, self.samples)]).tolist())

    @cached_property
    def spec(self) -> RowSpec:
        """What the plan needs. A text row that is attended document by document is several samples to it."""
        frame_starts = [start + frame for start, sample in zip(self.starts, self.samples, strict=False) for frame in sample.frame_starts]
        lengths = tuple(length for sample in self.samples for length in sample.piece_lengths or (len(sample),))
        return RowSpec(lengths or (1,), tuple(frame_starts), self.tokens_per_frame)

    @cached_property
    def frame_places(self) -> np.ndarray:
        """Which sample of the row each frame belongs to. int64 [frames of the row]."""
        return np.repeat(np.arange(len(self.samples)), [len(sample.frame_starts) for sample in self.samples])

    @property
    def input_ids_L(self) -> np.ndarray:
        """int64; PLACEHOLDER_ID at visual tokens."""
        return np.concatenate([sample.input_ids_L for sample in self.samples]) if self.samples else np.array([PADDING_TOKEN_ID])

    def labels_L(self, failed_places: Collection[int] = ()) -> np.ndarray:
        """int64, already shifted; all ignored in the samples `failed_places` of the row."""
        labels = [
            np.full(len(sample), IGNORE_INDEX) if place in failed_places else sample.labels_L for place, sample in enumerate(self.samples)
        ]
        return np.concatenate(labels) if labels else np.array([IGNORE_INDEX])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One row, as one rank sees it. Tensors are on the device of the rank.

    Attributes:
        frames: uint8 [F, S, S, 3]; this cp rank's frames, black where the sample failed; empty after pipeline stage 0.
        input_ids_T: int64; PLACEHOLDER_ID at visual tokens, PADDING_TOKEN_ID at padding.
        labels_T: int64; the next token, IGNORE_INDEX where there is none to learn.
        positions_T: int64; rotary positions.
        sample_ids: every sample of the row, failed ones too.
        skipped: ids of the samples whose labels are all ignored because their media failed.
        sample_lengths: tokens of each stretch of the whole row that is attended by itself, without padding; none in a padding row.
        num_frames: of the whole row.
    """

    frames: torch.Tensor
    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    positions_T: torch.Tensor
    plan: RankPlan
    sample_ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    sample_lengths: tuple[int, ...] = ()
    num_frames: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole row, without padding."""
        return sum(self.sample_lengths)


def build_micro_batch(row: Row, plan: RankPlan, frames_FSS3: torch.Tensor, failed_places: Collection[int] = ()) -> MicroBatch:
    """Cut ids, labels and positions of the row by the plan's index map.

    Args:
        frames_FSS3: uint8, the frames of `plan.frames` on the rank's device (changed in place: failed samples turn black), or no frame at
            all on a rank that has no vision tower.
        failed_places: samples of the row whose media failed; the same on every rank of the replica.
    """
    source_T = torch.from_numpy(plan.row_source_T)
    is_padding_T = torch.from_numpy(plan.is_padding_T)
    input_ids_T = torch.from_numpy(row.input_ids_L)[source_T].masked_fill(is_padding_T, PADDING_TOKEN_ID)
    labels_T = torch.from_numpy(row.labels_L(failed_places))[source_T].masked_fill(is_padding_T, IGNORE_INDEX)
    if failed_places and len(frames_FSS3):
        black = np.isin(row.frame_places[plan.frames.start : plan.frames.stop], list(failed_places))
        frames_FSS3[torch.from_numpy(black).to(frames_FSS3.device)] = 0
    device = frames_FSS3.device
    return MicroBatch(
        frames_FSS3,
        input_ids_T.to(device),
        labels_T.to(device),
        torch.from_numpy(plan.positions_T).to(device),
        plan,
        row.sample_ids,
        tuple(row.sample_ids[place] for place in sorted(failed_places)),
        sample_lengths=row.spec.sample_lengths if row.samples else (),
        num_frames=len(row.frame_places),
    )


class MediumShare(NamedTuple):
    """The frames of one medium that one cp rank decodes.

    Attributes:
        place: the sample's place in the row.
        medium: which medium of that sample.
        frames: which of the frames selected of that medium.
        rows: where they go in the rank's frame tensor.
    """

    place: int
    medium: int
    frames: list[int]
    rows: slice


def split_media(row: Row, frames: range) -> list[MediumShare]:
    """The frames of one cp rank by medium, in the order of the row."""
    sources = [(place, *source) for place, sample in enumerate(row.samples) for source in sample.frame_sources]
    shares, offset = [], 0
    for (place, medium), group in groupby(sources[frames.start : frames.stop], key=lambda source: source[:2]):
        indices = [frame for _, _, frame in group]
        shares.append(MediumShare(place, medium, indices, slice(offset, offset + len(indices))))
        offset += len(indices)
    return shares
