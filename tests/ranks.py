"""Run a function on N gloo ranks forked from this process.

The parent imports torch and megatron once (`warm_parent`), so a rank starts in milliseconds. Ranks meet through a file store: no port,
no environment variable, and any number of tests may run side by side.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

GRACE_S = 3.0  # how long after the time limit the parent waits for the ranks' stack dumps


class RankError(RuntimeError):
    """A rank raised, died or hung; the message carries its traceback or every rank's stack."""


@functools.cache
def warm_parent() -> None:
    """Import what every rank needs once; forked ranks then share the pages."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)  # a forked child must not inherit a live OpenMP pool: its first parallel region would hang
    import megatron_longvila.platform.mcore  # noqa: F401


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` forked gloo ranks and return their values in rank order.

    `fn` may be a closure (ranks are forked, not spawned); its value must pickle. The first rank that fails ends the run: all ranks are
    killed and RankError carries its traceback. A run longer than `timeout_s` raises RankError with the stack of every live rank.
    """
    warm_parent()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe(duplex=False) for _ in range(world_size)]
        senders = [sender for _, sender in pipes]
        processes = [
            fork.Process(target=_rank_main, args=(fn, rank, args, senders, Path(folder), timeout_s), name=f"rank{rank}")
            for rank in range(world_size)
        ]
        # A decoder in the parent's garbage would be freed by a rank's collector, which then waits for the decoder's threads: they did not
        # come along through the fork. So throw the garbage away here and keep the rest out of the ranks' collections.
        gc.collect()
        gc.freeze()
        try:
            for process in processes:
                process.start()
            gc.unfreeze()
            for sender in senders:
                sender.close()  # the parent's copy: otherwise the death of a rank is not an end of file
            return _collect(processes, [receiver for receiver, _ in pipes], Path(folder), timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                if process.pid is not None:
                    process.join()


def _collect(processes: list, receivers: list, folder: Path, timeout_s: float) -> list[Any]:
    """Values of all ranks, or RankError for the first one that did not deliver."""
    deadline = time.monotonic() + timeout_s + GRACE_S
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    values: list[Any] = [None] * len(processes)
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = "\n".join(f"--- rank {rank}\n{_stack(folder, rank)}" for rank in sorted(waiting.values()))
            raise RankError(f"ranks {sorted(waiting.values())} still ran after {timeout_s} s\n{stacks}")
        for receiver in ready:
            rank = waiting.pop(receiver)
            failed, values[rank] = _receive(rank, receiver, processes, folder)
            if failed:
                # Peers of a rank that was killed raise at once: look for a dead one before blaming the first that could still speak.
                time.sleep(0.2)
                for other in connection.wait(list(waiting), timeout=0.0):
                    _receive(waiting.pop(other), other, processes, folder)
                raise RankError(f"rank {rank} of {len(processes)} failed:\n{values[rank]}")
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            raise RankError(f"{process.name} returned its value but did not exit within {timeout_s} s")
    return values


def _receive(rank: int, receiver: Any, processes: list, folder: Path) -> tuple[bool, Any]:
    """(failed, value or traceback) of a rank whose pipe is ready; RankError if it died without a word."""
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        processes[rank].join()
        raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}\n{_stack(folder, rank)}") from None


def _stack(folder: Path, rank: int) -> str:
    """What faulthandler wrote for a rank, empty if nothing."""
    path = folder / f"stack{rank}"
    return path.read_text() if path.exists() else ""


def _rank_main(fn: Callable[..., Any], rank: int, args: tuple, senders: list, folder: Path, timeout_s: float) -> None:
    """Body of one rank: join the group, run, answer through the pipe."""
    import torch
    import torch.distributed as dist

    sender, world_size = senders[rank], len(senders)
    for other in senders:
        if other is not sender:
            other.close()  # otherwise a peer's death would not close its pipe

    with open(folder / f"stack{rank}", "w") as stack_file:
        faulthandler.enable(stack_file)
        faulthandler.dump_traceback_later(timeout_s, file=stack_file)
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s + 2 * GRACE_S),  # a hang is reported with stacks, not as a peer's network error
            )
            value = fn(rank, *args)
            answer = pickle.dumps((False, value))
            if dist.is_initialized():
                dist.barrier()  # no rank leaves while another still needs it
                dist.destroy_process_group()
        except BaseException:
            # Stay alive until the parent kills us: our exit would make peers fail too and hide who was first.
            with contextlib.suppress(BrokenPipeError):
                sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
            time.sleep(timeout_s)
            os._exit(1)
        sender.send_bytes(answer)
        sender.close()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
