"""What is in a dataset as a whole: counts, histograms and broken samples. inspection_views.py shows single samples.

Nothing here decides anything: order, rows, tokens, frames and plans come from the code that training runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_longvila.config import Config
from megatron_longvila.data.index import SampleIndex
from megatron_longvila.data.media import MediaError, MediaLimits
from megatron_longvila.data.mixture import UNUSABLE
from megatron_longvila.data.shards import Dataset, Media
from megatron_longvila.data.video import decode_frames
from megatron_longvila.data.workers import Killed, run_tasks

KILL_AFTER_S = 5.0  # past video.timeout_s, for a native call that the reader's own check cannot end

Progress = Callable[[Iterable, int, str], Iterable]
"""Wraps an iterable of known length to show progress: (iterable, total, what is counted)."""


@dataclass(frozen=True)
class Broken:
    """A sample that training would leave out or mute."""

    number: int
    id: str
    dataset: str
    line: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """Counts of a list of datasets.

    Attributes:
        counts: samples, media by kind, hours, rows of one epoch, ...
        histograms: name -> [(from, below, how many)], bins double in width.
        broken: samples whose text or media cannot be used, in order.
    """

    counts: dict[str, float | int]
    histograms: dict[str, list[tuple[int, int, int]]]
    broken: tuple[Broken, ...]

    def with_broken(self, more: Iterable[Broken]) -> Summary:
        """With further broken samples; one that is known already keeps its first reason."""
        found = {one.number: one for one in (*more, *self.broken)}
        return replace(self, broken=tuple(found[number] for number in sorted(found)))


def histogram(values: Sequence[float] | np.ndarray) -> list[tuple[int, int, int]]:
    """(from, below, how many) over [0, 1), [1, 2), [2, 4), [4, 8), ... from the first bin that holds a value to the last one."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return []
    # frexp is exact where log2 is not: 2**k must start its own bin
    bins = np.maximum(0, np.frexp(values)[1])
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0])
    return [(0 if number == 0 else 1 << (number - 1), 1 << number, int(counts[number])) for number in range(first, len(counts))]


def summarise(
    index: SampleIndex,
    numbers: np.ndarray,
    drawn: np.ndarray,
    lengths: np.ndarray,
    reasons: dict[int, str],
    *,
    num_rows: int,
    context_length: int,
) -> Summary:
    """Count what the index knows; nothing is decoded.

    Args:
        numbers: the samples that any epoch may show, ascending. int64.
        drawn: those of the first epoch, with repeats where a mixture draws one more than once. int64.
        lengths: tokens of each sample, UNUSABLE where `reasons` says why.
        num_rows: of the epoch.
    """
    frames, kinds, media, users = {}, Counter(), {}, Counter()
    for number in numbers.tolist():
        dataset, sample = index.locate(number)
        own = [dataset.media[name] for name in sample.media]
        frames[number] = sum(len(index.selected_frames(one)) for one in own)
        media.update({one.sha256: one for one in own})
        users.update(one.sha256 for one in own)
        kinds["of text alone" if not own else "with one medium" if len(own) == 1 else "with several media"] += 1
    usable = lengths[drawn][lengths[drawn] != UNUSABLE]
    videos = [one for one in media.values() if one.kind != "image"]
    counts = {
        "samples": len(numbers),
        "usable samples": int((lengths[numbers] != UNUSABLE).sum()),
        **{f"samples {kind}": count for kind, count in sorted(kinds.items())},
        **{f"media: {kind}": count for kind, count in sorted(Counter(one.kind for one in media.values()).items())},
        "media shown more than once": sum(count > 1 for count in users.values()),
        "hours of video": round(sum(one.duration_s for one in videos) / 3600, 3),
        "samples of an epoch": len(usable),
        "frames of an epoch": sum(frames[number] for number in drawn.tolist() if lengths[number] != UNUSABLE),
        "tokens of an epoch": int(usable.sum()),
        "rows of an epoch": num_rows,
        "share of the rows filled": round(float(usable.sum()) / max(1, num_rows * context_length), 4),
    }
    histograms = {
        "frames of a sample": histogram(list(frames.values())),
        "tokens of a sample": histogram(lengths[numbers][lengths[numbers] != UNUSABLE]),
        "seconds of a video": histogram([one.duration_s for one in videos]),
        "frames in a video file": histogram([one.num_frames for one in videos]),
    }
    return Summary(counts, histograms, tuple(_broken(index, number, reason) for number, reason in sorted(reasons.items())))


