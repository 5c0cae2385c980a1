"""Repairs of megatron-core 0.16.1 that every device needs. Imported by platform/mcore.py only, after the version check.

Each fix names the functions it replaces and a piece of source they must contain: another source is refused, not patched.
`tests/platform/test_mcore_fixes.py` runs each of them with and without the fix.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

RESULT_WAIT_S = 60.0


@dataclass(frozen=True)
class Patch:
    """One replaced function: `owner` is `module:Class` or `module`, `marker` must occur in the source of `name`."""

    owner: str
    name: str
    marker: str
    make: Callable[[Callable], Callable]

    def target(self) -> Any:
        """The class or module that holds the function."""
        module, _, cls = self.owner.partition(":")
        return functools.reduce(getattr, cls.split(".") if cls else [], importlib.import_module(module))


def _keep_step(original: Callable) -> Callable:
    """torch's AdamW keeps `step` in its state; the loader copies every key of that state from tensors that never hold it (KeyError)."""

    @functools.wraps(original)
    def set_states(self, model_param, tensors):
        if not self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state and "step" not in tensors:
                tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    return set_states


def _own_step(original: Callable) -> Callable:
    """The loader stores ONE step tensor in all states; AdamW then raises it once per parameter and the next update is wrong, silently."""

    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def _torch_adam() -> bool:
    """Whether `select_adam` (or megatron's own import) settled on torch's Adam, which has a `step` per parameter."""
    return not importlib.import_module("megatron.core.optimizer.distrib_optimizer").HAVE_APEX_OR_TE


def _has_no_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """This rank trains nothing: its pipeline stage is frozen, or its data-parallel share is padding only."""
    return not any(group["params"] for group in optimizer.param_groups)


def _primed_state(original: Callable) -> Callable:
    """A fresh torch AdamW has no state, and `state_dict` demands exactly one step: create zero state first (saves at step 0, loads)."""

    @functools.wraps(original)
    def state_dict(self):
        if _torch_adam():
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    if not self.optimizer.state[param]:
                        zeros = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                        self.optimizer.state[param].update(step=torch.tensor(0.0), **zeros)
        return original(self)

    return state_dict


def _empty_state(original: Callable) -> Callable:
    """A rank that trains nothing has no step to report (AssertionError), yet its state must equal the others': rank 0's is saved."""

    @functools.wraps(original)
    def state_dict(self):
        if not (_torch_adam() and _has_no_parameters(self.optimizer)):
            return original(self)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        for group in groups:
            group["step"] = float(group.get("step", 0.0))
        state = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    return state_dict


def _count_empty_steps(original: Callable) -> Callable:
    """The step of a rank that trains nothing lives in its parameter groups, where `state_dict` finds it under every backend."""

    @functools.wraps(original)
    def step_with_ready_grads(self):
        successful = original(self)
        if successful and not self.is_stub_optimizer and _has_no_parameters(self.optimizer):
            for group in self.optimizer.param_groups:
                group["step"] = group.get("step", 0) + 1
        return successful

    return step_with_ready_grads


def _unpadded_ranges(original: Callable) -> Callable:
    """The gathered optimizer state leaves out the padding at the end of each bucket, but is cut at the places the parameters have with it:
    behind the first padded bucket every saved tensor is shifted, and a resumed run goes on with wrong weights, silently."""

    def without_padding(buffer) -> dict:
        starts = list(itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        ranges = {}
        for param, (start, end, bucket) in buffer.param_index_map.items():
            shift = buffer.buckets[bucket].offset - starts[bucket]
            ranges[param] = (start - shift, end - shift, bucket)
        return ranges

    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self, *args, **kwargs):
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, ranges in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = ranges

    return sharded_param_state_fully_reshardable


def _no_fp8(original: Callable) -> Callable:
    """`self.fp8 = fp8 is not None` makes the default False mean True; without Transformer Engine that is a NameError."""

    @functools.wraps(original)
    def __init__(self, fp8=None):
        original(self, fp8 or None)

    return __init__


class ResultsQueue:
    """Carries the answer of a forked checkpoint writer, or of this process itself, to this process.

    A thread of the owner empties the pipe at once, so `put` never blocks on a full pipe: neither in a synchronous save, where putting and
    getting is one thread, nor in a child the parent joins before it reads. `get_nowait` waits for an answer already under way.
    """

    def __init__(self) -> None:
        self._pipe = multiprocessing.get_context("fork").SimpleQueue()
        self._answers: queue.Queue = queue.Queue()
        threading.Thread(target=self._drain, daemon=True, name="checkpoint-results").start()

    def _drain(self) -> None:
        while True:
            self._answers.put(self._pipe.get())

    def put(self, answer: Any) -> None:
        """Called by the writer, in this process or in a forked one."""
        self._pipe.put(answer)

    def get_nowait(self) -> Any:
        """Called by the owner after the writer ended. Raises queue.Empty if it never answered."""
        return self._answers.get(timeout=RESULT_WAIT_S)


