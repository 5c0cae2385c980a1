"""Tensors on disk, one at a time: what a folder of weights holds, each tensor mapped into memory, and sharded safetensors written in order.

Names, shapes and dtypes are known from the headers alone, so everything is checked before a byte is copied. A tensor that is read is a view
of the mapped file: its pages can be dropped by the system at any time and are not the process's own memory.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_PIECE = 1 << 20
_SYNCED = 1 << 28  # bytes written between two times that the disk is waited for
_RESIDENT = 1 << 30  # bytes of a mapped file that may stay mapped
_HEADER_LIMIT = 100 << 20  # safetensors' own
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".distcp")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file, mapped."""

    def __init__(self, path: Path):
        """Raises ValueError for a file that is cut short or is no safetensors file."""
        self.path, self._resident = path, 0
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"{path} is cut short or no safetensors file: {size} bytes cannot hold its header; download it again")
            try:
                header = json.loads(stream.read(length))
                self._begin = 8 + length
                header.pop("__metadata__", None)
                ends = {name: entry["data_offsets"] for name, entry in header.items()}
                self._offsets = {name: (int(first), int(last)) for name, (first, last) in ends.items()}
                self.infos = {name: TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} has a header that cannot be read ({error!r}); download it again") from None
        end = self._begin + max((stop for _, stop in self._offsets.values()), default=0)
        if size != end:
            raise ValueError(f"{path} is cut short or damaged: it has {size} bytes, its header asks for {end}; download it again")
        for name, info in self.infos.items():
            first, last = self._offsets[name]
            if last - first != info.num_bytes or first < 0:
                raise ValueError(f"{path} is damaged: {name} of {info.num_bytes} bytes lies in {last - first}; download it again")

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file. It must not be written to."""
        info, (first, last) = self.infos[name], self._offsets[name]
        if first == last:
            return torch.empty(info.shape, dtype=info.dtype)
        begin, page = self._begin + first, (self._begin + first) % mmap.PAGESIZE
        self._resident += last - first
        if self._resident > _RESIDENT:
            # Pages come back from the file if they are looked at again. Left alone, the system has to find them when memory is short.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._resident = last - first
        # Fetched at once instead of by page faults, each of which waits for the disk.
        self._map.madvise(mmap.MADV_WILLNEED, begin - page, last - first + page)
        return torch.frombuffer(self._map, dtype=info.dtype, count=math.prod(info.shape), offset=begin).view(info.shape)

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as stream:
            # Copy on write because torch wants a writable buffer; nothing writes, so no page is ever copied.
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


class PickledFile:
    """One file of torch.save, read with weights_only: unpickling can build tensors and plain containers and nothing else."""

    def __init__(self, path: Path):
        """Raises ValueError for a file that is cut short, or holds something else than named tensors."""
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as error:  # torch raises many kinds for damaged files, and pickle.UnpicklingError for what weights_only refuses
            raise ValueError(f"{path} cannot be loaded as weights alone: {str(error).splitlines()[0]}") from None
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds something else than a mapping of names to tensors; save the state dict alone")
        self._tensors = dict(content)
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file (or of memory, for files of before torch 1.6)."""
        return self._tensors[name]


