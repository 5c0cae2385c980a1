"""Clips of about ten seconds: spans of the original video, cut at a fixed pace or on shot boundaries. Nothing is copied or re-encoded.

A clip is [start_s, end_s) in seconds from the first frame, and the frames shown in it; every frame belongs to exactly one clip.
Shapes: F frames, H, W.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

from megatron_longvila.data.long_video.records import WorkError, fail_stage, write_stage
from megatron_longvila.data.media import (
    DEFAULT_LIMITS,
    Deadline,
    MediaError,
    MediaLimits,
    describe_failure,
    natural_key,
    open_source,
    resolve_below,
)
from megatron_longvila.data.output import Journal, Progress
from megatron_longvila.data.shards import canonical_json
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.workers import Killed, run_tasks

LINKED_FOLDER = "is a link to a folder; give that folder itself, or copy it"
_KILL_AFTER_S = 5.0
_SHOT_WIDTH = 160  # pixels; the detector's own default scales down to about this


@dataclass(frozen=True)
class SegmentOptions:
    """How videos are cut.

    Attributes:
        clip_s: length that clips aim at.
        boundaries: `fixed`, equal clips; `shots`, boundaries found by PySceneDetect's content detector.
        threshold: of that detector; lower finds more shots.
        min_video_s: shorter videos are refused.
    """

    videos: Path
    listing: Path | None = None
    clip_s: float = 10.0
    boundaries: str = "fixed"
    threshold: float = 27.0
    min_video_s: float = 0.0
    num_workers: int = 2
    timeout_s: float = 3600.0
    limits: MediaLimits = DEFAULT_LIMITS


def plan_boundaries(duration_s: float, clip_s: float, cuts_s: list[float]) -> list[float]:
    """Ends of the clips of a video, increasing, the last one `duration_s`.

    A shot longer than 1.5 clips is split into equal parts; neighbours are joined while a clip is shorter than 3/4 of `clip_s` and does not
    grow past 1.5 times. Without cuts, the video is one shot.
    """
    pieces = []
    edges = [0.0, *sorted(cut for cut in set(cuts_s) if 0 < cut < duration_s), duration_s]
    for start, end in zip(edges, edges[1:], strict=False):
        parts = max(1, round((end - start) / clip_s)) if end - start > 1.5 * clip_s or not cuts_s else 1
        pieces += [(end - start) / parts] * parts
    lengths: list[float] = []
    for piece in pieces:
        if lengths and lengths[-1] < 0.75 * clip_s and lengths[-1] + piece <= 1.5 * clip_s:
            lengths[-1] += piece
        else:
            lengths.append(piece)
    if len(lengths) > 1 and lengths[-1] < 0.75 * clip_s and lengths[-2] + lengths[-1] <= 1.5 * clip_s:
        lengths[-2:] = [lengths[-2] + lengths[-1]]
    return [*np.cumsum(lengths[:-1]).tolist(), duration_s]


def cut_clips(times_s_F: np.ndarray, ends_s: list[float]) -> list[dict]:
    """The clips that end at `ends_s`; one in which no frame is shown (a gap in the video) is joined to the one before it."""
    firsts = [0, *np.searchsorted(times_s_F, np.asarray(ends_s[:-1]) - 1e-6).tolist(), len(times_s_F)]
    clips, start_s = [], 0.0
    for first, stop, end_s in zip(firsts, firsts[1:], ends_s, strict=False):
        if first == stop:
            clips[-1]["end_s"] = round(end_s, 3)  # frame 0 is shown at 0, so the first clip is never empty
        else:
            clips.append({"start_s": round(start_s, 3), "end_s": round(end_s, 3), "first_frame": first, "last_frame": stop - 1})
        start_s = end_s
    return clips


def find_videos(root: Path, listing: Path | None) -> Iterator[tuple[str, Path | str]]:
    """(name below `root`, its real file or why it is refused), in natural order of the names, or in the order of a list of names.

    Links to files are followed as long as they stay below the root, links to folders are refused. Hidden files are left out.
    """
    if not root.is_dir():
        raise WorkError(f"--videos {root} is not a folder")
    if listing is None:
        names = sorted(_walk(root), key=natural_key)
    else:
        try:
            lines = listing.read_bytes().split(b"\n")
        except OSError as error:
            raise WorkError(f"--list {listing} cannot be read: {error.strerror}") from None
        names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
    seen = set()
    for name in names:
        if name in seen:
            yield name, "is listed twice"
            continue
        seen.add(name)
        try:
            real = resolve_below(root, name)
        except MediaError as error:
            yield name, str(error)
            continue
        linked = real.is_dir() and os.path.islink(root / name)
        yield name, real if real.is_file() else LINKED_FOLDER if linked else "is not a plain file"


def _walk(root: Path) -> Iterator[str]:
    """Names below `root` of all files, and of the links to folders, which are not entered."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in files + linked if not name.startswith("."))


@dataclass(frozen=True)
class _Task:
    key: str
    path: str
    options: SegmentOptions


