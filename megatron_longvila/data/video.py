"""Frames of a video: which ones (`select_frames`), what a file holds (`probe`), and their pixels (`decode_frames`).

A frame index counts the real frames of the stream in presentation order; `num_frames` is their number. An index becomes a time stamp
through the demuxed packet list, never through index x average rate, so variable frame rates, start offsets and B-frames are exact.
Shapes: F frames, S side of the square picture.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longvila.config import VideoConfig
from megatron_longvila.data.images import open_image, to_square
from megatron_longvila.data.media import (
    DEFAULT_LIMITS,
    SNIFF_BYTES,
    ByteRange,
    Deadline,
    MediaError,
    MediaLimits,
    Source,
    frame_files,
    missing_bytes,
    open_source,
    sniff,
)
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.timeline import pack, unpack


@dataclass(frozen=True)
class MediaFacts:
    """What the index says about a media file. `width` and `height` are upright (after `rotation`, clockwise degrees); `timeline` is that of
    a video, packed, empty where it has none worth keeping."""

    kind: str  # "video", "image" or "frames"
    num_frames: int
    duration_s: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    extension: str
    timeline: bytes = b""


def select_frames(num_frames: int, duration_s: float, config: VideoConfig) -> list[int]:
    """Indices of the frames that stand for a medium, in time order; a pure function, so token counts are known before any decoding.

    uniform: linspace(0, num_frames - 1) rounded (half to even); a video shorter than config.num_frames gives each frame once.
    fps_capped (the rule LongVILA was built on): N = config.num_frames over the whole video if duration_s >= N / fps, else
        int(duration_s * fps), at least 2 and at most N; linspace truncated to integers. Repeats frames where fps exceeds the video's own.
    fps_head (the later rule of the public code): time stamps 0, 1/fps, 2/fps, ... inside the video, the first N of them;
        each gives the frame shown at that time at the video's mean rate. A long video is cut to its first N / fps seconds.
    A medium of one frame (an image) is [0] under every rule.

    Raises:
        ValueError: no frame was asked for, or there is none.
    """
    if config.num_frames < 1:
        raise ValueError(f"num_frames={config.num_frames}: at least 1 frame must be asked for; leave the video out of the data instead")
    if num_frames < 1:
        raise ValueError(f"the video has num_frames={num_frames}; a medium without frames belongs in the preprocessing report")
    last, wanted = num_frames - 1, config.num_frames
    if last == 0:
        return [0]
    if config.frame_rule == "uniform":
        return np.linspace(0, last, min(wanted, num_frames)).round().astype(int).tolist()
    if not (config.fps > 0 and duration_s > 0):
        raise ValueError(f"frame_rule={config.frame_rule} needs fps > 0 and a duration: fps={config.fps}, duration_s={duration_s}")
    if config.frame_rule == "fps_capped":
        if duration_s < wanted / config.fps:
            wanted = min(wanted, max(2, int(duration_s * config.fps)))
        return np.linspace(0, last, wanted).astype(int).tolist()
    if config.frame_rule == "fps_head":
        count = min(wanted, max(1, int(np.ceil(duration_s * config.fps - 1e-6))))
        times = np.arange(count) / config.fps
        return np.minimum(last, times * (num_frames / duration_s) + 1e-6).astype(int).tolist()  # 1e-6: 0.1 * 30 must reach frame 3
    raise ValueError(f"frame_rule={config.frame_rule!r} is not one of uniform, fps_capped, fps_head")


def probe(source: Source, *, fps: float | None = None, timeout_s: float | None = None, limits: MediaLimits = DEFAULT_LIMITS) -> MediaFacts:
    """Facts of a video, an image, or a list or folder of frames shown at `fps`. Reads every packet and decodes the first frame.

    Raises:
        MediaError: unknown format, no video in it, nothing decodes, or past a limit; DecodeTimeout past `timeout_s`.
    """
    source = _resolve(source)
    deadline = Deadline(timeout_s)
    if isinstance(source, list):
        return _probe_frames(source, fps, deadline, limits)
    if _is_image(source, limits):
        image, rotation = open_image(source, limits)
        found = _sniff_source(source, limits)
        return MediaFacts("image", 1, 0.0, 0.0, image.width, image.height, rotation, found.reader.lower(), found.extension)
    with open_source(source, limits) as file:
        missing = missing_bytes(file, sniff(file.read(SNIFF_BYTES)))
        if missing:
            raise MediaError(f"is cut: its last {missing} bytes are missing")
    with VideoStream(source, deadline, limits) as stream:
        timeline = stream.timeline
        width, height = stream.upright_size()
        rate = timeline.num_frames / timeline.duration_s
        facts = (timeline.num_frames, timeline.duration_s, rate, width, height, stream.rotation, stream.codec, stream.extension)
        return MediaFacts("video", *facts, timeline=pack(timeline))


def decode_frames(
    source: Source,
    indices: Sequence[int],
    *,
    image_size: int,
    preprocess: str = "resize",
    fast_resize: bool = False,
    timeout_s: float | None = None,
    on_bad_frame: str = "nearest",
    siblings: Sequence[int] | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    timeline: bytes = b"",
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the frames `indices` (any order, repeats allowed) of a video, image or list of frames.

    Args:
        image_size: S.
        preprocess: `resize` stretches to S x S, `pad` pads to a square with the mean colour first; Pillow's bicubic filter either way.
        fast_resize: let the decoder scale; quicker, close to but not bit-equal to the bicubic path.
        timeout_s: wall-clock limit; checked between packets and frames, so one native call can overrun it.
        on_bad_frame: `nearest` replaces a frame that does not decode by the nearest good one of `siblings`; `skip_sample` and `fail`
            raise MediaError instead (the caller skips the sample or fails the run).
        siblings: all frames selected of this medium, when `indices` is only this rank's share: the replacement is then the same
            whatever the share is. Default: `indices`.
        timeline: MediaFacts.timeline of this very file; without it the whole file is demuxed first.

    Returns:
        pixels_FSS3 uint8 in the order of `indices`, status_F uint8 (0 decoded, 1 replaced).

    Raises:
        MediaError: the medium cannot be opened, or no frame of it decodes. DecodeTimeout: past `timeout_s`.
    """
    if preprocess not in ("resize", "pad"):
        raise ValueError(f"preprocess={preprocess!r} is not one of resize, pad")
    if on_bad_frame not in ("nearest", "skip_sample", "fail"):
        raise ValueError(f"on_bad_frame={on_bad_frame!r} is not one of nearest, skip_sample, fail")
    source = _resolve(source)
    reader = _Reader(source, image_size, preprocess, fast_resize, Deadline(timeout_s), limits, timeline)
    pixels_FSS3 = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    good = _Rows(pixels_FSS3, indices)
    with reader:
        reader.read(sorted(set(indices)), good)
        bad = {index: None for index in indices if index not in good}
        if bad and on_bad_frame != "nearest":
            raise MediaError(f"{len(bad)} of {len(set(indices))} frames do not decode, first frame {min(bad)}")
        for index in bad:
            bad[index] = _nearest(index, sorted(set(siblings if siblings is not None else indices)), good, reader)
    for row, index in enumerate(indices):
        if index in bad:
            pixels_FSS3[row] = bad[index]
        elif good.row_of[index] != row:
            pixels_FSS3[row] = good[index]
    return pixels_FSS3, np.array([index in bad for index in indices], np.uint8)


