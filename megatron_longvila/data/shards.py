"""A dataset folder on disk: `open_dataset` reads the index that tools/preprocess_video.py wrote, `Dataset.read` finds a medium's bytes.

DIR/dataset.json   {"version", "store", "media_root", "limits", "num_samples", "num_media", "hash"}; written last: without it the folder is
                   unfinished
DIR/samples.jsonl  {"id", "conversations": [{"from": "human"|"gpt"|"system", "value"}], "media": [sha256 of each mark in order]}
DIR/media.jsonl    the fields of Media, one medium a line, each stored once whatever the number of samples that show it
DIR/timelines.bin  packed packet lists of the videos, one after the other (timeline.py): frames are found without demuxing the whole file
DIR/shards/        webdataset tars: <sha256>.<extension> + <sha256>.json; frames of a folder are <sha256>.000000.jpg, ...

Marks are `<video>` and `<image>` in human turns, in order; the same words in any other turn are plain text.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megatron_longvila.data.media import DEFAULT_LIMITS, ByteRange, MediaError, MediaLimits, Source, frame_files, resolve_below
from megatron_longvila.data.text_rows import TextDataset, open_text_rows

VERSION = 1
_REBUILD = "run tools/preprocess_video.py again with the same --output (it only redoes what is missing)"


@dataclass(frozen=True)
class Sample:
    """One dialogue. `conversations` are {"from": "human" | "gpt" | "system", "value": text}; `media` the sha256 of each mark, in order."""

    id: str
    conversations: tuple[dict, ...]
    media: tuple[str, ...]


@dataclass(frozen=True)
class Media:
    """One stored medium.

    Attributes:
        kind: `video`, `image` (one frame) or `frames` (a folder of pictures shown at `fps`).
        duration_s: 0 for an image.
        width: upright, after `rotation` (clockwise degrees that bring the stored picture upright); so is height.
        shard: tar below DIR/shards that holds it; empty when the medium is only referred to by `path`.
        offset: first byte in the shard, and `size` bytes (of the file itself when referred to).
        members: (offset, size) of each picture of `frames` in the shard.
        path: below the media root.
        timeline: (offset, size) in DIR/timelines.bin; empty where there is none.
    """

    sha256: str
    kind: str
    num_frames: int
    duration_s: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    shard: str = ""
    offset: int = 0
    size: int = 0
    members: tuple[tuple[int, int], ...] = ()
    path: str = ""
    timeline: tuple[int, int] | tuple[()] = ()


_PLACE = ("shard", "offset", "size", "members", "path", "timeline")
_FACTS = tuple(field.name for field in fields(Media) if field.name not in _PLACE)


def media_line(media: Media) -> str:
    """One line of media.jsonl; where a medium is leaves out the fields that do not apply."""
    record = asdict(media)
    return canonical_json({name: value for name, value in record.items() if name in _FACTS or value not in ("", ()) or name == "size"})


def canonical_json(value: object) -> str:
    """One spelling for one value: no spaces, keys in the order given, text as UTF-8 (lone surrogates escaped)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"))
    return text


def dataset_hash(samples: bytes | mmap.mmap, media: Iterable[Media]) -> str:
    """sha256 over what the samples say and show, in index order. Where the bytes lie does not enter: storing again keeps the hash."""
    digest = hashlib.sha256(f"longvila dataset {VERSION}\n".encode())
    digest.update(samples)
    for one in media:
        digest.update(canonical_json([getattr(one, name) for name in _FACTS]).encode() + b"\n")
    return digest.hexdigest()


class Samples(Sequence):
    """Samples parsed when asked for: the file is mapped, so all ranks of a host share its pages. Safe to fork, pickle and thread."""

    def __init__(self, path: Path):
        self._path = path
        self._map: mmap.mmap | bytes | None = None
        ends = np.flatnonzero(np.frombuffer(self.raw, np.uint8) == ord("\n"))
        if len(self.raw) and (not len(ends) or ends[-1] != len(self.raw) - 1):
            raise ValueError(f"{path}:{len(ends) + 1}: the last line is cut; {_REBUILD}")
        self._bounds = np.concatenate([[-1], ends]).astype(np.int64) + 1

    @property
    def raw(self) -> mmap.mmap | bytes:
        if self._map is None:
            with open(self._path, "rb") as file:
                size = self._path.stat().st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""  # an empty file cannot be mapped
        return self._map

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative and out-of-range indices as a list does
        return _parse_sample(self.raw[self._bounds[number] : self._bounds[number + 1]], self._path, number + 1)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}


