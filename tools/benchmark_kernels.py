"""Every Triton kernel against its plain twin, the twin compiled, and what Megatron-Core and Transformer Engine have for the same work.

    python tools/benchmark_kernels.py --output tools/benchmark_results/kernels_h200.json          # on a machine with a GPU
    python tools/benchmark_kernels.py --output kernels.json --check                               # its tests first, in all dtypes
    python tools/benchmark_kernels.py --output kernels_sizes.json --sweep                         # other sizes of a program's share

Times are medians over the iterations after a warm-up, in milliseconds that the device takes; `gb_per_s` counts each input read once and
each result written once, whatever an implementation really moves, and `fraction_of_copy` compares that with a plain copy measured in the
same run. `extra_memory_gib` is what forward and backward allocate at most beyond their inputs. Sizes default to Qwen2-7B with 32768 rows on
a GPU, and to toys on a CPU, where Triton's interpreter runs and times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as python_platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from benchmark_rows import this_run  # noqa: E402
from kernel_works import WORKS, Work, Works  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.kernels.choice import REFERENCE, get_kernels  # noqa: E402
from megatron_longvila.mesh import Mesh  # noqa: E402
from megatron_longvila.parallel.groups import destroy_groups, initialize_groups  # noqa: E402

TOY = dict(
    rows=24,
    hidden_size=48,
    vision_hidden_size=36,
    ffn_hidden_size=40,
    heads="4/2",
    head_dim=16,
    vocab_size=200,
    loss_rows=8,
    ulysses_size=2,
)
FULL = dict(
    rows=32768,
    hidden_size=3584,
    vision_hidden_size=1152,
    ffn_hidden_size=18944,
    heads="28/4",
    head_dim=128,
    vocab_size=152064,
    loss_rows=4096,
    ulysses_size=4,
)
BUSY_CYCLES = 4_000_000  # about 2 ms
# What a program takes at a time: (module, constant, values to try).
SWEEP = {
    "pack_qkv": [("qkv_pack", "FORWARD_ROWS", (8, 16, 32)), ("qkv_pack", "BACKWARD_ROWS", (32, 64, 128))],
    "swap_into": [("qkv_pack", "COPY_COLUMNS", (512, 1024, 2048))],
    "merge_into": [("merge", "PAIRS", (4, 8, 16))],
    "take_rows": [("rows", "COLUMNS", (512, 1024, 2048, 4096))],
    "place_rows": [("rows", "COLUMNS", (512, 1024, 2048, 4096))],
    "rms_norm": [("rms_norm", "BACKWARD_PROGRAMS", (512, 1024, 2048))],
    "layer_norm": [("layer_norm", "TILE_VALUES", (2048, 4096, 8192, 16384)), ("layer_norm", "BACKWARD_PROGRAMS", (256, 512, 1024, 2048))],
    "swiglu": [("swiglu", "COLUMNS", (512, 1024, 2048, 4096))],
    "cross_entropy": [("cross_entropy", "COLUMNS", (4096, 8192, 16384))],
}


def implementations(work: Work, compiled: bool) -> dict[str, Callable]:
    """(*inputs) -> result, by name; ours first."""
    triton_kernels = get_kernels("triton", platform.device())

    def twin(*inputs: Tensor) -> Tensor:
        return work.function(REFERENCE, *inputs)

    found = {"triton": lambda *inputs: work.function(triton_kernels, *inputs), "plain twin": twin}
    if compiled:
        torch.compiler.reset()  # every twin passes through the same code here, and only so many versions of it are compiled
        found["plain twin compiled"] = torch.compile(twin)
    return found | work.peers


def variants(name: str, work: Work, arguments: argparse.Namespace) -> Iterator[tuple[str, Callable, AbstractContextManager]]:
    """(name, (*inputs) -> result, what has to hold while it is measured)."""
    found = implementations(work, arguments.compiled and not arguments.sweep)
    if not arguments.sweep:
        yield from ((implementation, run, nullcontext()) for implementation, run in found.items())
        return
    for module, constant, values in SWEEP[name]:
        for value in values:
            target = f"megatron_longvila.kernels.{module}.{constant}"
            yield f"triton {constant}={value}", found["triton"], mock.patch(target, value)


def measure(work: Work, run: Callable, iterations: int, warm_up: int) -> dict[str, float | None]:
    """Median milliseconds of forward and backward, and the memory they take on top."""
    wants = [work.differentiable and x.is_floating_point() and i not in work.constants for i, x in enumerate(work.inputs)]
    inputs = [x.detach().requires_grad_() if wanted else x for x, wanted in zip(work.inputs, wants, strict=True)]
    leaves = [x for x, wanted in zip(inputs, wants, strict=True) if wanted]
    result = run(*inputs)
    grad = torch.randn_like(result)
    del result
    forward, backward, peak = [], [], None
    for iteration in range(warm_up + iterations):
        before = _reset_memory()
        time_ms, result = _timed(lambda: run(*inputs))
        forward.append(time_ms)
        if work.differentiable:
            time_ms, gradients = _timed(lambda result=result: torch.autograd.grad(result, leaves, grad, allow_unused=True))
            backward.append(time_ms)
            del gradients
        del result
        if before is not None and iteration == 0:
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    middle = [statistics.median(times[warm_up:]) if times else None for times in (forward, backward)]
    return {"forward_ms": middle[0], "backward_ms": middle[1], "extra_memory_gib": peak}


def _reset_memory() -> int | None:
    if platform.is_cpu():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _timed(step: Callable) -> tuple[float, Tensor]:
    """(milliseconds, result)."""
    if platform.is_cpu():
        start_s = time.perf_counter()
        result = step()
        return (time.perf_counter() - start_s) * 1e3, result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)  # meanwhile Python issues the step, so that the events see the device's time alone
    start.record()
    result = step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop), result


def copy_gb_per_s(num_bytes: int) -> float:
    """What a plain copy of a large tensor reads and writes per second."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=platform.device())
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source))[0] for _ in range(10)]
    return 2 * num_bytes / statistics.median(times[3:]) / 1e6


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--check", action="store_true", help="run the kernels' GPU tests first, and stop if one fails")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--sweep", action="store_true", help="time ours alone, with other sizes of a program's share")
    parser.add_argument("--dtype", default=None, choices=["bf16", "fp16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=not platform.is_cpu(), help="time the compiled twins")
    for name, value in (TOY if platform.is_cpu() else FULL).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(argv)


def versions() -> dict[str, str]:
    found = {"python": python_platform.python_version()}
    for name in ("torch", "triton", "megatron-core", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_all(arguments: argparse.Namespace) -> list[str]:
    """Measures one implementation after another, writing OUTPUT after each. Returns what failed, which stands in OUTPUT too."""
    device = platform.device()
    default = "fp32" if platform.is_cpu() else "bf16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype or default]
    works = Works(arguments, dtype, device)
    if unknown := set(arguments.kernels) - set(WORKS):
        raise ValueError(f"--kernels {sorted(unknown)}: choose from {sorted(WORKS)}")
    copied = copy_gb_per_s(1 << 20 if platform.is_cpu() else 1 << 30)
    facts = {"device": platform.device_name(), "versions": versions(), "copy_gb_per_s": copied}
    facts |= {**this_run("tools/benchmark_kernels.py"), "rows": [], "failed": []}
    for name in arguments.kernels or WORKS:
        work = getattr(works, name)()
        for implementation, run, change in variants(name, work, arguments):
            row = {"kernel": name, "implementation": implementation, "dtype": str(dtype).removeprefix("torch.")}
            try:
                with change:
                    row |= measure(work, run, arguments.iterations, arguments.warm_up)
            except Exception as error:  # a peer that does not run here must not cost the others' figures; it is reported at the end
                facts["failed"].append(f"{name}, {implementation}: {type(error).__name__}: {error}")
            else:
                _add_speeds(row, work, dtype, copied)
                facts["rows"].append(row)
                print(_line(row), flush=True)
            arguments.output.write_text(json.dumps(facts, indent=2) + "\n")
    return facts["failed"]


def _add_speeds(row: dict, work: Work, dtype: torch.dtype, copied: float) -> None:
    for direction, values in zip(("forward", "backward"), work.values, strict=True):
        if row[f"{direction}_ms"]:
            speed = values * dtype.itemsize / row[f"{direction}_ms"] / 1e6
            row |= {f"{direction}_gb_per_s": speed, f"{direction}_fraction_of_copy": speed / copied}


def _line(row: dict) -> str:
    parts = [f"{row['kernel']:14} {row['implementation']:24}"]
    for direction in ("forward", "backward"):
        if row[f"{direction}_ms"]:
            parts.append(f"{direction} {row[f'{direction}_ms']:9.3f} ms {100 * row[f'{direction}_fraction_of_copy']:4.0f}% of copy")
    return "  ".join(parts)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.check:
        folders = ("gpu/test_kernels_gpu.py", "gpu/test_model_kernels_gpu.py", "kernels/test_triton.py")
        tests = [str(ROOT / "tests" / folder) for folder in folders]
        environment = os.environ | {"LONGVILA_GPU_TESTS": "1"}
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "", *tests], cwd=ROOT, env=environment).returncode
        if code:
            raise SystemExit(f"the kernels' tests failed (pytest returned {code}); nothing was timed")
    platform.init_distributed(timeout_s=60)
    initialize_groups(Mesh(1, 1, 1, 1, 1), timeout_s=60)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    failed = run_all(arguments)
    destroy_groups()
    platform.shutdown_distributed()
    if failed:
        raise SystemExit("\n".join(["these did not run:", *failed]))


if __name__ == "__main__":
    main()