class _Rows(UserDict):
    """Pictures by frame index; of those asked for, the pixels are held by the array that goes to the caller and nowhere else."""

    def __init__(self, pixels_FSS3: np.ndarray, indices: Sequence[int]):
        super().__init__()
        self._pixels_FSS3 = pixels_FSS3
        self.row_of = {index: row for row, index in reversed(list(enumerate(indices)))}

    def __setitem__(self, index: int, picture_SS3: np.ndarray) -> None:
        row = self.row_of.get(index)
        if row is not None:
            self._pixels_FSS3[row] = picture_SS3
            picture_SS3 = self._pixels_FSS3[row]
        super().__setitem__(index, picture_SS3)


def _nearest(index: int, siblings: list[int], good: _Rows, reader: _Reader) -> np.ndarray:
    """The good frame next to `index` among `siblings` (the earlier of two equally near), decoding outward as far as needed."""
    for other in sorted(siblings, key=lambda sibling: (abs(sibling - index), sibling)):
        if other != index and other not in reader.bad:
            if other not in good:
                reader.read([other], good)
            if other in good:
                return good[other]
    raise MediaError(f"none of the {len(siblings)} frames asked for decodes")


class _Reader:
    """Square pictures by frame index from any source; remembers which frames failed."""

    def __init__(
        self, source, image_size: int, preprocess: str, fast_resize: bool, deadline: Deadline, limits: MediaLimits, timeline: bytes
    ):
        self.bad: set[int] = set()
        self._size, self._preprocess, self._fast = image_size, preprocess, fast_resize
        self._deadline, self._limits = deadline, limits
        self._images = source if isinstance(source, list) else [source] if _is_image(source, limits) else None
        known = unpack(timeline) if timeline else None
        self._stream = None if self._images is not None else VideoStream(source, deadline, limits, known)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_) -> None:
        if self._stream is not None:
            self._stream.close()

    def read(self, indices: list[int], found: _Rows) -> None:
        """Put uint8 [S, S, 3] of each index that decodes into `found`; the others go to `bad`. Raises MediaError for an index outside the
        medium."""
        num_frames = len(self._images) if self._images is not None else self._stream.timeline.num_frames
        outside = [index for index in indices if not 0 <= index < num_frames]
        if outside:
            raise MediaError(f"has {num_frames} frames, but frame {outside[0]} was asked for; preprocess it again if it changed")
        if self._images is None:
            convert = self._convert_fast if self._fast else lambda frame: self._square(self._stream.to_rgb(frame))
            self._stream.read(indices, convert, found)
        else:
            self._read_images(indices, found)
        self.bad.update(index for index in indices if index not in found)

    def _read_images(self, indices: list[int], found: _Rows) -> None:
        for index in indices:
            self._deadline.check("reading frames")
            try:
                found[index] = self._square(open_image(self._images[index], self._limits)[0])
            except MediaError:
                if len(self._images) == 1:
                    raise  # the reason of a bad image is worth more than "no frame decodes"

    def _square(self, picture) -> np.ndarray:
        return to_square(picture, self._size, self._preprocess)

    def _convert_fast(self, frame) -> np.ndarray:
        scale = self._size / max(frame.width, frame.height)
        inner = (self._size, self._size)
        if self._preprocess == "pad":
            inner = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
        return self._square(self._stream.to_rgb(frame, inner))


