"""Media made on the fly by PyAV's own encoders. Every frame shows its number as a 4 x 4 grid of black and white cells, so that a test can
read from decoded pixels which frame it got, whatever the size, codec and rotation."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

# options that keep an encoder quick and give many small groups of pictures with B-frames that others refer to
ENCODERS = {
    "libx264": {"preset": "veryfast", "x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-pyramid=normal:threads=1:open-gop=0"},
    "libx265": {"preset": "ultrafast", "x265-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:log-level=none:pools=1:open-gop=0"},
    "libsvtav1": {"preset": "8", "g": "12", "svtav1-params": "lp=1"},  # quicker presets smear such small pictures
    "mpeg4": {"bf": "2", "g": "12"},
    "mpeg2video": {"bf": "2", "g": "12"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "g": "12"},
}
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # clockwise degrees -> display matrix a, b, c, d


def paint(number: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """uint8 [height, width, 3]: 12 bits of number and 4 of check sum, row by row, white is 1."""
    code = number | _check(number) << 12
    cells = np.array([code >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4) * 255
    width, height = size
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat(cells[rows][:, columns][..., None], 3, axis=2)


def read_number(picture_HW3: np.ndarray) -> int | None:
    """The painted number, or None where the picture shows none (the check sum is wrong)."""
    height, width = picture_HW3.shape[:2]
    grey = picture_HW3.astype(float).mean(axis=2)
    centres = [(int((row + 0.5) * height / 4), int((column + 0.5) * width / 4)) for row in range(4) for column in range(4)]
    code = sum((grey[y - 2 : y + 2, x - 2 : x + 2].mean() > 127) << bit for bit, (y, x) in enumerate(centres))
    number = code & 0xFFF
    return number if code >> 12 == _check(number) else None


def _check(number: int) -> int:
    return (number * 7 + (number >> 4) * 3 + 5) & 15


@contextlib.contextmanager
def same_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 does when root runs it: it gives the calling thread real-time priority 99 (SCHED_FIFO). Ranks forked later would
    inherit that, and a few of them that poll would keep every other process of the machine from running."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


def video_bytes(
    numbers: Sequence[int] = range(40),
    *,
    encoder: str = "libx264",
    container: str = "mp4",
    size: tuple[int, int] = (64, 64),
    stamps_ms: Sequence[int] | None = None,
    sound: bool = False,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
) -> bytes:
    """A video whose frames show `numbers`, at `stamps_ms` (default: every 100 ms from 0).

    `size` is width x height as seen; `rotation` (mp4 only) stores the pictures turned, with the clockwise degrees that undo it.
    """
    stamps_ms = [100 * index for index in range(len(numbers))] if stamps_ms is None else stamps_ms
    regular = len(set(np.diff(stamps_ms).tolist())) <= 1 and stamps_ms[0] == 0
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "video"  # a real file: the faststart muxer opens it again to move its index to the front
    with folder, same_scheduling(), av.open(str(path), "w", format=container, options=muxer_options or {}) as output:
        video = output.add_stream(encoder, rate=10, options=ENCODERS[encoder] | (options or {}))
        video.width, video.height = size if rotation in (0, 180) else size[::-1]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        if not regular:
            video.codec_context.time_base = Fraction(1, 1000)
        audio = output.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, stamp_ms in zip(numbers, stamps_ms, strict=True):
            stored = np.ascontiguousarray(np.rot90(paint(number, size), rotation // 90))  # rot90 turns counter-clockwise
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            frame.pts = stamp_ms // 100 if regular else stamp_ms
            frame.time_base = Fraction(1, 10) if regular else Fraction(1, 1000)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if audio is not None:
            for start in range(0, 800 * len(numbers), 1024):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                tone.sample_rate, tone.pts, tone.time_base = 8000, start, Fraction(1, 8000)
                output.mux(audio.encode(tone))
            output.mux(audio.encode(None))
        output.close()
        data = path.read_bytes()
    return set_matrix(data, MATRICES[rotation]) if rotation else data


def audio_bytes() -> bytes:
    """An mp4 with sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        audio = output.add_stream("aac", rate=8000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = 8000, 0, Fraction(1, 8000)
        output.mux(audio.encode(tone))
        output.mux(audio.encode(None))
    return file.getvalue()


def set_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Write the display matrix into the track header of an mp4, as phones do (ISO 14496-12, 8.3.2)."""
    a, b, c, d = (value << 16 for value in matrix)
    start = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, id, duration, layer, volume come first
    return data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :]


def image_bytes(number: int, kind: str = "PNG", *, size: tuple[int, int] = (64, 64), orientation: int | None = None) -> bytes:
    """A picture that shows `number` once it is upright; `orientation` is the EXIF value it is stored with."""
    image = Image.fromarray(paint(number, size))
    exif = Image.Exif()
    if orientation is not None:
        stored = {
            6: Image.Transpose.ROTATE_90,
            8: Image.Transpose.ROTATE_270,
            3: Image.Transpose.ROTATE_180,
            2: Image.Transpose.FLIP_LEFT_RIGHT,
        }
        image = image.transpose(stored[orientation])
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif.tobytes() if orientation is not None else b"", quality=95)
    return file.getvalue()


def write_frames(folder: Path, numbers: Sequence[int]) -> Path:
    """A folder of frames named so that natural order and plain text order differ (frame_2 before frame_10)."""
    folder.mkdir(parents=True)
    for index, number in enumerate(numbers):
        (folder / f"frame_{index}.png").write_bytes(image_bytes(number))
    return folder