def _broken(index: SampleIndex, number: int, reason: str) -> Broken:
    dataset, sample = index.locate(number)
    return Broken(number, sample.id, str(dataset.path), index.line(number), reason)


def find_broken_media(
    index: SampleIndex,
    numbers: Iterable[int],
    config: Config,
    *,
    decode: bool,
    num_workers: int,
    progress: Progress = lambda iterable, total, unit: iterable,
) -> list[Broken]:
    """Those of the samples `numbers` whose media are missing or cut (`decode=False`: looks at files and sizes alone), or hold a frame
    that does not decode.

    Decoding reads the frames the configured rule selects, in processes that are killed past data.video.timeout_s.
    """
    users: dict[tuple[int, str], list[int]] = {}  # a medium is looked at once, whatever the number of samples that show it
    for number in numbers:
        dataset, sample = index.locate(number)
        for name in dict.fromkeys(sample.media):
            users.setdefault((id(dataset), name), []).append(number)
    found: dict[int, str] = {}
    tasks = []
    for (_, name), shown_by in users.items():
        dataset = index.locate(shown_by[0])[0]
        task = media_task(index, dataset, dataset.media[name], config, key=shown_by)
        if isinstance(task, str):
            found.update(dict.fromkeys(shown_by, task))
        else:
            tasks.append(task)
    if decode:
        timeout_s = config.data.video.timeout_s + KILL_AFTER_S
        for task, answer in progress(run_tasks(check_media, tasks, num_workers=num_workers, timeout_s=timeout_s), len(tasks), "medium"):
            reason = answer.reason if isinstance(answer, Killed) else answer
            if reason:
                found.update(dict.fromkeys(task.key, f"medium {task.media.sha256[:16]} {reason}"))
    return [_broken(index, number, reason) for number, reason in sorted(found.items())]


class MediaTask(NamedTuple):
    """One medium to decode in a worker; `key` is the caller's."""

    key: object
    media: Media
    source: object
    indices: list[int]
    image_size: int
    preprocess: str
    fast_resize: bool
    timeout_s: float
    limits: MediaLimits
    timeline: bytes
    thumbnail: int


def media_task(index: SampleIndex, dataset: Dataset, media: Media, config: Config, *, key: object, thumbnail: int = 0) -> MediaTask | str:
    """The task, or why the medium cannot be read."""
    try:
        source, timeline = dataset.read(media), dataset.timeline(media)
    except (MediaError, OSError) as error:
        return f"medium {media.sha256[:16]} {error}"
    vision, video = config.model.vision, config.data.video
    indices = index.selected_frames(media)
    how = (vision.image_size, vision.preprocess, video.fast_resize, video.timeout_s, dataset.limits)
    return MediaTask(key, media, source, indices, *how, timeline, thumbnail)


def check_media(task: MediaTask) -> str:
    """Runs in a worker: what is wrong with a medium, empty if nothing."""
    try:
        _, status_F = decode_task(task)
    except (MediaError, OSError) as error:
        return str(error)
    bad = int(status_F.sum())
    return f"has {bad} of {len(status_F)} frames that do not decode; each would show its nearest good neighbour" if bad else ""


def decode_task(task: MediaTask) -> tuple[np.ndarray, np.ndarray]:
    """decode_frames as training calls it: pixels_FSS3 uint8 and status_F uint8."""
    return decode_frames(
        task.source,
        task.indices,
        image_size=task.image_size,
        preprocess=task.preprocess,
        fast_resize=task.fast_resize,
        timeout_s=task.timeout_s,
        limits=task.limits,
        timeline=task.timeline,
    )
