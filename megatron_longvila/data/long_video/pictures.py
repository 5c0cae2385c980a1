"""What the captioner is shown: a few frames of each clip, or a picture, as JPEGs inside the request."""

from __future__ import annotations

import base64
import functools
import io
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_longvila.data.images import open_image
from megatron_longvila.data.media import DEFAULT_LIMITS, Deadline, MediaError, MediaUnreadable
from megatron_longvila.data.stream import VideoStream
from megatron_longvila.data.workers import Assistant, Killed

_OPEN_VIDEOS = 4  # clips come video by video, so the threads work on one or two at a time


@dataclass(frozen=True)
class PictureOptions:
    """`num_frames` of a clip, evenly spaced; the longer side scaled down to `image_size` pixels; JPEG quality. In every request's key.

    `timeout_s`, for opening a video and reading the frames of a clip, is in none.
    """

    num_frames: int = 8
    image_size: int = 448
    jpeg_quality: int = 90
    timeout_s: float = 300.0


def clip_frames(first_frame: int, last_frame: int, num_frames: int) -> list[int]:
    """Frame indices that stand for a clip: middles of equal parts, so that neighbouring clips do not show the same moment."""
    count = last_frame - first_frame + 1
    if count <= num_frames:
        return list(range(first_frame, last_frame + 1))
    return [first_frame + int((part + 0.5) * count / num_frames) for part in range(num_frames)]


def picture_content(text: str, pictures: list[bytes]) -> list[dict]:
    """Content of a user message: the pictures in order, then the text."""
    urls = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def read_image(path: Path, options: PictureOptions) -> bytes:
    """JPEG of an image file. Raises MediaError."""
    return _jpeg(open_image(path, DEFAULT_LIMITS)[0], options)


class ClipReader:
    """Frames of clips from many threads; keeps the videos read last open, since opening one reads its whole packet list."""

    def __init__(self, options: PictureOptions):
        self._options = options
        self._lock = threading.Lock()
        self._streams: OrderedDict[str, _Shared] = OrderedDict()

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *_) -> None:
        for shared in self._streams.values():
            shared.close()
        self._streams.clear()

    def read(self, path: Path, size: int, num_frames: int, indices: list[int]) -> list[bytes]:
        """JPEGs of the frames in order. Raises MediaError when one does not decode, or the file is not the one that was segmented."""
        try:
            now = os.stat(path).st_size
        except OSError as error:
            raise MediaUnreadable(f"cannot be read: {error.strerror}") from None
        if now != size:
            raise MediaError(f"has {now} bytes, but had {size} when it was segmented; run `segment` again")
        while True:
            shared = self._share(str(path))
            with shared.lock:
                if not shared.closed:  # else pushed out while this thread waited for its turn
                    return shared.read(num_frames, indices)

    def _share(self, path: str) -> _Shared:
        with self._lock:
            shared = self._streams.setdefault(path, _Shared(path, self._options))
            self._streams.move_to_end(path)
            old = self._streams.popitem(last=False)[1] if len(self._streams) > _OPEN_VIDEOS else None
        if old is not None:
            old.close()
        return shared


@dataclass(frozen=True)
class _Clip:
    path: str
    num_frames: int
    indices: tuple[int, ...]
    options: PictureOptions


def read_clip(task: _Clip) -> list[bytes]:
    """Runs in a worker of the video: JPEGs of the frames. Raises MediaError."""
    stream = _open(task.path)
    try:
        if stream.timeline.num_frames != task.num_frames:
            raise MediaError(f"has {stream.timeline.num_frames} frames, but had {task.num_frames}; run `segment` again")
        found = stream.read(task.indices, stream.to_rgb)
    except MediaUnreadable:
        _open.cache_clear()  # it stands somewhere in the middle
        raise
    missing = [index for index in task.indices if index not in found]
    if missing:  # the prompt says how many pictures there are, and the record which
        raise MediaError(f"{len(missing)} of the {len(task.indices)} frames to show do not decode, the first of them frame {missing[0]}")
    return [_jpeg(Image.fromarray(np.ascontiguousarray(found[index])), task.options) for index in task.indices]


@functools.lru_cache(maxsize=1)
def _open(path: str) -> VideoStream:
    return VideoStream(path, Deadline(None), DEFAULT_LIMITS)  # the parent keeps the time


class _Shared:
    """A video that threads take turns with, open in a process of its own: a decoder that hangs or crashes takes only its clip along."""

    def __init__(self, path: str, options: PictureOptions):
        self.lock = threading.Lock()
        self.closed = False
        self._path, self._options = path, options
        self._assistant = Assistant(read_clip, options.timeout_s)
        self._opened, self._failure = False, None

    def read(self, num_frames: int, indices: list[int]) -> list[bytes]:
        """JPEGs of the frames. Raises MediaError; a video that does not live through opening is not opened once per clip."""
        if self._failure:
            raise MediaError(self._failure)
        if not self._opened:
            answer = self._assistant.ask(_Clip(self._path, num_frames, (), self._options))
            if isinstance(answer, Killed):
                self._failure = answer.reason
                raise MediaError(answer.reason)
            self._opened = True
        answer = self._assistant.ask(_Clip(self._path, num_frames, tuple(indices), self._options))
        if isinstance(answer, Killed):
            raise MediaError(answer.reason)
        return answer

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self._assistant.close()


def _jpeg(picture: Image.Image, options: PictureOptions) -> bytes:
    scale = options.image_size / max(picture.size)
    if scale < 1:
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=options.jpeg_quality)
    return file.getvalue()
