"""What the benchmarks of tools/ share: timing over ranks, and rows that are written one by one and not measured twice."""

from __future__ import annotations

import hashlib
import json
import os
import platform as python_platform
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
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


def code_commit() -> str | None:
    """The last commit that changed the package or the tools, not their results; None where git knows of none.

    "HASH and changes ..." if files differ from it, with a digest of the difference.
    """
    root, git = Path(__file__).parents[1], shutil.which("git")
    if git is None or not (root / ".git").exists():  # a copy inside another project's tree must not take that one's commit
        return None
    paths = ["--", "megatron_longvila", "tools", ":!tools/benchmark_results"]

    def run(*words: str) -> str:
        return subprocess.run([git, *words, *paths], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    commit, changed = run("rev-list", "-1", "HEAD"), run("status", "--porcelain", "--untracked-files=all")
    if not commit or not changed:
        return commit or None
    new = [root / line[3:] for line in changed.splitlines() if line.startswith("?? ")]
    difference = run("diff", "HEAD").encode() + b"".join(path.read_bytes() for path in new)
    return f"{commit} and changes {hashlib.sha256(difference).hexdigest()[:8]}"


def this_run(tool: str) -> dict[str, str | None]:
    """When and how this process measured, and what code and driver."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    command = (f"torchrun --nproc_per_node {size} " if size > 1 else "python ") + shlex.join([tool, *sys.argv[1:]])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "command": command, "commit": code_commit(), "driver": _driver_version()}


def _driver_version() -> str | None:
    """Of the GPUs; None on a CPU."""
    smi = None if platform.is_cpu() else shutil.which("nvidia-smi")
    if smi is None:
        return None
    words = [smi, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


class Results:
    """The rows of OUTPUT and the facts beside them; rank 0 writes, all ranks know what is there.

    Every run that adds something is an entry of the facts' `runs`; its rows bear the entry's `id`.

    Args:
        tool: for the command that the facts name.
        simulated_ranks: of how many ranks the rows are one rank's share, None if the ranks are real.
        allow_other_commit: go on with rows that other code measured.

    Raises:
        ValueError: the rows that are there are of another machine, of other ranks or of other code; the message names the way out.
    """

    def __init__(self, path: Path, tool: str, simulated_ranks: int | None = None, allow_other_commit: bool = False):
        self.path, self.facts_path = path, path.with_name(f"{path.stem}_machine.json")
        self.rows = json.loads(path.read_text()) if path.is_file() else []
        here = machine()
        self.facts = json.loads(self.facts_path.read_text()) if self.facts_path.is_file() else {**here, "left_out": {}}
        _refuse_other_ranks(path, self.rows, self.facts, simulated_ranks)
        self.simulated_ranks = self.facts["simulated_ranks"] = simulated_ranks
        if any(self.facts[name] != here[name] for name in here):
            known = {name: self.facts[name] for name in here}
            raise ValueError(f"{self.facts_path} is of another machine: {known}, here {here}; choose another --output")
        runs, run = self.facts.setdefault("runs", []), this_run(tool)
        others = {earlier["commit"] for earlier in runs} - {run["commit"]}
        if others and not allow_other_commit:
            raise ValueError(
                f"{path} holds rows of commit {', '.join(other or 'unknown' for other in others)}, "
                f"the code here is commit {run['commit'] or 'unknown'}; "
                "choose another --output, or pass --allow_other_commit to compare the two in one file"
            )
        self.run = {"id": len(runs) + 1} | run
        dist.barrier()  # nothing is written before every rank has read

    def has(self, key: dict) -> bool:
        return any(all(row[name] == key[name] for name in KEY) for row in self.rows)

    def add(self, key: dict, median_ms: float, peak_gib: float | None, flops: float, **more: object) -> None:
        """Write and print the row of `key`; `flops` are those of one rank, `more` are further columns."""
        row = key | {
            "median_ms": round(median_ms, 4), "tflops_per_gpu": float(f"{flops / median_ms / 1e9:.5g}"),
            "peak_memory_gib": None if peak_gib is None else round(peak_gib, 3), "fraction_of_no_communication": None,
        }  # fmt: skip
        row |= more | {"run": self.run["id"]}
        if self.simulated_ranks is not None:
            row["simulated_ranks"] = self.simulated_ranks
        self.rows.append(row)
        self._compare(row)
        self._record_run()
        if dist.get_rank() == 0:
            print(*row.values(), flush=True)

    def leave_out(self, name: str, error: Exception) -> None:
        """Note why a scheme has no row."""
        self.facts["left_out"][name] = f"{type(error).__name__}: {error}"[:300]
        self._record_run()

    def _record_run(self) -> None:
        if self.run not in self.facts["runs"]:
            self.facts["runs"].append(self.run)
        self.write()

    def _compare(self, row: dict) -> None:
        """Fractions of the rows that share their case and repeat with `row`."""
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


def add_rows(tool: str, arguments: Namespace, run: Callable[[Namespace, Results], None]) -> None:
    """Let `run` measure what the rows of arguments.output lack, in the job that torchrun started or that the caller has joined."""
    joins = not dist.is_initialized()
    if joins:
        platform.init_distributed(600)
    results = Results(arguments.output, tool, allow_other_commit=arguments.allow_other_commit)
    run(arguments, results)
    results.write()
    if joins:
        platform.shutdown_distributed()


def _refuse_other_ranks(path: Path, rows: list[dict], facts: dict, simulated_ranks: int | None) -> None:
    """Real ranks and shares of simulated ones, or of another number of them, never meet in one file."""
    known = {row.get("simulated_ranks") for row in rows} | ({facts.get("simulated_ranks")} if "runs" in facts else set())
    for other in known - {simulated_ranks}:
        names = [f"{number} simulated ranks" if number else "real ranks" for number in (other, simulated_ranks)]
        raise ValueError(f"{path} holds times of {names[0]}, this run measures {names[1]}; choose another --output")
