"""What the benchmarks of tools/ share: timing over ranks, and rows that are written one by one and not measured twice."""

from __future__ import annotations

import json
import os
import platform as python_platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila import platform

KEY = ("work", "scheme", "heads", "seq_len", "hosts", "repeat")


def measure(step: Callable[[], object], results: list[Tensor], iterations: int, warm_up: int) -> tuple[float, float | None]:
    """(median milliseconds, peak GiB beyond inputs and results or None on a CPU), each the largest over the ranks.

    `results` are tensors of the sizes of what a step returns; they are not memory that it needs on the way.
    """
    peak = None
    if not platform.is_cpu():
        torch.cuda.empty_cache()  # what the scheme before left
    for _ in range(warm_up - 1):
        step()
    if not platform.is_cpu():
        peak = _peak_gib(step, results)
    elif warm_up:
        step()
    times = []
    for _ in range(iterations):
        platform.synchronize()
        dist.barrier()
        times.append(_time_ms(step))
    worst = torch.tensor([sorted(times)[len(times) // 2], peak or 0.0], dtype=torch.float64, device=platform.device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst[0].item(), None if peak is None else worst[1].item()


def _peak_gib(step: Callable[[], object], results: list[Tensor]) -> float:
    """What one step allocates at most beyond what was there before and `results`; the last iteration of the warm-up."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)) / 2**30


def _time_ms(step: Callable[[], object]) -> float:
    if platform.is_cpu():
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def machine() -> dict:
    """Hardware and versions."""
    versions = {"python": python_platform.python_version(), "torch": torch.__version__}
    if not platform.is_cpu():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    peers_here = {"triton", "transformer_engine", "ring_flash_attn", "yunchang"}
    versions |= {name: version for name, version in _distributions() if name in peers_here}
    priority = os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "0")
    return {"device": platform.device_name(), "ranks": dist.get_world_size(), "versions": versions, "nccl_high_priority": priority}


def _distributions() -> list[tuple[str, str]]:
    from importlib.metadata import distributions

    return sorted(((found.metadata["Name"] or "").replace("-", "_"), found.version) for found in distributions())


class Results:
    """The rows of OUTPUT and the facts beside them; rank 0 writes, all ranks know what is there."""

    def __init__(self, path: Path, tool: str):
        self.path, self.facts_path = path, path.with_name(f"{path.stem}_machine.json")
        self.rows = json.loads(path.read_text()) if path.is_file() else []
        here = machine()
        self.facts = json.loads(self.facts_path.read_text()) if self.facts_path.is_file() else {**here, "commands": [], "left_out": {}}
        if any(self.facts[name] != here[name] for name in here):
            known = {name: self.facts[name] for name in here}
            raise ValueError(f"{self.facts_path} is of another machine: {known}, here {here}; choose another --output")
        ranks = "" if dist.get_world_size() == 1 else f"torchrun --nproc_per_node {dist.get_world_size()} "
        command = ranks + shlex.join([tool, *sys.argv[1:]])
        if command not in self.facts["commands"]:
            self.facts["commands"].append(command)

    def has(self, key: dict) -> bool:
        return any(all(row[name] == key[name] for name in KEY) for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self._compare(row)
        self.write()

    def _compare(self, row: dict) -> None:
        """Fractions of the rows that share their case and run with `row`."""
        same = [other for other in self.rows if all(other[name] == row[name] for name in KEY if name != "scheme")]
        free = [other["median_ms"] for other in same if other["scheme"].startswith("no communication")]
        for other in same if free else ():
            other["fraction_of_no_communication"] = round(min(free) / other["median_ms"], 4)

    def write(self) -> None:
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path, value in ((self.path, self.rows), (self.facts_path, self.facts)):
                unfinished = path.with_suffix(".tmp")
                unfinished.write_text(json.dumps(value, indent=1) + "\n")
                unfinished.replace(path)