class Dataset:
    """An opened dataset folder.

    Attributes:
        samples: in the order of the input file.
        media: by sha256.
        hash: see dataset_hash; part of what a resumed run compares.
        store: `tar` or `reference`.
        limits: what the media were accepted under; reading them under smaller ones would refuse them again.
    """

    def __init__(self, path: Path, samples: Samples, media: dict[str, Media], header: dict):
        self.path, self.samples, self.media = path, samples, media
        self.hash, self.store = header["hash"], header["store"]
        self.limits = MediaLimits(**header["limits"]) if "limits" in header else DEFAULT_LIMITS
        self._media_root = Path(header["media_root"])

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, media: Media | str) -> Source:
        """What `decode_frames` takes: a range of a shard, a path, or a list of them for `frames`. Opens nothing; safe in any process.

        Raises:
            MediaError: the shard or file is missing or is not as it was preprocessed.
        """
        media = self.media[media] if isinstance(media, str) else media
        if media.shard:
            return self._read_shard(media)
        try:
            try:
                path = resolve_below(self._media_root, media.path)
            except MediaError as error:  # the folder may have moved since: say which one is meant
                raise type(error)(f"{error} (the root is {self._media_root})") from None
            if media.kind == "frames":
                files = frame_files(path)
                if len(files) != media.num_frames:
                    raise MediaError(f"{media.path!r} holds {len(files)} frames, {media.num_frames} when it was preprocessed; {_REBUILD}")
                for file in files:
                    if file.is_symlink():
                        resolve_below(self._media_root, str(file))
                return files
            size = path.stat().st_size
        except OSError as error:
            raise MediaError(f"{media.path!r} cannot be read: {error.strerror}") from None
        if size != media.size:
            raise MediaError(f"{media.path!r} has {size} bytes, {media.size} when it was preprocessed; {_REBUILD}")
        return path

    def timeline(self, media: Media) -> bytes:
        """What `decode_frames` takes as `timeline`; empty where none is stored. Raises MediaError when the file that holds it is cut."""
        if not media.timeline:
            return b""
        path, (offset, size) = self.path / "timelines.bin", media.timeline
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise MediaError(f"{path} cannot be read: {error.strerror}; {_REBUILD}") from None
        if len(data) < size:
            raise MediaError(f"{path} is cut: {offset + len(data)} bytes, {offset + size} needed; delete it and {_REBUILD}")
        return data

    def _read_shard(self, media: Media) -> Source:
        shard = self.path / "shards" / media.shard
        end = max((offset + size for offset, size in media.members), default=media.offset + media.size)
        try:
            size = shard.stat().st_size
        except OSError as error:
            raise MediaError(f"{shard} cannot be read: {error.strerror}; {_REBUILD}") from None
        if size < end:
            raise MediaError(f"{shard} is cut: {size} bytes, {end} needed; delete it and {_REBUILD}")
        if media.members:
            return [ByteRange(str(shard), offset, length) for offset, length in media.members]
        return ByteRange(str(shard), media.offset, media.size)


def open_dataset(path: str | Path) -> Dataset | TextDataset:
    """Open a folder written by tools/preprocess_video.py or tools/preprocess_text.py.

    Raises:
        ValueError: no such folder, unfinished, of another version, or changed since; names the file, the line and the way out.
    """
    path = Path(path)
    header_path = path / "dataset.json"
    if not header_path.is_file():
        state = "is not a folder" if not path.is_dir() else "has no dataset.json: it is no dataset, or its preprocessing has not finished"
        raise ValueError(
            f"{path} {state}; make it with tools/preprocess_video.py --input ROWS --media_root MEDIA --output {path} "
            "(or tools/preprocess_text.py for plain text)"
        )
    try:
        header = json.loads(header_path.read_bytes())
        kind, version, expected = header.get("kind"), header["version"], header["hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{header_path} is damaged ({error}); {_REBUILD}") from None
    if kind == "text":
        return open_text_rows(path, header)
    if version != VERSION:
        raise ValueError(f"{header_path} has version {version}, this code reads version {VERSION}; preprocess again into a new folder")
    for name in ("samples.jsonl", "media.jsonl"):
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; {_REBUILD}")
    media_path = path / "media.jsonl"
    media = {}
    with open(media_path, "rb") as file:
        for number, line in enumerate(file, 1):
            one = _parse_media(line, media_path, number)
            media[one.sha256] = one
    samples = Samples(path / "samples.jsonl")
    if dataset_hash(samples.raw, media.values()) != expected:
        _find_fault(samples, media, path / "samples.jsonl")
        raise ValueError(f"{path}: samples.jsonl or media.jsonl was changed after preprocessing; restore them, or {_REBUILD}")
    return Dataset(path, samples, media, header)


def _find_fault(samples: Samples, media: dict[str, Media], path: Path) -> None:
    for number, sample in enumerate(samples, 1):
        missing = [sha256 for sha256 in sample.media if sha256 not in media]
        if missing:
            raise ValueError(f"{path}:{number}: sample {sample.id!r} shows {missing[0]}, which media.jsonl does not hold; {_REBUILD}")


def _parse_sample(line: bytes, path: Path, number: int) -> Sample:
    try:
        record = json.loads(line)
        return Sample(record["id"], tuple(record["conversations"]), tuple(record["media"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number}: not a sample ({type(error).__name__}: {error}); {_REBUILD}") from None


def _parse_media(line: bytes, path: Path, number: int) -> Media:
    try:
        record = json.loads(line)
        if "members" in record:
            record["members"] = tuple((offset, size) for offset, size in record["members"])
        if "timeline" in record:
            offset, size = record["timeline"]
            record["timeline"] = (offset, size)
        return Media(**record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number}: not a medium ({type(error).__name__}: {error}); {_REBUILD}") from None