def look(task: _Task) -> dict:
    """Runs in a worker: facts and clips of a video, or {"error": reason, "final": whether a second try would say the same}."""
    options = task.options
    deadline = Deadline(options.timeout_s)
    try:
        with VideoStream(task.path, deadline, options.limits) as stream:
            width, height = stream.upright_size()
            times_s_F, duration_s = stream.times_s(), stream.timeline.duration_s
            if duration_s < options.min_video_s:
                raise MediaError(f"lasts {duration_s:.1f} s, less than min_video_s={options.min_video_s:g}")
            cuts_s = _find_shots(stream, times_s_F, duration_s, options) if options.boundaries == "shots" else []
            codec = stream.codec
        clips = cut_clips(times_s_F, plan_boundaries(duration_s, options.clip_s, cuts_s))
        with open_source(task.path, options.limits) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:
        return describe_failure(error)
    facts = {"duration_s": round(duration_s, 3), "num_frames": len(times_s_F), "width": width, "height": height, "codec": codec}
    if options.boundaries == "shots":
        facts["num_shots"] = len(cuts_s) + 1
    return {"sha256": digest, "size": os.path.getsize(task.path), **facts, "clips": clips}


def _find_shots(stream: VideoStream, times_s_F: np.ndarray, duration_s: float, options: SegmentOptions) -> list[float]:
    """Times of the first frames of new shots."""
    from scenedetect import ContentDetector, FrameTimecode  # only who looks for shots needs the package

    fps = max(1e-3, len(times_s_F) / duration_s)
    detector = ContentDetector(threshold=options.threshold, min_scene_len=max(1, round(fps)))  # shots of at least a second
    cuts = []
    for index, frame in stream.frames():  # in one go: a stream without stamps is decoded from its start for every visit
        with contextlib.suppress(av.FFmpegError):  # a damaged frame is no shot
            cuts += detector.process_frame(FrameTimecode(index, fps), _small(stream, frame))
    return [float(times_s_F[cut.frame_num]) for cut in cuts]


def _small(stream: VideoStream, frame) -> np.ndarray:
    """uint8 [H, W, 3], blue first as OpenCV has it."""
    size = (_SHOT_WIDTH, max(2, round(frame.height * _SHOT_WIDTH / max(1, frame.width))))
    return np.ascontiguousarray(stream.to_rgb(frame, size)[..., ::-1])


def segment(options: SegmentOptions, work: Path, progress: Progress) -> dict:
    """Run the stage: WORK/segment.jsonl holds one line per video. Returns its report.

    Raises:
        WorkError: the folder or list cannot be read, a library is missing, or no video can be used.
    """
    if options.boundaries == "shots":
        try:
            import scenedetect  # noqa: F401 (asked for before hours of work, not in a worker)
        except ImportError:
            raise WorkError("--boundaries shots needs PySceneDetect: pip install 'megatron-longvila[long_video]'") from None
    found = list(find_videos(options.videos, options.listing))
    keys = {name: _key(name, real) for name, real in found if isinstance(real, Path)}
    settings = {name: value for name, value in asdict(options).items() if name not in ("videos", "listing", "num_workers", "timeout_s")}
    tag = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]  # a journal per setting: coming back to one costs nothing
    with Journal(work / "answers" / f"segment-{tag}.jsonl", canonical_json(settings), write=True) as journal:
        answers = dict(journal.entries)
        tasks = [_Task(keys[name], str(real), options) for name, real in found if isinstance(real, Path) and keys[name] not in answers]
        results = run_tasks(look, tasks, num_workers=options.num_workers, timeout_s=options.timeout_s + _KILL_AFTER_S)
        for task, answer in progress(results, len(tasks), "segment"):
            if isinstance(answer, Killed):
                answer = {"error": answer.reason, "final": False}
            answers[task.key] = answer
            if answer.get("final", True):
                journal.append(task.key, answer)
    records, rejects = _sort_out(found, keys, answers)
    if not records:
        fail_stage(work, "segment", rejects)
        first = f"; of the first one: {rejects[0]['video']!r} {rejects[0]['reason']} (segment.rejects.jsonl has all)" if rejects else ""
        raise WorkError(f"none of {len(found)} files below {options.videos} is a video that can be used{first}")
    report = {
        "settings": settings,
        "videos": len(records),
        "clips": sum(len(record["clips"]) for record in records),
        "hours": round(sum(record["duration_s"] for record in records) / 3600, 4),
        "rejected": len(rejects),
    }
    return write_stage(work, "segment", records, rejects, {"root": str(options.videos.resolve()), **report}, sources=[])


def _key(name: str, real: Path) -> str:
    status = real.stat()
    return f"{name}|{status.st_size}|{status.st_mtime_ns}"


def _sort_out(found: list[tuple[str, Path | str]], keys: dict[str, str], answers: dict[str, dict]) -> tuple[list[dict], list[dict]]:
    records, rejects, first_name = [], [], {}
    for name, real in found:
        answer = answers[keys[name]] if isinstance(real, Path) else {"error": real}
        if "error" not in answer and first_name.setdefault(answer["sha256"], name) != name:
            answer = {"error": f"holds the same bytes as {first_name[answer['sha256']]!r}"}
        if "error" in answer:
            rejects.append({"video": name, "reason": answer["error"]})
        else:
            records.append({"video": name, **answer})
    return records, rejects
