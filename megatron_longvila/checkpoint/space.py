"""Room on the disk for a checkpoint: how much it needs, and what to say when there is not enough."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.checkpoint.complete import find_steps
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # isort: skip

GIB = 2**30
# Beside the tensors: archive headers, names and random states, per tensor and rank, and files the file system rounds up.
BYTES_PER_TENSOR, BYTES_PER_RANK = 3072, 128 << 10
FULL = {errno.ENOSPC, errno.EDQUOT}


def checkpoint_bytes(sharded: Any) -> int:
    """Bytes that the ranks together are about to write of their sharded state. Collective over all ranks."""
    own = torch.tensor([_own_bytes(sharded) + BYTES_PER_RANK], dtype=torch.int64, device=platform.device())
    dist.all_reduce(own)
    return int(own)


def require_space(root: Path, needed: int, step: int) -> None:
    """Raises OSError on every rank, before anything is written, if `root` has not that much room. Collective; rank 0 looks."""
    free = torch.tensor([free_bytes(root) if dist.get_rank() == 0 else 0], dtype=torch.int64, device=platform.device())
    dist.all_reduce(free)
    if int(free) < needed:
        raise OSError(errno.ENOSPC, describe(root, step, needed, int(free)))


def explain(error: BaseException, root: Path, partial: Path, needed: int, step: int) -> OSError | None:
    """What `error`, raised while `partial` was written, means if the disk is the reason; None if it is not.

    The library writes through other processes and native code, whose errors do not always carry their number: too little room beside what
    has been written is as good.
    """
    try:
        written = sum(path.stat().st_size for path in partial.rglob("*"))
        free = free_bytes(root) + written
    except OSError:  # another rank has begun to clear up
        written, free = 0, free_bytes(root)
    chain, one = [], error
    while one is not None:
        chain.append(one)
        one = one.__cause__ or one.__context__
    numbered = any(isinstance(one, OSError) and one.errno in FULL for one in chain)
    if not numbered and free >= needed and not any(os.strerror(number) in str(one) for one in chain for number in FULL):
        return None
    return OSError(errno.ENOSPC, describe(root, step, needed, free))


def describe(root: Path, step: int, needed: int, free: int) -> str:
    """The sizes, what is left, and the way out."""
    good = [path.name for path in find_steps(root).values()]
    kept = f"the last checkpoint, {good[-1]}, is as it was" if good else "there is no earlier one"
    return (
        f"the checkpoint of step {step} needs {size(needed)} and {root} has {size(free)} free; {kept}; make room or lower "
        "checkpoint.keep_last (an old checkpoint is removed only after the new one is complete), and start the same command again"
    )


def free_bytes(root: Path) -> int:
    """Room for an ordinary user on the file system of `root` or of the nearest folder above it that exists."""
    while not root.exists():
        root = root.absolute().parent
    stat = os.statvfs(root)
    return stat.f_bavail * stat.f_frsize


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _own_bytes(value: Any) -> int:
    """Bytes of the tensors in a nested sharded state that this rank writes; those that are not sharded are written by rank 0."""
    if isinstance(value, dict):
        return sum(_own_bytes(one) for one in value.values())
    if isinstance(value, list | tuple):
        return sum(_own_bytes(one) for one in value)
    if isinstance(value, ShardedTensor | ShardedTensorFactory):
        replicas = value.replica_id if isinstance(value.replica_id, tuple) else (value.replica_id,)
        return 0 if any(replicas) or value.data is None else value.data.nbytes + BYTES_PER_TENSOR
    if isinstance(value, torch.Tensor):
        return value.nbytes + BYTES_PER_TENSOR if dist.get_rank() == 0 else 0
    return 0
