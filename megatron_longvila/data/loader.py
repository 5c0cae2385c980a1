"""The micro-batches of one rank, step by step, resumable at any row under any layout.

What is read is decided by mixture.py alone; this file decides who decodes what and makes all ranks agree on what could not be read.
Threads prepare rows ahead (tokens, plan, this rank's frames); every collective happens in the main thread, row by row in the same order on
all ranks. A row costs one broadcast of uint8 frames over tp in stage 0 and one all-reduce of a status per sample over the replica; a step
costs one all-reduce of the statuses of all its rows over dp, so that every rank knows every skipped sample.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.data.batch import MicroBatch, Row, build_micro_batch, split_media
from megatron_longvila.data.index import LengthCache, SampleIndex
from megatron_longvila.data.media import MediaError
from megatron_longvila.data.mixture import UNUSABLE, Mixture, RowSchedule, check_same_data, step_rows
from megatron_longvila.data.report import BadSamples
from megatron_longvila.data.shards import Dataset
from megatron_longvila.data.text import Tokenizer
from megatron_longvila.data.text_rows import TextDataset
from megatron_longvila.data.video import decode_frames
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import RankPlan, plan_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a rank stands, in plain integers, and the groups it agrees with. Without groups it works alone: any rank of any mesh can be
    played by one process as long as no sample fails.

    Attributes:
        decodes: this rank decodes its cp rank's frames (tp rank 0 of pipeline stage 0).
        holds_frames: the vision tower lives here (every tp rank of stage 0).
        row_multiple: see plan_row.
    """

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    ulysses_size: int = 1
    ring_size: int = 1
    row_multiple: int = 1
    decodes: bool = True
    holds_frames: bool = True
    tp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    replica: ProcessGroup | None = None

    @classmethod
    def of(cls, groups: Groups, *, sequence_parallel: bool) -> Place:
        """The place of this rank in `groups`."""
        mesh = groups.mesh
        return cls(
            dp_rank=groups.dp.rank(),
            dp_size=mesh.dp_size,
            cp_rank=groups.cp.rank(),
            ulysses_size=mesh.ulysses_size,
            ring_size=mesh.ring_size,
            row_multiple=mesh.tp_size if sequence_parallel else 1,
            decodes=groups.is_first_stage and groups.tp.rank() == 0,
            holds_frames=groups.is_first_stage,
            tp=groups.tp,
            dp=groups.dp,
            replica=groups.replica,
        )

    @property
    def rank(self) -> int:
        """Global rank; 0 when alone."""
        return dist.get_rank() if self.replica is not None else 0


@dataclass
class _Prepared:
    """What a thread made of a row; `reasons`, and how many frames a neighbour stands for, by place in the row."""

    row: Row
    plan: RankPlan
    frames: torch.Tensor  # uint8 [F, S, S, 3] on the CPU; unwritten where this rank does not decode
    reasons: dict[int, str] = field(default_factory=dict)
    num_decoded: int = 0
    replaced: Counter[int] = field(default_factory=Counter)


