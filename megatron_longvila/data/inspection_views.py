"""Single samples as training would see them: tokens, labels, frames, and the plan of the row they are packed into."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_longvila.config import Config
from megatron_longvila.data.batch import Row
from megatron_longvila.data.index import SampleIndex
from megatron_longvila.data.inspection import KILL_AFTER_S, MediaTask, decode_task, media_task
from megatron_longvila.data.media import Deadline, MediaError
from megatron_longvila.data.mixture import RowSchedule
from megatron_longvila.data.shards import Dataset, Media
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.data.timeline import unpack
from megatron_longvila.data.workers import Killed, run_tasks
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel.plan import IGNORE_INDEX, PLACEHOLDER_ID, RankPlan, plan_row

_JPEG_QUALITY = 85


class TokenView(NamedTuple):
    """One token of a sample, or the run of visual tokens of one frame.

    Attributes:
        position: of the (first) token in the sample.
        count: tokens that it stands for; 1 for text.
        token_id: PLACEHOLDER_ID for a frame.
        text: what it stands for, specials by their name; for a frame its number in the sample.
        is_special: a token that no text makes.
        is_trained: the model learns to predict it.
    """

    position: int
    count: int
    token_id: int
    text: str
    is_special: bool
    is_trained: bool


class FrameView(NamedTuple):
    """One frame as the vision tower gets it.

    Attributes:
        medium: which medium of the sample; `index` counts the frames of that medium's file.
        time_s: when it is shown; None for an image.
        jpeg: a small copy; empty where the medium cannot be read.
        is_replaced: it does not decode, and its nearest good neighbour stands in.
        cp_rank: decodes and encodes it.
    """

    medium: int
    index: int
    time_s: float | None
    jpeg: bytes
    is_replaced: bool
    cp_rank: int


class RankView(NamedTuple):
    """What one cp rank does for a sample in its row.

    Attributes:
        encodes: numbers of the sample's frames, by range.
        owns: tokens of the sample, as ranges of positions.
        sends, receives: visual tokens of the whole row that leave for, or arrive from, other ranks.
        rows: token rows of the whole row on this rank, `padding` of them empty.
    """

    cp_rank: int
    ulysses_rank: int
    ring_rank: int
    encodes: range
    owns: list[range]
    sends: int
    receives: int
    rows: int
    padding: int


@dataclass(frozen=True)
class SampleView:
    """A sample as training sees it.

    Attributes:
        row: number of the row in epoch 0; `place` its place in it, `row_samples` how many share it. -1 where it cannot be used.
        problem: why it cannot be used, or which media cannot be read; empty if nothing is wrong.
    """

    number: int
    id: str
    dataset: str
    line: int
    conversations: tuple[dict, ...]
    media: tuple[Media, ...]
    row: int = -1
    place: int = 0
    row_samples: int = 0
    tokens: tuple[TokenView, ...] = ()
    frames: tuple[FrameView, ...] = ()
    ranks: tuple[RankView, ...] = ()
    problem: str = ""


@dataclass
class SampleViewer:
    """Makes SampleViews of an index.

    Args:
        reasons: why samples cannot be used, by number.
        schedule: the rows of training; a sample's plan is that of its row in epoch 0. None if no sample can be used.
        thumbnail: side of the small copies of the frames, in pixels.
    """

    index: SampleIndex
    tokenizer: Tokenizer
    config: Config
    mesh: Mesh
    reasons: dict[int, str]
    schedule: RowSchedule | None
    thumbnail: int = 144
    num_workers: int = 2
    _row_of: dict[int, int] = field(default_factory=dict)

    def views(self, numbers: Sequence[int]) -> Iterator[SampleView]:
        """A view of each sample, in the order given; media are decoded in worker processes, one sample's at a time."""
        self._locate(set(numbers) - self.reasons.keys())
        for number in numbers:
            yield self._view(int(number))

    def _locate(self, numbers: set[int]) -> None:
        """Find the rows of epoch 0 that hold the samples."""
        missing = numbers - self._row_of.keys()
        for row in range(self.schedule.num_rows if self.schedule else 0):
            if not missing:
                return
            for number in missing.intersection(self.schedule.row(row).tolist()):
                self._row_of[number] = row
                missing = missing - {number}

    def _view(self, number: int) -> SampleView:
        dataset, sample = self.index.locate(number)
        media = tuple(dataset.media[name] for name in sample.media if name in dataset.media)
        plain = SampleView(number, sample.id, str(dataset.path), self.index.line(number), sample.conversations, media)
        if number in self.reasons or number not in self._row_of:
            reason = self.reasons.get(number, "the mixture does not draw it in epoch 0")
            return replace(plain, problem=reason)
        row_number = self._row_of[number]
        row = self.index.row(self.schedule.row(row_number))
        place = row.numbers.index(number)
        config = self.config.parallel
        row_multiple = self.mesh.tp_size if config.sequence_parallel else 1
        plans = plan_row(row.spec, ulysses_size=self.mesh.ulysses_size, ring_size=self.mesh.ring_size, row_multiple=row_multiple)
        encoder = encoder_ranks(row, plans, place)
        frames, problems = self._frames(dataset, media, row, place, encoder)
        return replace(
            plain,
            row=row_number,
            place=place,
            row_samples=len(row.samples),
            tokens=tuple(token_views(row, place, self.tokenizer)),
            frames=tuple(frames),
            ranks=tuple(rank_views(row, plans, place)),
            problem="; ".join(problems),
        )

    def _frames(self, dataset: Dataset, media: tuple[Media, ...], row: Row, place: int, encoder: list[int]):
        tasks, problems = [], []
        for number, one in enumerate(media):
            task = media_task(self.index, dataset, one, self.config, key=number, thumbnail=self.thumbnail)
            if isinstance(task, str):
                problems.append(task)
            else:
                tasks.append(task)
        pictures = {}
        timeout_s = self.config.data.video.timeout_s * 2 + KILL_AFTER_S  # stamps and pictures
        for task, answer in run_tasks(show_media, tasks, num_workers=self.num_workers, timeout_s=timeout_s):
            if isinstance(answer, Killed | str):
                reason = answer.reason if isinstance(answer, Killed) else answer
                problems.append(f"medium {task.media.sha256[:16]} {reason}")
            else:
                pictures[task.key] = dict(zip(task.indices, answer, strict=True))
        frames = []
        for cp_rank, (medium, shown) in zip(encoder, row.samples[place].frame_sources, strict=True):
            index = self.index.selected_frames(media[medium])[shown]
            jpeg, time_s, is_replaced = pictures.get(medium, {}).get(index, (b"", None, False))
            frames.append(FrameView(medium, index, time_s, jpeg, is_replaced, cp_rank))
        bad = sum(frame.is_replaced for frame in frames)
        if bad:
            problems.append(f"{bad} of {len(frames)} frames do not decode; each shows its nearest good neighbour")
        return frames, problems


