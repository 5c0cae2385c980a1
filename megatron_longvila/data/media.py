"""Where media bytes come from and what may be opened: sources, limits, and the format a file really has.

A media file is never opened by name inside FFmpeg. Its first bytes choose one demuxer from a short list, and that demuxer reads
through a Python file object, so playlists (concat, HLS, DASH), image sequences, devices and URLs cannot be reached from data.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SNIFF_BYTES = 1024


class MediaError(ValueError):
    """A media file that cannot be used; the message is the reason that reports and metrics show."""


class MediaUnreadable(MediaError):
    """The operating system does not hand out the bytes: gone, no permission, a failing disk. Another try may go better."""


class DecodeTimeout(MediaError):
    """Reading one media file took longer than its wall-clock limit."""


def describe_failure(error: Exception) -> dict:
    """What a worker answers for a file that it could not read: {"error": reason, "final": whether a second try would say the same}.

    Any exception: one strange file must not end a run of days, and whoever lists the reasons shows this one by its name.
    """
    if isinstance(error, MediaError):
        return {"error": str(error), "final": not isinstance(error, (DecodeTimeout, MediaUnreadable))}
    return {"error": f"cannot be read ({type(error).__name__}: {error})", "final": False}


@dataclass(frozen=True)
class MediaLimits:
    """What is refused before memory is spent on it.

    Attributes:
        max_pixels: width x height of one frame or image; the default lets 8K video (7680 x 4320) and 64-megapixel photos in.
        max_frames: frames of one video; the default is 10 hours at 60 frames per second.
        max_streams: streams of one container, sound and subtitles included.
        max_bytes: size of one file.
    """

    max_pixels: int = 1 << 26
    max_frames: int = 2_160_000
    max_streams: int = 64
    max_bytes: int = 1 << 35


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True)
class ByteRange:
    """`size` bytes at `offset` of a file: a member of a tar shard, read in place without unpacking or loading the whole of it."""

    path: str
    offset: int
    size: int


Source = bytes | str | Path | ByteRange | Sequence["bytes | str | Path | ByteRange"]
"""One video or image (bytes, a path, a range of a file), or a list of images that are a video's frames; a path may be a frame folder."""


class Deadline:
    """A wall-clock limit that the reading loops look at between packets and frames.

    One native call (a packet, a frame, opening a container) is not interrupted; where that matters, as in preprocessing, the work
    runs in a process that can be killed.
    """

    def __init__(self, timeout_s: float | None):
        self.timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def check(self, doing: str) -> None:
        """Raises DecodeTimeout once the time is up; `doing` says what was going on."""
        if self._end is not None and time.monotonic() > self._end:
            raise DecodeTimeout(f"{doing} took longer than timeout_s={self.timeout_s:g}")


