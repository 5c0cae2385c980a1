"""A dataset folder on disk: `open_dataset` reads the index that tools/preprocess_video.py wrote, `Dataset.read` finds a medium's bytes.

DIR/dataset.json   {"version", "store", "media_root", "num_samples", "num_media", "hash"}; written last: without it the folder is unfinished
DIR/samples.jsonl  {"id", "conversations": [{"from": "human"|"gpt"|"system", "value"}], "media": [sha256 of each mark in order]}
DIR/media.jsonl    {"sha256", facts (MediaFacts), and where the bytes are}
DIR/shards/        webdataset tars: <sha256>.<extension> + <sha256>.json; frames of a folder are <sha256>.000000.jpg, ...

Marks are `<video>` and `<image>` in human turns, in order; the same words in any other turn are plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_longvila.data.media import ByteRange, Source, frame_files
from megatron_longvila.data.video import MediaFacts

VERSION = 1
MARK_PATTERN = re.compile(r"<video>|<image>")
_REBUILD = "run tools/preprocess_video.py again (it only redoes what is missing)"


@dataclass(frozen=True)
class Turn:
    """One message; `role` is `human`, `gpt` or `system`."""

    role: str
    value: str


@dataclass(frozen=True)
class Sample:
    """One dialogue. `media` holds the sha256 of the medium of each mark, in the order of the marks."""

    id: str
    conversations: tuple[Turn, ...]
    media: tuple[str, ...]


@dataclass(frozen=True)
class Media:
    """One stored medium: its facts, and where its bytes are (`members`: (shard, offset, size) in a tar; else `path` below the media root)."""

    sha256: str
    facts: MediaFacts
    members: tuple[tuple[str, int, int], ...] = ()
    path: str = ""
    size: int = 0

    @property
    def num_frames(self) -> int:
        return self.facts.num_frames

    @property
    def duration_s(self) -> float:
        return self.facts.duration_s