def _probe_frames(source: list, fps: float | None, deadline: Deadline, limits: MediaLimits) -> MediaFacts:
    if not fps or not fps > 0:
        raise MediaError(f"is a folder of frames and needs `fps` > 0 to be a video; got fps={fps}")
    if len(source) > limits.max_frames:
        raise MediaError(f"has {len(source)} frames, more than max_frames={limits.max_frames}")
    for number, file in enumerate(source):
        deadline.check("checking frames")
        try:
            if number == 0:
                image, rotation = open_image(file, limits)
            found = _sniff_source(file, limits)
            if not found.is_image:
                raise MediaError(f"is a video ({found.extension}), not an image")
        except MediaError as error:
            raise MediaError(f"frame {number} ({Path(file).name if isinstance(file, str | Path) else 'bytes'}) {error}") from error
    codec = found.reader.lower()
    return MediaFacts("frames", len(source), len(source) / fps, float(fps), image.width, image.height, rotation, codec, found.extension)


def _resolve(source: Source):
    """A list for frames (a folder becomes its files), else the one source."""
    if isinstance(source, str | Path) and Path(source).is_dir():
        return frame_files(source)
    if isinstance(source, bytes | bytearray | memoryview | str | Path | ByteRange):
        return source
    if not source:
        raise MediaError("is an empty list of frames")
    return list(source)


def _sniff_source(source, limits: MediaLimits):
    with open_source(source, limits) as file:
        return sniff(file.read(SNIFF_BYTES))


def _is_image(source, limits: MediaLimits) -> bool:
    return _sniff_source(source, limits).is_image