class Loader:
    """Iterate over steps; each is the list of this rank's micro-batches. Construction and iteration are collective over all ranks.

    Args:
        place: this rank, or `Place()` for one process alone.
        datasets: opened folders, in the order of the configuration.
        mixture: what a training epoch draws from the datasets; None is every sample once.
        evaluation: every sample once, in index order, at most `training.evaluation_rows` rows; iterating starts over. Otherwise rows of
            (training.seed, epoch), endless if training.steps is set, else training.epochs of them; iterating goes on from the position.
        report_path: JSON lines of the samples that were skipped, written by rank 0.
        cache_dir: where token lengths go if the first dataset's folder cannot be written; made when needed.

    Attributes:
        position: rows of the list consumed so far, over all dp ranks; a step counts as consumed when it is handed out.
        frames_decoded: frames this rank has decoded for the steps handed out.
        frames_replaced: of those, how many were bad and show a neighbour; the log names each such sample once.

    Raises:
        ValueError: no usable sample, a batch that dp does not divide, or more bad samples than data.max_bad_fraction.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        datasets: Sequence[Dataset | TextDataset],
        tokenizer: Tokenizer,
        *,
        mixture: Mixture | None = None,
        evaluation: bool = False,
        report_path: Path | None = None,
        cache_dir: Path | None = None,
    ):
        self._config, self._place, self._evaluation = config, place, evaluation
        self._device = platform.device() if place.replica is not None else torch.device("cpu")
        self._index = SampleIndex(
            datasets, tokenizer, config.data, tokens_per_frame=config.model.tokens_per_frame, vocab_size=config.model.llm.vocab_size
        )
        self._mixture = mixture
        numbers = np.arange(len(self._index)) if mixture is None else mixture.numbers
        self._bad = BadSamples(self._index, config.data, report_path, num_samples=len(numbers), writes=place.rank == 0)
        lengths, reasons = _measure(self._index, numbers, LengthCache(self._index, datasets[0].path, cache_dir, numbers), place)
        too_long = self._index.too_long(lengths)
        lengths[list(too_long)] = UNUSABLE
        self._bad.add_unusable(dict(sorted((reasons | too_long).items())))
        self._lengths = lengths

        training = config.training
        if evaluation:
            self.schedule = RowSchedule(lengths, config.data.context_length, seed=None, epochs=1)
        else:
            epochs = None if training.steps else training.epochs
            self.schedule = RowSchedule(lengths, config.data.context_length, seed=training.seed, epochs=epochs, mixture=mixture)
        step_rows(0, config.data.global_batch_size, place.dp_rank, place.dp_size)  # refuses a batch that dp does not divide
        self.position = self.frames_decoded = self.frames_replaced = 0
        self._warned: set[int] = set()  # samples with replaced frames that the log has named

    @property
    def num_rows(self) -> int | None:
        """Rows of the whole run (or evaluation); None if training.steps decides."""
        limit = self._config.training.evaluation_rows
        return min(self.schedule.num_rows, limit) if self._evaluation and limit else self.schedule.num_rows

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, from its first row."""
        if self.num_rows is None:
            return self._config.training.steps
        return -(-self.num_rows // self._config.data.global_batch_size)

    def total_steps(self, done: int) -> int:
        """Steps of the whole run, of which `done` have read the rows before the position, in batches of any size."""
        if self.num_rows is None:
            return max(done, self._config.training.steps)
        return done + max(0, -(-(self.num_rows - self.position) // self._config.data.global_batch_size))

    @property
    def epoch(self) -> int:
        """Epoch of the next row."""
        return self.schedule.locate(self.position)[0]

    @property
    def skipped(self) -> dict[int, str]:
        """Reason of every sample that is skipped wherever it appears, by number in the index; the same on all ranks."""
        return self._bad.failed

    @property
    def unusable(self) -> dict[int, str]:
        """Reason of every sample that no row holds (too long, text that cannot be encoded), by number; the same on all ranks."""
        return self._bad.unusable

    def state_dict(self) -> dict[str, Any]:
        """The data position: plain JSON values, the same on every rank, valid under any layout."""
        return {
            "seed": self._config.training.seed,
            "epoch": self.epoch,
            "rows_consumed": self.position,
            "data": self._decides_rows(),
            "newline_token_ids": list(self._index.newline_ids),
            "skipped": {str(number): reason for number, reason in sorted(self.skipped.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError naming what differs if it belongs to other data or another seed."""
        check_same_data(state["data"] | {"seed": str(state["seed"])}, self._decides_rows() | {"seed": str(self._config.training.seed)})
        self.position = state["rows_consumed"]
        self._bad.failed = {int(number): reason for number, reason in state["skipped"].items()}

    def _decides_rows(self) -> dict[str, str]:
        """What must be the same for a resumed run to read the same rows and see the same pixels, by name."""
        vision, fast = self._config.model.vision, " by the decoder" * self._config.data.video.fast_resize
        components = self._index.components() | {"pixels": f"{vision.preprocess} to {vision.image_size} px{fast}"}
        if self._mixture is not None and not self._mixture.is_every_sample_once(len(self._index)):
            components["mixture"] = self._mixture.describe()
        return components

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if self._evaluation:
            self.position = 0
        batch_size = self._config.data.global_batch_size
        rows = self._prepared_rows()
        try:
            while self.num_rows is None or self.position < self.num_rows:
                mine = step_rows(self.position, batch_size, self._place.dp_rank, self._place.dp_size)
                prepared = [next(rows) for _ in mine]
                statuses = [self._agree(one) for one in prepared]
                step = [self._finish(one, status) for one, status in zip(prepared, statuses, strict=True)]
                self._record_failures(prepared, statuses)
                self.position += batch_size
                if self.num_rows is not None:
                    self.position = min(self.position, self.num_rows)
                yield step
        finally:
            rows.close()

    def _prepared_rows(self) -> Iterator[_Prepared]:
        """This rank's rows from the position on, prepared by `num_workers` threads; at most one step's rows (or one per thread) wait."""
        numbers = self._row_numbers()
        workers = self._config.data.num_workers
        if workers == 0:
            yield from map(self._prepare, numbers)
            return
        ahead = max(workers, self._config.data.global_batch_size // self._place.dp_size)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        waiting: deque[Future[_Prepared]] = deque()
        try:
            while True:
                while len(waiting) < ahead:
                    waiting.append(pool.submit(self._prepare, next(numbers)))
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _row_numbers(self) -> Iterator[np.ndarray]:
        """Samples of each of this rank's rows from the position on, endless."""
        position, batch_size = self.position, self._config.data.global_batch_size
        while True:
            yield from map(self._samples_of, step_rows(position, batch_size, self._place.dp_rank, self._place.dp_size))
            position += batch_size

    def _samples_of(self, row: int) -> np.ndarray:
        """Sample numbers of a row of the list; none past the end (a padding row)."""
        return self.schedule.row(row) if self.num_rows is None or row < self.num_rows else np.empty(0, dtype=np.int64)

    def _prepare(self, numbers: np.ndarray) -> _Prepared:
        """Tokens, plan and this rank's frames of one row. Runs in a thread: no collective, no shared state is written."""
        place, vision = self._place, self._config.model.vision
        row = self._index.row(numbers)
        found, cached = [len(sample) for sample in row.samples], self._lengths[numbers].tolist()
        if found != cached:
            raise ValueError(
                f"samples {row.sample_ids} have {found} tokens, but {cached} in the cached token lengths; "
                "delete the token_lengths-*.json files beside the dataset or in the run directory's cache/"
            )
        plan = plan_row(row.spec, ulysses_size=place.ulysses_size, ring_size=place.ring_size, row_multiple=place.row_multiple)[
            place.cp_rank
        ]
        count = len(plan.frames) if place.holds_frames else 0
        prepared = _Prepared(row, plan, torch.zeros(count, vision.image_size, vision.image_size, 3, dtype=torch.uint8))
        if place.decodes and count:
            self._decode(prepared)
        return prepared

    def _decode(self, prepared: _Prepared) -> None:
        """Fill the frames; a sample that cannot be read leaves a reason."""
        video, vision, row = self._config.data.video, self._config.model.vision, prepared.row
        pixels = prepared.frames.numpy()
        for share in split_media(row, prepared.plan.frames):
            number = row.numbers[share.place]
            if share.place in prepared.reasons or number in self.skipped:
                continue
            dataset, sample = self._index.locate(number)
            media = dataset.media[sample.media[share.medium]]
            selected = self._index.selected_frames(media)
            try:
                pixels[share.rows], status = decode_frames(
                    dataset.read(media),
                    [selected[frame] for frame in share.frames],
                    image_size=vision.image_size,
                    preprocess=vision.preprocess,
                    fast_resize=video.fast_resize,
                    timeout_s=video.timeout_s,
                    on_bad_frame=video.on_bad_frame,
                    siblings=selected,
                    limits=dataset.limits,
                    timeline=dataset.timeline(media),
                )
            except (MediaError, OSError) as error:
                prepared.reasons[share.place] = f"medium {media.sha256[:16]} {error}"
                continue
            prepared.num_decoded += len(share.frames)
            prepared.replaced[share.place] += int(status.sum())

    def _agree(self, prepared: _Prepared) -> np.ndarray:
        """Status of each sample of the row, the same on every rank of the replica: 0, or 1 + the (highest) rank that saw it fail."""
        place, row = self._place, prepared.row
        if place.tp is not None and place.holds_frames and place.tp.size() > 1 and len(prepared.frames):
            prepared.frames = prepared.frames.to(self._device)
            dist.broadcast(prepared.frames, group=place.tp, group_src=0)
        status = torch.zeros(len(row.samples), dtype=torch.int32)
        status[list(prepared.reasons)] = 1 + place.rank
        if len(row.frame_places):  # known to all: a row without frames has nothing to fail
            status = _reduce_max(status, place.replica, self._device)
        return status.numpy()

    def _finish(self, prepared: _Prepared, status: np.ndarray) -> MicroBatch:
        row = prepared.row
        self.frames_decoded += prepared.num_decoded
        for place, count in prepared.replaced.items():
            if count and row.numbers[place] not in self._warned:  # once a sample, not once an epoch
                self._warned.add(row.numbers[place])
                logger.warning("sample %s: %d frames do not decode; each shows its nearest good neighbour", row.sample_ids[place], count)
            self.frames_replaced += count
        failed = {place for place, number in enumerate(row.numbers) if status[place] or number in self.skipped}
        return build_micro_batch(row, prepared.plan, prepared.frames.to(self._device), failed)

    def _record_failures(self, prepared: list[_Prepared], statuses: list[np.ndarray]) -> None:
        """Tell all ranks which samples failed in this step, and why; they count from the next step on wherever they appear."""
        place = self._place
        numbers = [self._samples_of(row) for row in range(self.position, self.position + self._config.data.global_batch_size)]
        status = [np.zeros(len(samples), dtype=np.int32) for samples in numbers]
        status[place.dp_rank :: place.dp_size] = statuses
        joint = _reduce_max(torch.from_numpy(np.concatenate(status)), place.dp, self._device).tolist()
        writers = {number: value - 1 for number, value in zip(np.concatenate(numbers).tolist(), joint, strict=True) if value}
        if writers:  # the same on all ranks, so all of them gather or none
            seen = {one.row.numbers[at]: reason for one in prepared for at, reason in one.reasons.items()}
            self._bad.add_failed(_gather_dicts({number: seen[number] for number, rank in writers.items() if rank == place.rank}, place))


def _measure(index: SampleIndex, numbers: np.ndarray, cache: LengthCache, place: Place) -> tuple[np.ndarray, dict[int, str]]:
    """Token lengths by sample number (UNUSABLE outside `numbers`) and the reasons of the unusable ones: from the cache, else each rank
    measures its share."""
    if place.replica is None or index.is_text:
        found = None if index.is_text else cache.read()
        if found is None:
            lengths, reasons = index.measure(numbers, show_bar=not index.is_text)
            found = _spread(index, numbers, lengths), reasons
            if not index.is_text:
                cache.write(*found)
        return found
    answer = [cache.read() if place.rank == 0 else None]  # one rank looks, so that all take the same way
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        return answer[0]
    world_size = dist.get_world_size()
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, index.measure(numbers[place.rank :: world_size], show_bar=place.rank == 0))
    lengths, reasons = np.empty(len(numbers), dtype=np.int64), {}
    for rank, (share, share_reasons) in enumerate(shares):
        lengths[rank::world_size] = share
        reasons |= share_reasons
    lengths = _spread(index, numbers, lengths)
    if place.rank == 0:
        cache.write(lengths, reasons)
    return lengths, reasons


def _spread(index: SampleIndex, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Lengths of samples `numbers` at their places among all samples of the index."""
    spread = np.full(len(index), UNUSABLE, dtype=np.int64)
    spread[numbers] = lengths
    return spread


def _reduce_max(values: torch.Tensor, group: ProcessGroup | None, device: torch.device) -> torch.Tensor:
    """Elementwise maximum over a group, on the CPU; the values themselves without a group."""
    if group is None or group.size() == 1 or not len(values):
        return values
    values = values.to(device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values.cpu()


def _gather_dicts(own: dict[int, str], place: Place) -> dict[int, str]:
    """The union over all ranks, in ascending order."""
    if place.replica is None:
        return own
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return dict(sorted((number, reason) for share in shares for number, reason in share.items()))
