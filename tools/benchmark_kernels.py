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
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from benchmark_rows import this_run  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.kernels.choice import REFERENCE, Kernels, get_kernels  # noqa: E402
from megatron_longvila.mesh import Mesh  # noqa: E402
from megatron_longvila.parallel.groups import destroy_groups, initialize_groups  # noqa: E402
from megatron_longvila.training.loss import cross_entropy  # noqa: E402

from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl  # noqa: E402  # isort: skip
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy  # noqa: E402  # isort: skip
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd  # noqa: E402  # isort: skip

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


@dataclass
class Work:
    """One operation at one size.

    Attributes:
        inputs: floating inputs of `function` get gradients unless listed in `constants`.
        function: (kernels, *inputs) -> result, differentiable if `differentiable`.
        values: how many values of the activations' dtype forward has to move, and backward.
        peers: other implementations, (*inputs) -> result.
    """

    inputs: tuple[Tensor, ...]
    function: Callable
    values: tuple[int, int]
    constants: tuple[int, ...] = ()
    differentiable: bool = True
    peers: dict[str, Callable] = field(default_factory=dict)


class Works:
    """Builders of the operations, one method each, at given sizes."""

    def __init__(self, sizes: argparse.Namespace, dtype: torch.dtype, device: torch.device):
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.heads = tuple(map(int, sizes.heads.split("/")))  # of queries, of keys and values

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, in the dtype under test unless another is given."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def pack_qkv(self) -> Work:
        (num_heads, num_kv_heads), rows, head_dim = self.heads, self.sizes.rows, self.sizes.head_dim
        width, size = (num_heads + 2 * num_kv_heads) * head_dim, self.sizes.ulysses_size
        angles = self.normal(rows, head_dim // 2, dtype=torch.float32)
        table = torch.cat((angles.cos(), angles.sin()), dim=1)
        inputs = self.normal(rows, width), self.normal(width), table
        both = torch.cat((angles, angles), dim=1)[:, None, None]
        return Work(
            inputs,
            lambda kernels, *x: kernels.pack_qkv(*x, num_kv_heads, size),
            (2 * rows * width, 2 * rows * width),
            constants=(2,),
            peers={"Megatron-Core": lambda qkv, bias, _: _megatron_pack(qkv, bias, both, num_kv_heads, size)},
        )

    def swap_into(self) -> Work:
        size, rows, num_heads, head_dim = self.sizes.ulysses_size, self.sizes.rows, self.heads[0], self.sizes.head_dim
        x = self.normal(size, rows, num_heads // size, head_dim)
        out = x.new_empty(rows, size, num_heads // size, head_dim)

        def function(kernels: Kernels, x: Tensor) -> Tensor:
            kernels.swap_into(out, x)
            return out

        return Work((x,), function, (2 * x.numel(), 0), differentiable=False)

    def merge_into(self) -> Work:
        shape = rows, num_heads, _ = self.sizes.rows, self.heads[0], self.sizes.head_dim
        lse, block_lse = (self.normal(num_heads, rows, dtype=torch.float32).t() for _ in range(2))
        out, block_out = self.normal(*shape, dtype=torch.float32), self.normal(*shape)
        per_value = 4 // out.new_empty(0, dtype=self.dtype).element_size()  # fp32 sums, read and written

        def merge(kernels: Kernels, *x: Tensor) -> Tensor:
            kernels.merge_into(*x)
            return x[0]

        return Work((out, lse, block_out, block_lse), merge, ((2 * per_value + 1) * out.numel(), 0), differentiable=False)

    def take_rows(self) -> Work:
        inputs = self.normal(self.sizes.rows, self.sizes.hidden_size), torch.randperm(self.sizes.rows, device=self.device)
        return Work(inputs, lambda kernels, *x: kernels.take_rows(*x), (2 * inputs[0].numel(),) * 2)

    def place_rows(self) -> Work:
        rows = self.sizes.rows
        index = torch.randperm(rows, device=self.device)[: rows * 3 // 4]
        inputs = self.normal(rows, self.sizes.hidden_size), self.normal(len(index), self.sizes.hidden_size), index
        # forward reads what it keeps and what it places; backward writes both gradients
        return Work(inputs, lambda kernels, *x: kernels.place_rows(*x), (2 * inputs[0].numel(), 2 * inputs[0].numel() + inputs[1].numel()))

    def rms_norm(self) -> Work:
        x, weight = self.normal(self.sizes.rows, 1, self.sizes.hidden_size), self.normal(self.sizes.hidden_size)
        peers = {"Transformer Engine": _te_norm("RMSNorm", weight)} if _has_te() else {}
        return Work((x, weight), lambda kernels, *x: kernels.rms_norm(*x, 1e-6), (2 * x.numel(), 3 * x.numel()), peers=peers)

    def layer_norm(self) -> Work:
        """Of the vision tower's width."""
        width = self.sizes.vision_hidden_size
        x, weight, bias = self.normal(self.sizes.rows, 1, width), self.normal(width), self.normal(width)
        peers = {"Transformer Engine": _te_norm("LayerNorm", weight)} if _has_te() else {}
        return Work((x, weight, bias), lambda kernels, *x: kernels.layer_norm(*x, 1e-6), (2 * x.numel(), 3 * x.numel()), peers=peers)

    def swiglu(self) -> Work:
        x = self.normal(self.sizes.rows, 1, 2 * self.sizes.ffn_hidden_size)
        # Megatron's fused functions are compiled ones: tens of seconds on a CPU.
        peers = {} if platform.is_cpu() else {"Megatron-Core fused": lambda x: bias_swiglu_impl(x, None, False, False)}
        if _has_te():
            peers["Transformer Engine"] = _te_swiglu()
        values = (x.numel() * 3 // 2, x.numel() * 5 // 2)
        return Work((x,), lambda kernels, x: kernels.swiglu(x), values, peers=peers)

    def cross_entropy(self) -> Work:
        logits = self.normal(self.sizes.loss_rows, self.sizes.vocab_size)
        labels = torch.randint(0, self.sizes.vocab_size, (self.sizes.loss_rows,), device=self.device)

        def losses(kernels: Kernels, logits: Tensor, labels: Tensor) -> Tensor:
            if kernels is REFERENCE:
                return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            return cross_entropy(logits, labels, kernels)

        group = torch.distributed.group.WORLD
        peers = {"Megatron-Core": lambda logits, labels: cross_entropy(logits, labels, REFERENCE)}
        if not platform.is_cpu():
            peers["Megatron-Core fused"] = lambda logits, labels: fused_vocab_parallel_cross_entropy(
                logits[:, None], labels[:, None], group
            )
        if _has_te():
            peers["Transformer Engine"] = _te_cross_entropy
        return Work((logits, labels), losses, (logits.numel(), 2 * logits.numel()), peers=peers)


WORKS = ("pack_qkv", "swap_into", "merge_into", "take_rows", "place_rows", "rms_norm", "layer_norm", "swiglu", "cross_entropy")


def _megatron_pack(qkv: Tensor, bias: Tensor, angles: Tensor, num_kv_heads: int, size: int) -> Tensor:
    """Bias, Megatron's rotary of queries and keys, one copy into the send buffer: a pass for each."""
    x = (qkv + bias).unflatten(1, (num_kv_heads, -1, angles.shape[-1]))
    queries, keys, values = x[:, :, :-2].flatten(1, 2), x[:, :, -2], x[:, :, -1]
    rotated = [_apply_rotary_pos_emb_bshd(part[:, None], angles).squeeze(1) for part in (queries, keys)]
    return torch.cat([part.unflatten(1, (size, -1)).transpose(0, 1) for part in (*rotated, values)], dim=2)


def _has_te() -> bool:
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def _te_norm(name: str, weight: Tensor) -> Callable:
    import transformer_engine.pytorch

    norm = getattr(transformer_engine.pytorch, name)(weight.shape[0], eps=1e-6, device=weight.device, dtype=weight.dtype)
    return lambda x, *_: norm(x)  # its own parameters: their gradients are computed all the same


def _te_swiglu() -> Callable:
    from transformer_engine.pytorch.ops import SwiGLU

    return SwiGLU()


def _te_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(logits[:, None], labels[:, None], 0.0, False, None)


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
