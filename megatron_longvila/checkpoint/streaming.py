"""Megatron distributed checkpoints written and read one full tensor at a time, so that a model never has to fit into memory.

What is written is the `torch_dist` format that `dist_checkpointing.save` writes on one rank, and any tp and pp loads it. Megatron's and
torch's own writers are not used for the tensors: both keep every tensor they are given until the last one is written.
The files hold pickled Python objects: load only checkpoints you trust.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_longvila.checkpoint.tensor_files import PiecewiseFile, TensorInfo
from megatron_longvila.models.init import unfused_name
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy  # isort: skip

_FILE = "__0_0.distcp"
# Distributed checkpoints have Transformer Engine's names, where a norm is part of the linear after it, whichever layers a model has.
_FUSED = (
    (re.compile(r"(layers\.\d+)\.input_layernorm\.(weight|bias)$"), r"\1.self_attention.linear_qkv.layer_norm_\2"),
    (re.compile(r"(layers\.\d+)\.pre_mlp_layernorm\.(weight|bias)$"), r"\1.mlp.linear_fc1.layer_norm_\2"),
)
# Every Megatron linear has a slot for a quantisation state, which is empty.
_LINEAR = re.compile(r"(.+\.linear_\w+)\.weight")


def fused_name(name: str) -> str:
    """The name a parameter of a model with local layers has in a distributed checkpoint; the inverse of `unfused_name`."""
    for pattern, replacement in _FUSED:
        name = pattern.sub(replacement, name)
    return name


def write_distributed(folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], common: Mapping[str, Any]) -> None:
    """Write a checkpoint of full tensors into the existing, empty `folder`. Needs torch.distributed with one rank.

    Args:
        infos: global name (models/init.py) -> shape and dtype.
        read: global name -> tensor; called once for each, and the tensor is let go of before the next call.
        common: plain values beside the tensors.
    """
    sharded: dict[str, Any] = {}
    for name, info in infos.items():
        key = fused_name(name)
        sharded[key] = ShardedTensor.from_rank_offsets(key, torch.empty(info.shape, dtype=info.dtype, device="meta"))
        linear = _LINEAR.fullmatch(name)
        if linear:
            slot = f"{linear[1]}._extra_state"
            sharded[slot] = ShardedObject(slot, None, (1,), (0,))
    dist_checkpointing.save({"model": sharded, **common}, str(folder), _StreamingStrategy(read))


class _StreamingStrategy(SaveShardedStrategy):
    """Megatron checks the names and writes the plain values; this writes the tensors."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__("torch_dist", 1)
        self.read = read

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Yes: they are written beside the tensors, as Megatron's own strategy does."""
        return True

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | Path) -> None:
        """Write all entries, tensors as `read` gives them."""
        described, results = {}, []
        with PiecewiseFile(Path(checkpoint_dir, _FILE)) as stream, _no_checksums():
            for entry in _leaves(sharded_state_dict):
                begin = stream.tell()
                if isinstance(entry, ShardedObject):
                    key, offset = entry.unique_key, None
                    described[key] = BytesStorageMetadata()
                    _save([entry.data], stream)  # Megatron's form: the list of the parts that have this name
                else:
                    key, offset = entry.key, torch.Size([0] * len(entry.global_shape))
                    described[key] = _describe(entry)
                    _save(self._tensor(entry), stream)
                length = stream.tell() - begin
                results.append(WriteResult(MetadataIndex(key, offset), length, _StorageInfo(_FILE, begin, length)))
            stream.finish()
        dcp.FileSystemWriter(checkpoint_dir).finish(Metadata(described), [results])

    def _tensor(self, entry: ShardedTensor) -> Tensor:
        tensor = self.read(unfused_name(entry.key))
        assert tuple(tensor.shape) == tuple(entry.global_shape) and tensor.dtype == entry.dtype, (entry, tensor.shape, tensor.dtype)
        # torch.save writes the whole storage of a view.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous() else tensor.clone()


class DistributedTensors:
    """The tensors of a distributed checkpoint, whatever mesh wrote it: full, on the CPU, one at a time. Needs no process group."""

    def __init__(self, folder: Path, prefixes: Iterable[str]):
        """`prefixes` say which names count: those of the model and not of the optimizer. Raises OSError as `read`."""
        self._folder, self._reader = folder, _CachedReader(folder)
        with _file_named(lambda: [folder / ".metadata"]):
            entries, prefixes = self._reader.metadata.state_dict_metadata, tuple(prefixes)
        kept = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata) and key.startswith(prefixes)}
        self.infos = {unfused_name(key): TensorInfo(tuple(entry.size), entry.properties.dtype) for key, entry in kept.items()}
        self._keys = {unfused_name(key): key for key in kept}

    def read(self, name: str) -> Tensor:
        """A full tensor by its global name. Raises OSError with the files and the cause if it cannot be read, however that shows."""
        info, key = self.infos[name], self._keys[name]
        found = {key: torch.empty(info.shape, dtype=info.dtype)}
        with _file_named(lambda: self._files(key)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
            dcp.load(found, storage_reader=self._reader, no_dist=True)
        return found[key]

    def _files(self, key: str) -> list[Path]:
        """The files that hold the pieces of a tensor."""
        places = self._reader.metadata.storage_data
        return sorted({self._folder / place.relative_path for index, place in places.items() if index.fqn == key})


@contextmanager
def _file_named(files: Callable[[], list[Path]]) -> Iterator[None]:
    """Turn what torch raises for files that are missing, cut or damaged, which is of many kinds, into an OSError with their names."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # which is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        names = ", ".join(map(str, files()))
        raise OSError(f"{names} cannot be read ({type(cause).__name__}: {str(cause).strip()})") from error


class _CachedReader(dcp.FileSystemReader):
    """torch's reader, which would unpickle the list of all tensors again for each of them."""

    @cached_property
    def metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_, **__) -> Metadata:
        return self.metadata


def _save(content: Any, stream: PiecewiseFile) -> None:
    """torch.save, which turns a full disk into an error of its zip writer: here it stays an OSError."""
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextmanager
def _no_checksums() -> Iterator[None]:
    """torch.save without the CRC-32 of its zip records, which takes longer than all the rest; nothing that loads them looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _describe(entry: ShardedTensor) -> TensorStorageMetadata:
    shape = torch.Size(entry.global_shape)
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), shape, [whole])


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    else:
        yield tree
