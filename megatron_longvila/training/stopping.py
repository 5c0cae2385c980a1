"""Ends of a run other than the last step: a signal that asks it to stop, and numbers that are not finite."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

MAX_NAMED_RANKS = 8


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 while it is entered; the loop asks `requested` once per step, on all ranks together.

    Schedulers send the one or the other before they take a machine away, to some or all ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # one that came while the program started counts
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # Asked again after it has stopped, it must not die of that. A mask would cover this thread alone.
            spent = kind is None and number == signal.SIGUSR1 and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if spent else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def raise_bad_loss(step: int, losses: list[Tensor], sample_ids: list[tuple[str, ...]]) -> None:
    """Raise FloatingPointError that names the ranks and samples whose loss is not finite. Collective over all ranks.

    Args:
        losses: loss sum of each micro-batch of this rank (empty before the last pipeline stage).
        sample_ids: of each micro-batch of this rank.
    """
    bad = [ids for loss, ids in zip(losses, sample_ids, strict=False) if not bool(torch.isfinite(loss))]
    named = [f"rank {rank}: samples {', '.join(id for ids in rows for id in ids)}" for rank, rows in _gather(bad) if rows]
    raise FloatingPointError(f"step {step}: the loss is not finite; {_join(named)}; no weight was changed")


def raise_bad_gradients(step: int, model: torch.nn.Module, sample_ids: list[tuple[str, ...]]) -> None:
    """Raise FloatingPointError that names the ranks with gradients that are not finite. Collective over all ranks.

    A sum over dp x cp spreads such a value to the rank that owns its share; the rank it came from has it in most of its parameters and
    stands first.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not bool(torch.isfinite(parameter.main_grad).all())
    ]
    found = sorted(_gather((bad, sample_ids)), key=lambda answer: -len(answer[1][0]))
    named = [
        f"rank {rank}: {len(names)} parameters from {names[0]} on, samples {', '.join(id for ids in rows for id in ids)}"
        for rank, (names, rows) in found
        if names
    ]
    raise FloatingPointError(f"step {step}: the gradient is not finite; {_join(named)}; no weight was changed")


def _gather(value: object) -> list[tuple[int, object]]:
    """(rank, value) of every rank."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return list(enumerate(values))


def _join(named: list[str]) -> str:
    more = len(named) - MAX_NAMED_RANKS
    return "; ".join(named[:MAX_NAMED_RANKS]) + (f"; and {more} more ranks" if more > 0 else "")
