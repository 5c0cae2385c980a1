"""What would let the host wait for a GPU, counted on a CPU: values read back, and tensors made of host memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longvila import platform

_ATEN = torch.ops.aten
READS = {
    _ATEN._local_scalar_dense.default,
    _ATEN.nonzero.default,
    _ATEN.equal.default,
    _ATEN.is_nonzero.default,
    _ATEN.masked_select.default,
}


class _CountReads(TorchDispatchMode):
    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["reads"] += function in READS
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_waits() -> Iterator[Counter]:
    """Counts while it is entered: `reads`, `host_tensors` (which a GPU would have to be sent), `uploads` (those sent without waiting)."""
    counts = Counter()

    def counted(function, key):
        return lambda *inputs, **settings: (counts.update([key]), function(*inputs, **settings))[1]

    with contextlib.ExitStack() as patches:
        for name in ("from_numpy", "tensor", "as_tensor"):
            patches.enter_context(mock.patch.object(torch, name, counted(getattr(torch, name), "host_tensors")))
        patches.enter_context(mock.patch.object(platform, "upload", counted(platform.upload, "uploads")))
        patches.enter_context(_CountReads(counts))
        yield counts


def waits_of(step: Callable[[], object]) -> list[dict[str, int]]:
    """Counts of a first and of a second call, what is zero left out."""
    found = []
    for _ in range(2):
        with host_waits() as counts:
            step()
        found.append(dict(+counts))
    return found


def later_step_never_waits(step: Callable[[], object]) -> None:
    """On a GPU: the first step compiles kernels and plans the layout; RuntimeError where the second lets the host wait."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
