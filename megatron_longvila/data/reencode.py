"""Copies of videos that read quickly: H.264, upright, at a constant frame rate, with a keyframe every few seconds. The original stays."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from megatron_longvila.data.colours import READ_AS
from megatron_longvila.data.media import SNIFF_BYTES, Deadline, MediaError, MediaLimits, open_source, resolve_below, sniff
from megatron_longvila.data.output import Journal, PreprocessError, Progress, output_folder
from megatron_longvila.data.shards import canonical_json
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.workers import Killed, run_tasks

_VERSION = 2  # raise when the same settings make other files
_KILL_AFTER_S = 5.0
_MEASURED_FRAMES = 32  # of each video, to compare decoding before and after
# AVColorSpace of a frame -> the matrix its copy is coded with; RGB has none and gets BT.601's, all others stay what they are.
_MATRICES = {0: Colorspace.ITU601, 1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601}
_MATRICES |= {7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, **READ_AS}
_RATES = [Fraction(number, scale) for number in (24000, 25000, 30000, 48000, 50000, 60000) for scale in (1000, 1001)]


@dataclass(frozen=True)
class Settings:
    """What a copy is like.

    Attributes:
        height: of the upright picture; smaller ones are not enlarged.
        fps: frames per second; 0 keeps the video's mean rate.
        keyframe_s: seconds from one keyframe to the next.
        crf: quality of x264, 0 (lossless) to 51; preset: how hard it works for a small file.
    """

    height: int = 480
    fps: float = 0.0
    keyframe_s: float = 2.0
    crf: int = 23
    preset: str = "veryfast"


@dataclass(frozen=True)
class Options:
    """What a run does; `timeout_s` is for one file."""

    input: Path
    output: Path
    settings: Settings
    num_workers: int = 2
    timeout_s: float = 14_400.0
    limits: MediaLimits = MediaLimits()


@dataclass(frozen=True)
class Report:
    """What became of the files below the input folder.

    Attributes:
        prepared: videos re-encoded; kept: videos that were as wanted already, and pictures; both stand below the output folder.
        rejected: {"path", "reason"}.
        without_original: files below the output folder that stand for no usable file of the input folder (any more).
        bytes_before, bytes_after: of the re-encoded videos; decode_s_before, decode_s_after: processor seconds of decoding
            `_MEASURED_FRAMES` frames of each, one by one.
        changed: whether anything had to be done.
    """

    prepared: int
    kept: int
    rejected: tuple[dict, ...]
    without_original: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    decode_s_before: float
    decode_s_after: float
    changed: bool


class AsWanted(Exception):
    """The video needs no re-encoding."""


# ------------------------------------------------------------------------------------------------ one video


def reencode(source: str | Path, target: Path, settings: Settings, *, timeout_s: float | None, limits: MediaLimits) -> int:
    """Write the copy of a video to `target`; returns its number of frames.

    The copy shows at tick k the frame of the source that is on screen at (k + 1/2) / fps; for one that does not decode, the one before.
    Its colours are the source's: limited range, the matrix of the first frame, and both written into the stream.

    Raises:
        AsWanted: nothing to do. MediaError: the source cannot be used, or none of its frames decodes.
    """
    with VideoStream(source, Deadline(timeout_s), limits) as stream:
        timeline, times = stream.timeline, stream.times_s()
        width, height = stream.upright_size()
        rate = _rate(timeline.num_frames / timeline.duration_s, settings.fps)
        size = _scaled(width, height, settings.height)
        if _is_as_wanted(stream, times, rate, settings, height):
            raise AsWanted
        num_ticks = max(1, round(timeline.duration_s * rate))
        shown = np.searchsorted(times, (np.arange(num_ticks) + 0.5) / float(rate), side="right") - 1
        pictures = _at_ticks(stream, np.maximum(shown, 0), size)
        with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as output:
            video = _add_stream(output, size, rate, settings)
            for tick, picture in enumerate(pictures):
                if not tick:
                    _describe_colours(video.codec_context, picture)
                picture.pts, picture.time_base = tick, 1 / rate
                picture.pict_type = av.video.frame.PictureType.NONE  # the encoder decides, not the source
                output.mux(video.encode(picture))
            output.mux(video.encode(None))
        return num_ticks


def _rate(mean: float, wanted: float) -> Fraction:
    """`wanted`, or the broadcast rate within 0.1% of the mean rate, or the mean itself."""
    if wanted:
        return Fraction(wanted).limit_denominator(1001)
    near = min(_RATES, key=lambda rate: abs(float(rate) - mean))
    return near if abs(float(near) - mean) <= 1e-3 * mean else max(Fraction(1, 1000), Fraction(mean).limit_denominator(1001))


def _scaled(width: int, height: int, wanted_height: int) -> tuple[int, int]:
    """Upright (width, height): at most `wanted_height` high, even as 4:2:0 needs it."""
    scale = min(1.0, wanted_height / height)
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _is_as_wanted(stream: VideoStream, times: np.ndarray, rate: Fraction, settings: Settings, height: int) -> bool:
    timeline = stream.timeline
    if stream.codec != "h264" or not stream.is_upright or stream.extension != "mp4" or height > settings.height or not len(timeline.pts_P):
        return False
    keys = np.unique(timeline.key_position_F)
    key_times = times[np.isin(timeline.position_F, keys)]
    longest = np.diff([*key_times, timeline.duration_s]).max(initial=0.0)
    steady = np.abs(times - np.arange(len(times)) / float(rate)).max() < 0.5 / float(rate)
    return bool(steady and longest <= settings.keyframe_s + 1 / float(rate))


def _at_ticks(stream: VideoStream, shown: np.ndarray, size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    """The picture of each tick; `shown` is the index of its frame, ascending."""
    tick, last, picture, matrix = 0, None, None, None
    for index, frame in stream.frames():
        if last is None:
            matrix = _MATRICES.get(int(frame.colorspace))
        else:
            while tick < len(shown) and shown[tick] < index:
                picture = picture or _upright(last, stream.orient(last), size, matrix)
                yield picture
                tick += 1
        last, picture = frame, None
    if last is None:
        raise MediaError("has a video track, but no frame of it decodes")
    picture = _upright(last, stream.orient(last), size, matrix)
    for _ in range(tick, len(shown)):
        yield picture


def _upright(frame: av.VideoFrame, transpose: Image.Transpose | None, size: tuple[int, int], matrix: Colorspace | None) -> av.VideoFrame:
    """The frame as 4:2:0 of limited range, scaled to `size` once it is upright. Turned plane by plane: no detour over RGB."""
    turned = transpose in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE)
    width, height = size[::-1] if turned else size
    colours = {"src_colorspace": READ_AS.get(int(frame.colorspace)), "dst_colorspace": matrix, "dst_color_range": ColorRange.MPEG}
    scaled = frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC", **colours)
    if transpose is None:
        return scaled
    luma, *chroma = np.split(scaled.to_ndarray().reshape(-1), [width * height, width * height * 5 // 4])
    planes = [luma.reshape(height, width), *(plane.reshape(height // 2, width // 2) for plane in chroma)]
    upright = [np.array(Image.fromarray(np.ascontiguousarray(plane)).transpose(transpose)) for plane in planes]
    joined = np.concatenate([plane.reshape(-1) for plane in upright]).reshape(size[1] * 3 // 2, size[0])
    result = av.VideoFrame.from_ndarray(joined, format="yuv420p")
    _describe_colours(result, scaled)
    return result


def _describe_colours(target, picture: av.VideoFrame) -> None:
    """Give a frame or an encoder the colour tags of `picture`. Without them readers guess, and show other colours."""
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(target, name, getattr(picture, name))


def _add_stream(output, size: tuple[int, int], rate: Fraction, settings: Settings):
    interval = max(1, round(settings.keyframe_s * rate))
    # No keyframes at cuts: they would make groups of uneven length and a frame's cost uneven. Threads: the files run side by side.
    parameters = f"keyint={interval}:min-keyint={interval}:scenecut=0:open-gop=0:threads=1"
    options = {"preset": settings.preset, "crf": str(settings.crf), "x264-params": parameters}
    video = output.add_stream("libx264", rate=rate, options=options)
    video.width, video.height = size
    video.pix_fmt = "yuv420p"
    video.codec_context.thread_count = 1
    return video


def decode_seconds(source: str | Path, limits: MediaLimits) -> float:
    """Processor seconds of this process for `_MEASURED_FRAMES` frames spread evenly over a video, as pictures."""
    start = time.process_time()
    with VideoStream(source, Deadline(None), limits) as stream:
        last = stream.timeline.num_frames - 1
        stream.read(sorted(set(np.linspace(0, last, min(_MEASURED_FRAMES, last + 1)).round().astype(int).tolist())), stream.to_rgb)
    return time.process_time() - start


# ------------------------------------------------------------------------------------------------ a folder of them


@dataclass(frozen=True)
class _Task:
    key: str
    source: str
    target: str
    settings: Settings
    timeout_s: float
    limits: MediaLimits


def prepare(options: Options, progress: Progress = lambda iterable, total, unit: iterable) -> Report:
    """Copy every video below the input folder, re-encoded, to the same path below the output folder; pictures and videos that are as
    wanted already are linked (one file with two names: writing into one changes the other), or copied where links cannot be. What an
    earlier run finished is left alone. The copy of an earlier content of a file that is now rejected is removed; one whose original is
    gone is reported and stays, since it may be the last.

    Raises:
        PreprocessError: a folder that cannot be used; OSError where the disk is full or fails.
    """
    source, target = options.input.resolve(), options.output.resolve()
    if not source.is_dir():
        raise PreprocessError(f"--input {options.input} is not a folder; give the one that holds the videos")
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise PreprocessError(f"--output {options.output} and --input {options.input} lie in one another; give a folder beside it")
    header = canonical_json({"version": _VERSION, "settings": asdict(options.settings)})
    with output_folder(options.output, "copies"):
        with Journal(options.output / "state" / "prepared.jsonl", header, write=True) as journal:
            tasks, refused = _plan(options, source, target)
            todo = [task for task in tasks if not _is_done(task, journal.entries.get(task.key))]
            results = run_tasks(_work, todo, num_workers=options.num_workers, timeout_s=options.timeout_s + _KILL_AFTER_S)
            answers = {task.key: journal.entries.get(task.key) for task in tasks}
            for task, answer in progress(results, len(todo), "file"):
                if isinstance(answer, Killed):
                    _partial(task.target).unlink(missing_ok=True)
                    answer = {"error": answer.reason, "final": False}
                answers[task.key] = answer
                if answer.get("final", True):
                    journal.append(task.key, answer)
            for task in tasks:
                if "error" in answers[task.key] and Path(task.target).is_file():
                    Path(task.target).unlink()
    return _report(tasks, answers, refused, _without_original(target, tasks), bool(todo))


def _plan(options: Options, source: Path, target: Path) -> tuple[list[_Task], list[dict]]:
    """A task for each file below `source` in the order of names, and the files that lead out of it. Hidden files are left out."""
    tasks, refused = [], []
    for folder, names, files in os.walk(source):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(one for one in [*files, *names] if not one.startswith(".")):
            path = Path(folder, name)
            relative = str(path.relative_to(source))
            if name in names:
                if path.is_symlink():
                    refused.append({"path": relative, "reason": "is a link to a folder; give that folder as --input, or copy it"})
                continue
            try:
                real = resolve_below(source, relative)
                status = real.stat()
            except (MediaError, OSError) as error:
                refused.append({"path": relative, "reason": getattr(error, "strerror", None) or str(error)})
                continue
            key = f"{relative}|{status.st_size}|{status.st_mtime_ns}"
            tasks.append(_Task(key, str(real), str(target / relative), options.settings, options.timeout_s, options.limits))
    return tasks, refused


def _without_original(target: Path, tasks: list[_Task]) -> tuple[str, ...]:
    """Files below the output folder, by relative path, that are nobody's copy. Hidden files and our own are left out."""
    ours = {str(target / "report.json"), *(task.target for task in tasks)}
    left = []
    for folder, names, files in os.walk(target):
        names[:] = sorted(name for name in names if not name.startswith(".") and Path(folder, name) != target / "state")
        paths = [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
        left += [str(path.relative_to(target)) for path in paths if str(path) not in ours]
    return tuple(left)


def _is_done(task: _Task, entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    if "error" in entry:
        return True
    path = Path(task.target)
    return path.is_file() and path.stat().st_size == entry["bytes_after"]


def _work(task: _Task) -> dict:
    """Runs in a worker: what became of one file."""
    target, partial = Path(task.target), _partial(task.target)
    try:
        with open_source(task.source, task.limits) as file:
            found = sniff(file.read(SNIFF_BYTES))
        target.parent.mkdir(parents=True, exist_ok=True)
        before = os.stat(task.source).st_size
        if found.is_image:
            raise AsWanted
        frames = reencode(task.source, partial, task.settings, timeout_s=task.timeout_s, limits=task.limits)
        after = partial.stat().st_size
        seconds = decode_seconds(task.source, task.limits), decode_seconds(partial, task.limits)
        os.replace(partial, target)
        return {
            "kind": "prepared", "frames": frames, "bytes_before": before, "bytes_after": after, "decode_s_before": seconds[0],
            "decode_s_after": seconds[1],
        }  # fmt: skip
    except AsWanted:
        _link(task.source, target, partial)
        return {"kind": "kept", "bytes_before": before, "bytes_after": before}
    except MediaError as error:
        return {"error": str(error), "final": True}
    except (av.FFmpegError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        return {"error": f"cannot be re-encoded: {error.strerror or error}", "final": False}
    finally:
        partial.unlink(missing_ok=True)


def _partial(target: str) -> Path:
    path = Path(target)
    return path.with_name(f".{path.name}.partial"[-255:])  # hidden: never taken for a medium


def _link(source: str, target: Path, partial: Path) -> None:
    """Put the same bytes at `target`; another link to the file where the file system allows it."""
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # replacing a file by a link to itself leaves both names


def _report(tasks: list[_Task], answers: dict[str, dict], refused: list[dict], without_original: tuple[str, ...], changed: bool) -> Report:
    rejected = refused + [
        {"path": task.key.rsplit("|", 2)[0], "reason": answers[task.key]["error"]} for task in tasks if "error" in answers[task.key]
    ]
    prepared = [answer for answer in answers.values() if answer.get("kind") == "prepared"]
    return Report(
        prepared=len(prepared),
        kept=sum(answer.get("kind") == "kept" for answer in answers.values()),
        rejected=tuple(rejected),
        without_original=without_original,
        bytes_before=sum(answer["bytes_before"] for answer in prepared),
        bytes_after=sum(answer["bytes_after"] for answer in prepared),
        decode_s_before=sum(answer["decode_s_before"] for answer in prepared),
        decode_s_after=sum(answer["decode_s_after"] for answer in prepared),
        changed=changed,
    )