def show_media(task: MediaTask) -> list[tuple[bytes, float | None, bool]] | str:
    """Runs in a worker: (JPEG, time in seconds, whether it stands in for a bad frame) of each frame; or why there is none."""
    try:
        pixels_FSS3, status_F = decode_task(task)
        times = _times_s(task)
    except (MediaError, OSError) as error:
        return str(error)
    shown = []
    for pixels_SS3, status, time_s in zip(pixels_FSS3, status_F, times, strict=True):
        image = Image.fromarray(pixels_SS3)
        if max(image.size) > task.thumbnail:
            image.thumbnail((task.thumbnail, task.thumbnail))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
        shown.append((file.getvalue(), time_s, bool(status)))
    return shown


def _times_s(task: MediaTask) -> list[float | None]:
    if task.media.kind == "image":
        return [None]
    if task.media.kind == "frames":
        return [index / task.media.fps for index in task.indices]
    known = unpack(task.timeline) if task.timeline else None
    with VideoStream(task.source, Deadline(task.timeout_s), task.limits, known) as stream:
        times = stream.times_s()
    return [float(times[index]) for index in task.indices]


def token_views(row: Row, place: int, tokenizer: Tokenizer) -> Iterator[TokenView]:
    """Every token of a sample in order, each frame's visual tokens as one."""
    sample = row.samples[place]
    ids, labels = sample.input_ids_L, sample.labels_L
    frames = {start: number for number, start in enumerate(sample.frame_starts)}
    position = 0
    while position < len(ids):
        token_id = int(ids[position])
        if position in frames:
            assert token_id == PLACEHOLDER_ID
            yield TokenView(position, row.tokens_per_frame, PLACEHOLDER_ID, str(frames[position]), False, False)
            position += row.tokens_per_frame
            continue
        is_trained = position > 0 and int(labels[position - 1]) != IGNORE_INDEX  # labels are shifted: the one before predicts this one
        assert not is_trained or int(labels[position - 1]) == token_id
        yield TokenView(position, 1, token_id, tokenizer.piece(token_id), not tokenizer.decode([token_id]), is_trained)
        position += 1


def encoder_ranks(row: Row, plans: Sequence[RankPlan], place: int) -> list[int]:
    """cp rank that decodes and encodes each frame of a sample of the row."""
    ranks = np.concatenate([np.full(len(plan.frames), rank) for rank, plan in enumerate(plans)])
    return ranks[row.frame_places == place].tolist()


def rank_views(row: Row, plans: Sequence[RankPlan], place: int) -> Iterator[RankView]:
    """What each cp rank does for a sample of the row."""
    start, stop = row.starts[place], row.starts[place + 1]
    own_frames = np.flatnonzero(row.frame_places == place)
    first = int(own_frames[0]) if len(own_frames) else 0
    for rank, plan in enumerate(plans):
        source = plan.row_source_T
        owned = np.sort(source[(source >= start) & (source < stop)]) - start
        encodes = range(
            max(plan.frames.start, first) - first,
            max(max(plan.frames.start, first), min(plan.frames.stop, first + len(own_frames))) - first,
        )
        exchange = plan.exchange
        yield RankView(
            cp_rank=rank,
            ulysses_rank=rank % plan.layout.ulysses_size,
            ring_rank=rank // plan.layout.ulysses_size,
            encodes=encodes,
            owns=_runs(owned),
            sends=sum(exchange.send_counts) - exchange.send_counts[rank],
            receives=sum(exchange.recv_counts) - exchange.recv_counts[rank],
            rows=len(source),
            padding=int(plan.is_padding_T.sum()),
        )


def _runs(positions: np.ndarray) -> list[range]:
    """Ascending positions as ranges."""
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [range(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]
