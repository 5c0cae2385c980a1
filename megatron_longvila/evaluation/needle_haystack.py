"""Haystacks of the video needle test: frames by number, from real videos or made up, and the pictures that go between them.

Any rank can read any frame by its number alone, so that each rank reads only the frames it owns.
Shapes: F frames, S side of the square picture.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_longvila.config import VideoConfig, VisionConfig
from megatron_longvila.data.media import MediaError
from megatron_longvila.data.video import decode_frames, probe, select_frames

CACHE_BYTES = 2 << 30  # pictures kept by one rank: 5,000 frames of 384 x 384
MAX_FRAMES = 1 << 22  # of one haystack file: 48 days at one frame a second
SCENE_FRAMES = 16  # frames of a made-up haystack between two cuts

FrameKey = int | Path
"""A haystack frame by its number, or the path of a picture."""


class Haystack(Protocol):
    """Frames by number.

    Attributes:
        num_frames: how many different ones there are; number n shows frame n modulo num_frames. None: they never repeat.
    """

    num_frames: int | None

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """uint8 [F, S, S, 3] of these numbers."""

    def describe(self) -> dict[str, Any]:
        """What decides its frames, as JSON values; equal descriptions mean equal frames."""


@dataclass(frozen=True)
class _File:
    path: Path
    frames: tuple[int, ...]  # the frames of the stream that are taken, in order
    fingerprint: str


class VideoHaystack:
    """Frames of video files (or folders of frames) taken `fps` times a second, file after file.

    Raises:
        ValueError: a file that is missing or no video.
    """

    def __init__(self, paths: Sequence[Path], *, fps: float, vision: VisionConfig, fast_resize: bool = False):
        self._vision, self._fast_resize, self._fps = vision, fast_resize, fps
        if not fps > 0:
            raise ValueError(f"--haystack_fps {fps} must be positive; the paper takes 1 frame a second")
        rule = VideoConfig(frame_rule="fps_head", fps=fps, num_frames=MAX_FRAMES)
        self._files = []
        for path in paths:
            try:
                if not path.exists():
                    raise MediaError("does not exist")
                facts = probe(path, fps=fps)
            except MediaError as error:
                raise ValueError(f"--haystack {path} {error}") from error
            self._files.append(_File(path, tuple(select_frames(facts.num_frames, facts.duration_s, rule)), _fingerprint(path)))
        self._ends = list(accumulate(len(file.frames) for file in self._files))
        self.num_frames: int | None = self._ends[-1]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        size = self._vision.image_size
        pixels_FSS3 = np.empty((len(numbers), size, size, 3), np.uint8)
        places = np.asarray(numbers, dtype=np.int64) % self.num_frames
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners).tolist():
            file, rows = self._files[owner], np.flatnonzero(owners == owner)
            first = self._ends[owner] - len(file.frames)
            try:
                pixels_FSS3[rows], _ = decode_frames(
                    file.path,
                    [file.frames[place - first] for place in places[rows].tolist()],
                    image_size=size,
                    preprocess=self._vision.preprocess,
                    fast_resize=self._fast_resize,
                    siblings=file.frames,  # a bad frame shows the same neighbour whichever rank reads it
                )
            except MediaError as error:
                raise ValueError(f"--haystack {file.path} {error}") from error
        return pixels_FSS3

    def describe(self) -> dict[str, Any]:
        files = [[file.path.name, len(file.frames), file.fingerprint] for file in self._files]
        return {"kind": "video", "fps": self._fps, "fast_resize": self._fast_resize, "frames": self.num_frames, "files": files}


class GeneratedHaystack:
    """Made-up scenes: a bright patch that moves over a two-coloured ground under noise, a new scene every SCENE_FRAMES frames."""

    num_frames = None

    def __init__(self, seed: int, image_size: int):
        self._seed, self._size = seed, image_size

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        frames = [self._frame(number) for number in numbers]
        return np.stack(frames) if frames else np.empty((0, self._size, self._size, 3), np.uint8)

    def _frame(self, number: int) -> np.ndarray:
        """uint8 [S, S, 3]; a pure function of the seed and the number."""
        size, (scene_number, step) = self._size, divmod(number, SCENE_FRAMES)
        scene = np.random.default_rng([self._seed, 0, scene_number])
        top, bottom, patch = scene.integers(20, 200, (3, 3)).astype(np.float32)
        side = max(1, int(size * scene.uniform(0.15, 0.4)))
        start, travel = scene.uniform(0, size - side, 2), scene.uniform(-1.5, 1.5, 2) * size / SCENE_FRAMES
        slope = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
        picture = np.broadcast_to((1 - slope) * top + slope * bottom, (size, size, 3)).copy()
        row, column = ((start + step * travel) % max(1, size - side)).astype(int)
        picture[row : row + side, column : column + side] = patch + 55
        noise = np.random.default_rng([self._seed, 1, number]).integers(-12, 13, (size, size, 1), dtype=np.int8)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        return {"kind": "generated", "seed": self._seed}


class FrameReader:
    """Haystack frames and pictures by key; the latest CACHE_BYTES of them are kept, so that a long video is not decoded for every trial.

    Attributes:
        num_read: frames that had to be decoded or made so far.
    """

    def __init__(self, haystack: Haystack, vision: VisionConfig):
        self._haystack, self._vision = haystack, vision
        self._kept: OrderedDict[FrameKey, np.ndarray] = OrderedDict()
        self._most = max(1, CACHE_BYTES // (3 * vision.image_size**2))
        self.num_read = 0

    def __call__(self, keys: Sequence[FrameKey]) -> np.ndarray:
        """uint8 [F, S, S, 3]; all haystack frames that are not kept come from one reading. Raises ValueError for what cannot be read."""
        total = self._haystack.num_frames
        keys = [key % total if total and isinstance(key, int) else key for key in keys]
        found = {key: self._kept[key] for key in set(keys) if key in self._kept}
        numbers = sorted({key for key in keys if isinstance(key, int) and key not in found})
        found.update(zip(numbers, self._haystack.read(numbers) if numbers else [], strict=True))
        pictures = [key for key in dict.fromkeys(keys) if not isinstance(key, int) and key not in found]
        found.update((path, self._picture(path)) for path in pictures)
        self.num_read += len(numbers) + len(pictures)
        for key in dict.fromkeys(keys):
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        size = self._vision.image_size
        return np.stack([found[key] for key in keys]) if keys else np.empty((0, size, size, 3), np.uint8)

    def _picture(self, path: Path) -> np.ndarray:
        try:
            return decode_frames(path, [0], image_size=self._vision.image_size, preprocess=self._vision.preprocess)[0][0]
        except (MediaError, OSError) as error:
            raise ValueError(f"needle picture {path} {error}") from error


def _fingerprint(path: Path) -> str:
    """Changes when a file does: sizes, and the first and last mebibyte of each file."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file_ends(file))
    return digest.hexdigest()[:16]


def file_ends(path: Path, num_bytes: int = 1 << 20) -> bytes:
    """The first and the last `num_bytes` of a file: enough to tell versions of a large file apart."""
    with open(path, "rb") as file:
        head = file.read(num_bytes)
        file.seek(max(0, path.stat().st_size - num_bytes))
        return head + file.read(num_bytes)