class _RangeFile(io.RawIOBase):
    """A read-only file object over a ByteRange; pread keeps threads that share nothing but the path independent."""

    def __init__(self, source: ByteRange):
        super().__init__()
        self._fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._start, self._size, self._position = source.offset, source.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._fd, wanted, self._start + self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_source(source: bytes | str | Path | ByteRange, limits: MediaLimits = DEFAULT_LIMITS) -> BinaryIO:
    """A seekable binary file object over one file's bytes. Raises MediaError when it is missing, empty, too large or no plain file."""
    if isinstance(source, bytes | bytearray | memoryview):
        size = len(source)
    elif isinstance(source, ByteRange):
        size = source.size
    else:
        try:
            info = os.stat(source)
        except OSError as error:
            raise MediaUnreadable(f"cannot be read: {error.strerror or error}") from None
        if not stat.S_ISREG(info.st_mode):
            raise MediaError("is not a plain file")
        size = info.st_size
    if size == 0:
        raise MediaError("is empty (0 bytes)")
    if size > limits.max_bytes:
        raise MediaError(f"has {size} bytes, more than max_bytes={limits.max_bytes}")
    try:
        if isinstance(source, ByteRange):
            return _RangeFile(source)
        return io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else open(source, "rb")
    except OSError as error:
        raise MediaUnreadable(f"cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class Format:
    """A file format that may be opened: how we name it, the FFmpeg demuxer or Pillow plugin that reads it."""

    extension: str
    reader: str
    is_image: bool


_MP4 = Format("mp4", "mov", False)
_FORMATS = (  # (bytes, offset, format), first match wins
    (b"\x1a\x45\xdf\xa3", 0, Format("mkv", "matroska", False)),
    (b"FLV\x01", 0, Format("flv", "flv", False)),
    (b"\x00\x00\x01\xba", 0, Format("mpg", "mpeg", False)),
    (b"\xff\xd8\xff", 0, Format("jpg", "JPEG", True)),
    (b"\x89PNG\r\n\x1a\n", 0, Format("png", "PNG", True)),
    (b"GIF87a", 0, Format("gif", "GIF", True)),
    (b"GIF89a", 0, Format("gif", "GIF", True)),
    (b"moov", 4, _MP4), (b"mdat", 4, _MP4), (b"free", 4, _MP4), (b"skip", 4, _MP4), (b"wide", 4, _MP4),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")


def sniff(head: bytes) -> Format:
    """The format of a file by its first SNIFF_BYTES bytes; its name is never asked. Raises MediaError for anything not on the list."""
    for magic, offset, found in _FORMATS:
        if head[offset : offset + len(magic)] == magic:
            return found
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF_BRANDS:
            raise MediaError("is a HEIF or AVIF picture; convert it to JPEG or PNG")
        return _MP4
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return Format("avi", "avi", False)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Format("webp", "WEBP", True)
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return Format("bmp", "BMP", True)
    for start, stride in ((0, 188), (4, 192)):  # transport stream, plain and with time codes (m2ts)
        sync = head[start::stride][:4]
        if len(sync) == 4 and set(sync) == {0x47}:
            return Format("ts", "mpegts", False)
    known = "mp4/mov, mkv/webm, avi, mpeg-ts, mpeg-ps, flv, jpg, png, webp, bmp, gif"
    raise MediaError(f"is not a known video or image format ({_describe(head)}); known are {known}")


def _describe(head: bytes) -> str:
    text = head[:512].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return "it is an HTML page, perhaps a failed download"
    if text.startswith(b"ffconcat") or text.startswith(b"#extm3u"):
        return "it is a playlist, which may point anywhere"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    return f"it starts with {head[:8]!r}"


def missing_bytes(file: BinaryIO, found: Format) -> int:
    """How many bytes a container announces beyond its end, 0 for a whole file: a broken download or copy. Streaming formats (mpeg-ts,
    mpeg-ps, flv, growing mkv) announce nothing, so a cut one is just shorter. Leaves the file position anywhere."""
    end = file.seek(0, io.SEEK_END)
    announced = 0
    if found.extension == "mp4":  # ISO 14496-12, 4.2: boxes of 32-bit size and type, size 1 means a 64-bit size follows, 0 up to the end
        while announced + 8 <= end:
            file.seek(announced)
            size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            size = large if size == 1 else size
            if size < 8 or not name.isalnum():
                break
            announced += size
    elif found.extension == "mkv":  # RFC 8794: EBML header, then the segment; both are an id and a size of variable length
        file.seek(4)
        header = _ebml_size(file)
        file.seek(header or 0, io.SEEK_CUR)
        if header is not None and file.read(4) == b"\x18\x53\x80\x67":
            size = _ebml_size(file)
            announced = 0 if size is None else file.tell() + size
    elif found.extension == "avi":
        file.seek(4)
        announced = 8 + struct.unpack("<I", file.read(4).ljust(4, b"\0"))[0]
    return max(0, announced - end)


def _ebml_size(file: BinaryIO) -> int | None:
    """A size of 1 to 8 bytes whose first set bit tells the length; None where it is unknown (all ones) or damaged."""
    first = file.read(1)
    length = 9 - first[0].bit_length() if first and first[0] else 9
    data = first + file.read(length - 1)
    value = int.from_bytes(data, "big") & ((1 << 7 * length) - 1)
    return None if length > 8 or len(data) < length or value == (1 << 7 * length) - 1 else value


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key that puts frame_2 before frame_10. No two names share one, or their order would be that of the disk (frame_2, frame_02)."""
    return [(0, int(part)) if part.isascii() and part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", name)], name


def frame_files(folder: str | Path) -> list[Path]:
    """Image files of a frame folder in natural order, hidden files and sub-folders left out. Raises MediaError when there is none."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".") and not entry.is_dir()]
    except OSError as error:
        raise MediaUnreadable(f"cannot be read: {error.strerror or error}") from None
    if not entries:
        raise MediaError("is a folder without frames")
    return [Path(entry.path) for entry in sorted(entries, key=lambda entry: natural_key(entry.name))]


def resolve_below(root: Path, path: str) -> Path:
    """The real file that `path` means below `root` (an absolute path must lie below it too).

    Raises:
        MediaError: `..` or a symbolic link leads out of the root, the file is missing, or the name cannot be one. Reports that are passed
            on hold its text, so that it names no place above the root.
    """
    real_root = root.resolve()
    try:
        real = (real_root / path).resolve()
        exists = real.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL byte, a loop of links
        reason = getattr(error, "strerror", None) or ("is a loop of links" if isinstance(error, RuntimeError) else str(error))
        raise MediaError(f"{path!r} cannot be opened: {reason}") from None
    if not real.is_relative_to(real_root):
        raise MediaError(f"{path!r} leads out of the media root; keep media below it, or give a wider --media_root")
    if not exists:
        raise MediaUnreadable(f"{path!r} is not in the media root")
    return real
