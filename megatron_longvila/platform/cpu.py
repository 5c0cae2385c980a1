"""Let megatron-core, which writes "cuda" into its code, run on a machine without CUDA.

Three parts, each inactive when CUDA exists:
  device    torch.cuda.current_device and torch.cuda.synchronize answer for the CPU
  literals  a TorchFunctionMode turns device="cuda" into "cpu", Tensor.cuda() into the tensor itself, and Tensor.type() into the
            "torch.cuda.X" strings that megatron's optimizer asserts on
  rng       megatron's named random streams live on the CPU generator

Torch's warning about `.grad` of a tensor that is no leaf would name this file, whoever reads it: it is given again for the reader's line.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NON_LEAF_GRAD = "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"
_GET_GRAD = torch.Tensor.grad.__get__


class CudaToCpu(TorchFunctionMode):
    """Redirects the CUDA literals of megatron-core. Thread-local: threads of ours that call megatron must enter their own."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func == _GET_GRAD and not (args[0].is_leaf or args[0].retains_grad):
            warnings.warn(f"{NON_LEAF_GRAD}; use .retain_grad() on it, or the leaf it was made from", stacklevel=2)
        if kwargs and isinstance(kwargs.get("device"), str) and kwargs["device"].startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(out, str):
            return out.replace("torch.", "torch.cuda.", 1)
        return out


@functools.cache
def activate() -> bool:
    """Enter the device and literal parts for the rest of the process; a second call does nothing. Returns whether they are active."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    warnings.filterwarnings("ignore", message=re.escape(NON_LEAF_GRAD), module=re.escape(__name__))
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", module=r"megatron\.core\.tensor_parallel\b")
    CudaToCpu().__enter__()
    return True


def use_cpu_rng(random_module: ModuleType) -> None:
    """Give `megatron.core.tensor_parallel.random` a tracker on the CPU generator. Does nothing when CUDA exists."""
    if torch.cuda.is_available():
        return

    class CpuRNGStatesTracker(random_module.CudaRNGStatesTracker):
        """Named random streams on the default CPU generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} or seed {seed} was added before; streams and seeds are used once")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random_module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"random stream {name!r} was never added; known: {sorted(self.states_)}")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random_module.CudaRNGStatesTracker = CpuRNGStatesTracker
    # Recompute stores the CPU state beside the CUDA one: the CUDA half has nothing to store here.
    random_module._get_cuda_rng_state = lambda *args, **kwargs: None
    random_module._set_cuda_rng_state = lambda *args, **kwargs: None