class TensorFolder:
    """All tensors of a folder of weights, one file or many with an index."""

    def __init__(self, folder: Path, *, allow_pickle: bool = False):
        """Raises ValueError for no, incomplete, damaged or contradicting files, and for pickled ones unless they are allowed."""
        self.folder = folder
        files, index = _weight_files(folder)
        if any(path.suffix != ".safetensors" for path in files) and not allow_pickle:
            raise ValueError(
                f"{folder} has its weights in {files[0].name}, a pickle: loading one can run code that it contains; give --allow-pickle if "
                "you trust it (it is loaded with weights_only), or convert it to safetensors"
            )
        self._files: dict[str, SafetensorsFile | PickledFile] = {}
        for path in files:
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
            for name in file.infos:
                if name in self._files:
                    raise ValueError(f"{name} is in {self._files[name].path} and in {path}; remove one")
                self._files[name] = file
        self._compare_with(index)
        self.infos = {name: file.infos[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped where the file allows it."""
        return self._files[name].read(name)

    def _compare_with(self, index: Mapping[str, str] | None) -> None:
        if index is None:
            return
        absent = sorted(name for name, file in index.items() if name not in self._files or self._files[name].path.name != file)
        unlisted = sorted(self._files.keys() - index.keys())
        if absent or unlisted:
            raise ValueError(
                f"the index of {self.folder} and its files differ: {len(absent)} tensors are not where it says: {absent}; {len(unlisted)} "
                f"are not in it: {unlisted}; download the folder again"
            )


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__} instead of an object")
    return content


def write_json(path: Path, content: Mapping) -> None:
    """Write an object as the Hugging Face libraries do: indented by two, keys in the order they have."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class SafetensorsWriter:
    """Tensors one after the other into safetensors files, with an index when there is more than one; all names are known beforehand."""

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], shard_bytes: int = 0, name: str = _SAFE):
        """`infos` are in the order of writing. `shard_bytes` is the largest size of a file unless one tensor is larger; 0 is one file."""
        self.folder, self._infos = folder, dict(infos)
        self._shards = split_shards(infos, shard_bytes)
        stem, count = name.removesuffix(".safetensors"), len(self._shards)
        self._names = [name] if count == 1 else [f"{stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        self._index_name = f"{name}.index.json"
        self._pending = deque((shard, tensor) for shard, tensors in enumerate(self._shards) for tensor in tensors)
        self._stream: PiecewiseFile | None = None
        self._open_shard = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            assert not self._pending, self._pending
            if not self._infos:
                self._start(0)
        self._close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor: the first one of `infos` that is not written yet."""
        shard, expected = self._pending.popleft()
        info = self._infos[name]
        assert name == expected and tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, (name, expected, tensor.shape, info)
        if shard != self._open_shard:
            self._close()
            self._start(shard)
        self._stream.write(tensor_bytes(tensor))
        if not self._pending and len(self._shards) > 1:
            weight_map = {name: file for file, shard in zip(self._names, self._shards, strict=True) for name in shard}
            total = sum(info.num_bytes for info in self._infos.values())
            write_json(self.folder / self._index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _start(self, shard: int) -> None:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in self._shards[shard]:
            info = self._infos[name]
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.num_bytes]}
            offset += info.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream = PiecewiseFile(self.folder / self._names[shard])
        self._open_shard = shard
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.finish()
            self._stream.close()
            self._stream = None


class PiecewiseFile(io.FileIO):
    """A new file written in pieces that stay in the processor's cache, and brought to the disk meanwhile by a thread.

    What is on the disk leaves the page cache, whose pages are used again: a file larger than the free memory pushes nothing else out.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w")
        self._synced, self._job = 0, None
        self._pool = ThreadPoolExecutor(1)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it. Raises OSError with the file's name, as after a full disk."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            while len(piece):
                try:
                    piece = piece[super().write(piece) :]
                except OSError as error:
                    error.filename = str(self.name)
                    raise
            if self.tell() - self._synced >= _SYNCED:
                self._sync()
        return len(view)

    def finish(self) -> None:
        """Return when everything is on the disk; raises OSError if some of it did not get there."""
        self._sync()
        self._wait()

    def close(self) -> None:
        """Close the file; `finish` comes first where it matters that it is on the disk."""
        if not self.closed:
            self._pool.shutdown()
        super().close()

    def _sync(self) -> None:
        self._wait()
        begin, self._synced = self._synced, self.tell()
        self._job = self._pool.submit(_to_disk, self.fileno(), begin, self._synced - begin)

    def _wait(self) -> None:
        if self._job is not None:
            self._job.result()


def _to_disk(descriptor: int, begin: int, length: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def split_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Names of each file: in order, as many as fit; a tensor that is too large has a file of its own."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, info in infos.items():
        if shard_bytes and info.num_bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= info.num_bytes
    return shards


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's data, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files a folder has its weights in, and its index (name to file). safetensors win over pickles, as in transformers."""
    for single in (_SAFE, _PICKLED):
        index_path = folder / f"{single}.index.json"
        if index_path.is_file():
            index = read_json(index_path).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise ValueError(f"{index_path} has no weight_map; download it again")
            return _existing(folder, index.values(), f"which {index_path.name} names"), index
        if (folder / single).is_file():
            return [folder / single], None
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        files = [path for path in found if path.suffix in suffixes and path.name != "training_args.bin"]
        parts = [match for path in files if (match := _SHARD.fullmatch(path.name))]
        if parts:
            stem, _, total, suffix = parts[0].groups()
            names = [f"{stem}-{n + 1:05}-of-{total}.{suffix}" for n in range(int(total))]
            return _existing(folder, names, f"part of {total}"), None
        if len(files) == 1:
            return files, None
        if files:
            raise ValueError(f"{folder} has several weight files and no index: {[path.name for path in files]}; remove the wrong ones")
    raise ValueError(f"{folder} has no weights: no {_SAFE}, no {_SAFE}.index.json, no {_PICKLED}")


def _existing(folder: Path, names: Iterable[str], what: str) -> list[Path]:
    names = sorted(set(map(str, names)))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}, {what}; download the folder again")
    return [folder / name for name in names]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