def _die_with_parent() -> None:
    """Linux ends this process when the one that forked it dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _mortal_worker(original: Callable) -> Callable:
    """A checkpoint writer whose rank is killed waits for a queue item that nobody will send: it would keep its memory and the job's output
    pipe for ever, so that `torchrun ... | tee log` never ends."""

    @functools.wraps(original)
    def write_preloaded_data(*args, **kwargs):
        _die_with_parent()
        return original(*args, **kwargs)

    return write_preloaded_data


def _mortal_background(original: Callable) -> Callable:
    """The same for the process that a background save forks to start those writers."""

    @functools.wraps(original)
    def schedule_async_call(self, async_req):
        if async_req.async_fn is not None:
            async_req = async_req._replace(async_fn=_mortal_worker(async_req.async_fn))
        return original(self, async_req)

    return schedule_async_call


def _forked_results(original: Callable) -> Callable:
    """megatron spawns a Manager process per rank: 350 MB that re-run an unguarded main script and outlive a killed rank."""
    queues: dict[int, ResultsQueue] = {}

    @functools.wraps(original)
    def get_write_results_queue():
        pid = os.getpid()  # ranks forked from one parent must not answer into each other's queue
        if pid not in queues:
            queues.clear()
            queues[pid] = ResultsQueue()
        return queues[pid]

    return get_write_results_queue


_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
FIXES: dict[str, tuple[Patch, ...]] = {
    "keep_step": (Patch(_OPTIMIZER, "_set_main_param_and_optimizer_states", "dst_tensors[key].copy_(tensors[key])", _keep_step),),
    "own_step": (Patch(_OPTIMIZER, "load_state_dict", 's["step"] = step', _own_step),),
    "primed_state": (Patch(_OPTIMIZER, "state_dict", "assert len(steps) == 1", _primed_state),),
    "empty_rank": (
        Patch(_OPTIMIZER, "state_dict", "assert len(steps) == 1", _empty_state),
        Patch(_OPTIMIZER, "step_with_ready_grads", "super().step_with_ready_grads()", _count_empty_steps),
    ),
    "unpadded_ranges": (
        Patch(
            _OPTIMIZER,
            "sharded_param_state_fully_reshardable",
            "state_ten = world_tensors[state_key][param_world_start:param_world_end]",
            _unpadded_ranges,
        ),
    ),
    "no_fp8": (Patch("megatron.core.tensor_parallel.random:CheckpointWithoutOutput", "__init__", "self.fp8 = fp8 is not None", _no_fp8),),
    "mortal_writers": (
        Patch(f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync", "write_preloaded_data", "count_queue.get()", _mortal_worker),
        Patch(f"{_STRATEGIES}.async_utils:TemporalAsyncCaller", "schedule_async_call", "target=async_req.async_fn", _mortal_background),
    ),
    "forked_results": (
        Patch(
            f"{_STRATEGIES}.filesystem_async",
            "_get_write_results_queue",
            "ctx.Manager().Queue()",
            _forked_results,
        ),
    ),
}
_ORIGINALS: dict[tuple[str, str], Callable] = {}


def apply(*, without: str | None = None) -> None:
    """Apply all fixes; a test may leave one out by name. Safe to call again: it starts from the original functions.

    Raises ImportError if a function to fix is missing or its source is not the one the fix was written for.
    """
    if without is not None and without not in FIXES:
        raise ValueError(f"no fix is named {without!r}; known: {sorted(FIXES)}")
    for patch in (patch for patches in FIXES.values() for patch in patches):
        target = patch.target()
        key = (patch.owner, patch.name)
        if key not in _ORIGINALS:
            _ORIGINALS[key] = _checked(target, patch)
        setattr(target, patch.name, _ORIGINALS[key])
    for name, patches in FIXES.items():
        for patch in patches if name != without else ():
            setattr(patch.target(), patch.name, patch.make(getattr(patch.target(), patch.name)))


def _checked(target: Any, patch: Patch) -> Callable:
    """The function to replace, or ImportError if it is not the one the fix knows."""
    original = getattr(target, patch.name, None)
    if original is None or patch.marker not in inspect.getsource(original):
        raise ImportError(
            f"{patch.owner}.{patch.name} does not contain {patch.marker!r}: this is not the source of megatron-core 0.16.1; "
            "run: pip install --force-reinstall --no-deps megatron-core==0.16.1"
        )
    return original
