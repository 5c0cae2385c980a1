"""A picture of one attention step on a GPU: kernels and transfers over time, and how much of the transfers attention hides.

    torchrun --nproc_per_node 4 tools/trace_attention.py --output tools/benchmark_results/trace_ring --mesh 1x4 --transport p2p \\
        --length 128K --heads 28/4

Writes OUTPUT.json (what was measured, and every kernel of rank 0) and OUTPUT.png. `python tools/trace_attention.py --output ... --plot`
draws the picture again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import attention_peers as peers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from benchmark_attention import count, prepare_nccl  # noqa: E402
from benchmark_rows import machine, this_run  # noqa: E402

from megatron_longvila import platform  # noqa: E402

KINDS = {"transfer": "tab:red", "attention": "tab:blue", "other": "0.6"}


def kind_of(name: str) -> str:
    """`transfer`, `attention` or `other`, by the name of a kernel."""
    lowered = name.lower()
    if "nccl" in lowered:
        return "transfer"
    return "attention" if any(word in lowered for word in ("flash", "sdpa", "cudnn", "fmha", "mha_")) else "other"


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time without overlaps, in order."""
    out: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def overlap_ms(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Time that two lists of stretches, each without overlaps, have in common."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)


def summary(kernels: list[dict]) -> dict[str, float]:
    """Milliseconds of the step, of attention, of transfers, and of transfers while something else ran."""
    spans = {
        kind: merged([(item["start_ms"], item["start_ms"] + item["ms"]) for item in kernels if kind_of(item["name"]) == kind])
        for kind in KINDS
    }
    computing = merged(spans["attention"] + spans["other"])
    total = {kind: sum(stop - start for start, stop in found) for kind, found in spans.items()}
    first, last = min(item["start_ms"] for item in kernels), max(item["start_ms"] + item["ms"] for item in kernels)
    hidden = overlap_ms(spans["transfer"], computing)
    numbers = {
        "step_ms": last - first, "attention_ms": total["attention"], "other_ms": total["other"], "transfer_ms": total["transfer"],
        "transfer_hidden_ms": hidden,
    }  # fmt: skip
    return {name: round(value, 4) for name, value in numbers.items()}


def record(step, inputs: peers.Inputs) -> list[dict]:
    """Every kernel of one step on this rank: name, stream, start and duration."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step(inputs, True)
    platform.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(inputs, True)
        platform.synchronize()
    events = [event for event in profiler.profiler.kineto_results.events() if "cuda" in str(event.device_type()).lower()]
    # Spans named nccl:... only mark the kernels below them.
    kernels = [event for event in events if event.duration_ns() > 0 and not event.name().startswith("nccl:")]
    first = min(event.start_ns() for event in kernels)
    return [
        {
            "name": event.name()[:120],
            "stream": event.device_resource_id(),
            "start_ms": round((event.start_ns() - first) / 1e6, 5),
            "ms": round(event.duration_ns() / 1e6, 5),
        }
        for event in kernels
    ]


def draw(facts: dict, path: Path) -> None:
    """One row per stream; transfers red, attention blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    streams = sorted({item["stream"] for item in facts["kernels"]})
    figure, axis = pyplot.subplots(figsize=(16, 1.2 + 0.7 * len(streams)), layout="constrained")
    for kind, color in KINDS.items():
        for place, stream in enumerate(streams):
            items = [item for item in facts["kernels"] if item["stream"] == stream and kind_of(item["name"]) == kind]
            axis.broken_barh([(item["start_ms"], item["ms"]) for item in items], (place - 0.4, 0.8), facecolors=color)
    axis.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    numbers = facts["summary"]
    hidden = numbers["transfer_hidden_ms"] / numbers["transfer_ms"] if numbers["transfer_ms"] else 1.0
    axis.set(xlabel="ms, forward and backward", title=f"{facts['scheme']}: {hidden:.0%} of the transfers' time is hidden")
    axis.legend(handles=[patches.Patch(color=color, label=kind) for kind, color in KINDS.items()], loc="upper right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--mesh", default="1x2", help="ulysses x ring")
    parser.add_argument("--transport", default="all_gather", choices=("all_gather", "p2p"))
    parser.add_argument("--length", type=count, default=128 << 10)
    parser.add_argument("--heads", default="28/4")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="draw OUTPUT.json and stop")
    arguments = parser.parse_args(argv)
    path = arguments.output.with_suffix(".json")
    if arguments.plot:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return
    if platform.is_cpu():
        raise ValueError("a trace needs GPUs; there is none here")
    prepare_nccl(arguments.hosts)
    platform.init_distributed(600)
    num_heads, num_kv_heads = map(int, arguments.heads.split("/"))
    case = peers.Case(num_heads, num_kv_heads, 128, (arguments.length,), torch.bfloat16, arguments.hosts)
    ulysses_size, ring_size = map(int, arguments.mesh.split("x"))
    step = peers.ours(case, ulysses_size, ring_size, arguments.transport, None)
    kernels = record(step, peers.make_inputs(case))
    if dist.get_rank() == 0:
        name = f"mmsp ulysses{ulysses_size} ring{ring_size} {arguments.transport}, heads {arguments.heads}, {arguments.length} tokens"
        facts = {
            "scheme": name,
            "hosts": arguments.hosts,
            **this_run("tools/trace_attention.py"),
            **machine(),
            "summary": summary(kernels),
            "kernels": kernels,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")
        draw(facts, path.with_suffix(".png"))
        print(name, facts["summary"])
    platform.shutdown_distributed()


if __name__ == "__main__":
    main()
