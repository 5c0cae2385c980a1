"""The packet list of a video stream: which packet holds which frame, and where decoding must start for it. Small enough to be stored.

Positions count packets in decode order; indices count frames in presentation order.
Shapes: P packets, K keyframes, F frames.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_longvila.data.media import MediaError

_HEADER = struct.Struct("<4sIId")  # magic and version, P, K, duration in seconds
_MAGIC = b"LVT1"
_NO_DTS = np.int64(-(2**63))


@dataclass(frozen=True, eq=False)
class Timeline:
    """The frames of a stream in presentation order.

    Attributes:
        pts_F: int64 time stamp of each frame in the stream's time base; where frames are counted, its tick.
        position_F: int64 packet position of each frame.
        key_position_F: int64 position of the keyframe from which the frame decodes exactly. A leading picture (shown before the
            keyframe that precedes it in the file, open groups of pictures) belongs to the keyframe before that one.
        duration_s: from the first stamp to the end of the last frame.
        pts_P: int64 stamp of every packet; empty when stamps are missing or repeat: frames are then counted while decoding.
        key_stamps: (pts, dts or None) by position of every keyframe, ascending.
    """

    pts_F: np.ndarray
    position_F: np.ndarray
    key_position_F: np.ndarray
    duration_s: float
    pts_P: np.ndarray
    key_stamps: dict[int, tuple[int, int | None]]

    @property
    def num_frames(self) -> int:
        return len(self.pts_F)

    @cached_property
    def packets(self) -> dict[int, int]:
        """Position by pts of every packet."""
        return {pts: position for position, pts in enumerate(self.pts_P.tolist())}


def counted(tick_F: np.ndarray, duration_s: float) -> Timeline:
    """Of a stream without usable stamps: frame after frame, each at its tick; where a frame was dropped, one is passed over."""
    none = np.full(len(tick_F), -1, np.int64)
    return Timeline(tick_F, none, none, duration_s, np.empty(0, np.int64), {})


def starts_again(pts_P: np.ndarray, is_shown_P: np.ndarray, key_stamps: dict[int, tuple[int, int | None]]) -> bool:
    """Whether the stamps begin anew within the stream, as where recordings were put one after the other: of one recording, all that comes
    before a keyframe is shown before it. Hidden packets do not count: where a second edit begins between keyframes, the one before it is
    hidden and has a stamp from before the first edit's end."""
    latest_P = np.maximum.accumulate(np.where(is_shown_P, pts_P, np.iinfo(np.int64).min))
    keys_K = np.array([position for position in key_stamps if position and is_shown_P[position]], np.int64)
    return bool((latest_P[keys_K - 1] >= pts_P[keys_K]).any())


def from_packets(pts_P: np.ndarray, is_shown_P: np.ndarray, key_stamps: dict[int, tuple[int, int | None]], duration_s: float) -> Timeline:
    """Find each frame's keyframe. Without one before it, a frame of a cut stream cannot be decoded and is left out, as hidden ones are.

    Args:
        is_shown_P: False for packets that only serve as references (edit lists hide them).
        key_stamps: not empty, ascending.
        duration_s: see Timeline.
    """
    keys_K = np.fromiter(key_stamps, np.int64, len(key_stamps))
    group_P = np.searchsorted(keys_K, np.arange(len(pts_P)), side="right") - 1
    group_P = group_P - ((group_P < 0) | (pts_P < pts_P[keys_K[group_P]]))
    position_F = np.flatnonzero((group_P >= 0) & is_shown_P)
    position_F = position_F[np.argsort(pts_P[position_F])]
    return Timeline(pts_P[position_F], position_F, keys_K[group_P[position_F]], duration_s, pts_P, key_stamps)


def pack(timeline: Timeline) -> bytes:
    """The timeline in about a byte per 16 frames at an even rate; nothing for one whose frames are counted: only decoding finds those."""
    if not len(timeline.pts_P):
        return b""
    keys_K = np.fromiter(timeline.key_stamps, np.int64, len(timeline.key_stamps))
    dts_K = np.array([_NO_DTS if dts is None else dts for _, dts in timeline.key_stamps.values()], np.int64)
    hidden_P = np.ones(len(timeline.pts_P), np.uint8)
    hidden_P[timeline.position_F] = 0
    steps = [np.diff(one, prepend=0).astype("<i8").tobytes() for one in (timeline.pts_P, keys_K)]
    body = b"".join([*steps, dts_K.astype("<i8").tobytes(), np.packbits(hidden_P).tobytes()])
    return _HEADER.pack(_MAGIC, len(timeline.pts_P), len(keys_K), timeline.duration_s) + zlib.compress(body, 9)


def unpack(data: bytes) -> Timeline:
    """What `pack` was given. Raises MediaError for anything else."""
    try:
        magic, num_packets, num_keys, duration_s = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"it starts with {magic!r}")
        sizes = [8 * num_packets, 8 * num_keys, 8 * num_keys, (num_packets + 7) // 8]
        reader = zlib.decompressobj()
        body = reader.decompress(data[_HEADER.size :], sum(sizes) + 1)
        if len(body) != sum(sizes) or not reader.eof:  # at its end the check sum has been compared
            raise ValueError(f"it does not hold {sum(sizes)} bytes")
    except (struct.error, zlib.error, ValueError) as error:
        raise MediaError(f"has a stored timeline that is damaged ({error}); preprocess it again") from None
    bounds = np.cumsum([0, *sizes]).tolist()
    pts, keys, dts, hidden = (body[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False))
    pts_P, keys_K = np.cumsum(np.frombuffer(pts, "<i8")), np.cumsum(np.frombuffer(keys, "<i8"))
    if not num_keys or keys_K[0] < 0 or keys_K[-1] >= num_packets or (np.diff(keys_K) <= 0).any():
        raise MediaError("has a stored timeline that is damaged (its keyframes are none of its packets); preprocess it again")
    dts_K = [None if stamp == _NO_DTS else stamp for stamp in np.frombuffer(dts, "<i8").tolist()]
    key_stamps = {position: (int(pts_P[position]), stamp) for position, stamp in zip(keys_K.tolist(), dts_K, strict=True)}
    is_shown_P = np.unpackbits(np.frombuffer(hidden, np.uint8), count=num_packets) == 0
    if starts_again(pts_P, is_shown_P, key_stamps):  # earlier versions stored such
        raise MediaError("has a stored timeline that mixes recordings put one after the other; preprocess it again")
    return from_packets(pts_P, is_shown_P, key_stamps, duration_s)
