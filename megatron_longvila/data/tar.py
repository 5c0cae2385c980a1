"""Writing one webdataset shard, reproducibly: the same media give the same bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path


class SourceChanged(ValueError):
    """A file is no longer what it was when it was looked at."""


@dataclass(frozen=True)
class Member:
    """One file of a shard: its name there, and the file it is copied from, which must still have this sha256."""

    name: str
    sha256: str
    size: int
    path: str


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: for each medium its key (sha256), its JSON (what a webdataset reader finds beside it) and its files."""

    path: str
    media: tuple[tuple[str, str, tuple[Member, ...]], ...]


def write_shard(task: ShardTask) -> None:
    """Write the shard under a temporary name and rename it when it is whole.

    Raises OSError (disk full, source gone) or SourceChanged; no partial shard stays behind.
    """
    from webdataset.writer import TarWriter  # imports torch: only where shards are written

    temporary = Path(task.path + ".tmp")
    try:
        with open(temporary, "wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for key, description, members in task.media:
                writer.write({"__key__": key, "json": description.encode()})
                for member in members:
                    _copy(writer, member)
            writer.tarstream.close()  # writes the end marks before the file is synced
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, task.path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shard_index(path: str | Path) -> dict[str, tuple[int, int]]:
    """(offset of the first byte, size) of each member, by name: what one seek and one read need. Reads headers only."""
    with tarfile.open(path, "r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


class _Hashed:
    """A file object that hashes what is read through it."""

    def __init__(self, file):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _copy(writer, member: Member) -> None:
    """Stream a file into the shard with the header TarWriter gives its own members (its `write` would hold the whole file in memory)."""
    info = tarfile.TarInfo(member.name)
    info.size, info.mtime, info.mode, info.uname, info.gname = member.size, 0, writer.mode, writer.user, writer.group
    with open(member.path, "rb") as file:
        source = _Hashed(file)
        try:
            writer.tarstream.addfile(info, source)
        except OSError as error:
            if error.errno is None:  # tarfile's own word for a source that is shorter than announced
                raise SourceChanged(f"{member.path} changed while it was being preprocessed; run the tool again") from None
            raise
        if source.digest.hexdigest() != member.sha256 or file.read(1):
            raise SourceChanged(f"{member.path} changed while it was being preprocessed; run the tool again")
