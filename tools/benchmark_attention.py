"""Distributed attention against its peers: every scheme in turn, in one process group, on the same inputs.

    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output tools/benchmark_results/attention_4xh200.json --lengths 32K 64K
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 33336 131000               # no multiples of 256
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 32K --parts 1 2 4          # ulysses in parts
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 512K --time_limit_s 500   # again, until all is there
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 32K 128K --hosts 2        # two emulated nodes
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 128K --work "packed forward" "packed forward+backward"
    python tools/benchmark_attention.py --output ... --plot                                                   # pictures from the rows
    python tools/benchmark_attention.py --output ... --check_meshes                                           # was `auto` right?

Rows that OUTPUT holds are not measured again, so a run that was cut short goes on where it stopped. Peers that are not installed are left
out, and OUTPUT's twin `*_machine.json` says which, with hardware, versions and every command. Times are medians of 5 iterations after a
warm-up, the largest over the ranks; TFLOP/s count the causal half and backward as 2.5 forwards. `peak_memory_gib` is what a step allocates
at most beyond its inputs and results. MM-SP with ulysses is timed from the output of the projection on, bias and rotary included, as the
model calls it; everything else starts at queries, keys and values. `fraction_of_no_communication` compares with the fastest row named
`no communication ...` of the same run: the same kernels on the same share of heads and rows, with nothing sent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import attention_peers as peers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from attention_peers import Case, NotAvailable, Step  # noqa: E402
from benchmark_plots import plot_attention  # noqa: E402
from benchmark_rows import Results, measure  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.mesh_cost import Heads, Machine, Row, rank_meshes  # noqa: E402

EMULATED_GB_PER_S = 4.0  # between emulated hosts, loopback sockets; `--hosts`
WORKS = ("forward", "forward+backward", "packed forward", "packed forward+backward")
LONGEST_REPLICATED, LONGEST_OF_ALL_PEERS, LONGEST_OF_MOST = 64 << 10, 128 << 10, 256 << 10


def count(text: str) -> int:
    """32K -> 32768, 1M -> 1048576."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--lengths", type=count, nargs="+", default=[32 << 10], help="tokens over all ranks")
    parser.add_argument("--heads", nargs="+", default=["32/8", "28/4"], help="query/key-value heads")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--work", nargs="+", default=["forward+backward"], choices=WORKS)
    parser.add_argument("--hosts", type=int, default=1, help="2: emulate nodes, traffic between them through sockets")
    parser.add_argument("--tiles", type=count, nargs="*", default=[], help="also run ours with these forward tiles")
    parser.add_argument("--parts", type=int, nargs="*", default=[], help="also run ulysses with the heads in so many parts")
    parser.add_argument("--schemes", default="", metavar="REGEX", help="only schemes whose name matches")
    parser.add_argument("--repeats", type=int, default=1, help="whole passes over all schemes, one after the other")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=None, help="default: 10 up to 64K tokens, 3 up to 128K, 1 above")
    parser.add_argument("--shortest_document", type=count, default=1 << 10)
    parser.add_argument("--longest_document", type=count, default=64 << 10)
    parser.add_argument("--time_limit_s", type=float, default=float("inf"), help="start no further scheme after this")
    parser.add_argument("--plot", action="store_true", help="draw OUTPUT and stop")
    parser.add_argument("--check_meshes", action="store_true", help="compare the meshes that `auto` takes with the rows of OUTPUT and stop")
    return parser.parse_args(argv)


def document_lengths(total: int, shortest: int, longest: int, multiple: int) -> tuple[int, ...]:
    """Log-uniform lengths that fill `total` tokens, each a multiple of `multiple`; always the same ones."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < total:
        length = int(np.exp(rng.uniform(np.log(shortest), np.log(longest)))) // multiple * multiple
        lengths.append(max(multiple, min(length, total - sum(lengths))))
    return tuple(lengths)


def make_case(arguments: argparse.Namespace, work: str, heads: str, seq_len: int) -> Case:
    num_heads, num_kv_heads = map(int, heads.split("/"))
    multiple = 2 * dist.get_world_size()
    if seq_len % multiple:
        raise ValueError(f"length {seq_len} must be divisible by twice the ranks = {multiple}; choose a multiple")
    lengths = (seq_len,)
    if work.startswith("packed"):
        lengths = document_lengths(seq_len, arguments.shortest_document, arguments.longest_document, multiple)
    dtype = torch.float32 if platform.is_cpu() else torch.bfloat16
    return Case(num_heads, num_kv_heads, arguments.head_dim, lengths, dtype, arguments.hosts)


def schemes(case: Case, tiles: list[int], parts: list[int]) -> dict[str, Callable[[], Step]]:
    """Builder of every scheme, by name."""
    size = dist.get_world_size()
    found: dict[str, Callable[[], Step]] = {"no communication, one call": partial(peers.without_transfers, case, 1, "all_gather", 0)}
    ours = {}
    for ulysses, ring, transport in peers.our_meshes(size, case.num_kv_heads):
        mesh = f"ulysses{ulysses}" + (f" ring{ring} {transport}" if ring > 1 else "")
        for tile in [None, *(tile for tile in tiles if 2 * tile < max(case.lengths) or tile == 0)]:
            name = mesh + ("" if tile is None else f" tile{tile}")
            found[f"no communication, {name}"] = partial(peers.without_transfers, case, ring, transport, tile)
            ours[f"mmsp {name}"] = partial(peers.ours, case, ulysses, ring, transport, tile)
        for number in (x for x in parts if ulysses > 1 and case.num_kv_heads % (ulysses * x) == 0):
            found[f"no communication, {mesh} parts{number}"] = partial(peers.without_transfers, case, ring, transport, None, number)
            ours[f"mmsp {mesh} parts{number}"] = partial(peers.ours, case, ulysses, ring, transport, None, number)
    found |= ours
    found |= {f"TE {mode}": partial(peers.transformer_engine, case, mode) for mode in ("p2p", "all_gather", "a2a", "a2a+p2p")}
    found["three all-to-alls"] = partial(peers.three_all_to_alls, case)
    found["replicated"] = partial(peers.replicated, case)
    found |= {f"ring-flash-attn {kind}": partial(peers.ring_flash_attn, case, kind) for kind in ("zigzag", "stripe", "ring")}
    for ulysses in (divisor for divisor in range(size, 0, -1) if size % divisor == 0):
        found[f"yunchang ulysses{ulysses} ring{size // ulysses}"] = partial(peers.yunchang_usp, case, ulysses, size // ulysses, "flash")
    found[f"yunchang ulysses{size} cuDNN"] = partial(peers.yunchang_usp, case, size, 1, "cudnn")
    for kernel in ("CUDNN", "FLASH"):
        found[f"torch context_parallel {kernel}"] = partial(peers.torch_context_parallel, case, f"{kernel}_ATTENTION")
    return found


def is_wanted(name: str, case: Case, work: str) -> bool:
    """Peers that lose by far at shorter lengths are not waited for at long ones; beyond 256K only the best of each kind is."""
    length = case.total_rows
    if name == "replicated":
        return length <= LONGEST_REPLICATED
    if name.endswith("cuDNN"):  # yunchang's has no backward
        return "backward" not in work and length <= LONGEST_OF_ALL_PEERS
    if re.match(r"ring-flash-attn (stripe|ring)|torch|three|yunchang .*ring1$", name):
        return length <= LONGEST_OF_ALL_PEERS
    if re.match(r"ring-flash-attn|yunchang|TE all_gather|TE a2a\+p2p", name):
        return length <= LONGEST_OF_MOST
    if re.search(r"ring\d", name):
        return length <= LONGEST_OF_MOST or case.num_kv_heads % dist.get_world_size() != 0
    return True


def run_case(arguments: argparse.Namespace, results: Results, work: str, heads: str, seq_len: int, repeat: int, deadline: float) -> bool:
    """Measure what is missing of one case; False if the time is up."""
    case = make_case(arguments, work, heads, seq_len)
    inputs, backward = peers.make_inputs(case), "backward" in work
    outputs = [inputs.grad_out, *((inputs.q, inputs.k, inputs.v) if backward else ())]  # by their sizes
    warm_up = arguments.warm_up if arguments.warm_up is not None else 10 if seq_len <= 64 << 10 else 3 if seq_len <= 128 << 10 else 1
    for name, build in schemes(case, arguments.tiles, arguments.parts).items():
        key = dict(work=work, scheme=name, heads=heads, seq_len=seq_len, hosts=arguments.hosts, repeat=repeat)
        if not re.search(arguments.schemes, name) or not is_wanted(name, case, work) or results.has(key):
            continue
        late = torch.tensor(time.monotonic() > deadline, device=platform.device())
        dist.broadcast(late, 0)
        if late:
            return False
        try:
            median_ms, peak = measure(partial(build(), inputs, backward), outputs, arguments.iterations, warm_up)
        except Exception as error:
            if name.startswith(("mmsp", "no communication")) and not isinstance(error, NotAvailable):
                raise
            absent = f"{work}, {name}, {heads}, {seq_len}, hosts {arguments.hosts}"
            results.facts["left_out"][absent] = f"{type(error).__name__}: {error}"[:300]
            results.write()
            continue
        tflops = case.flops(backward) / median_ms / 1e9
        row = key | {
            "median_ms": round(median_ms, 4), "tflops_per_gpu": round(tflops, 2 if tflops > 1 else 6),
            "peak_memory_gib": None if peak is None else round(peak, 3), "fraction_of_no_communication": None,
        }  # fmt: skip
        results.add(row)
        if dist.get_rank() == 0:
            print(*row.values(), flush=True)
    return True


def check_meshes(rows: list[dict], num_ranks: int, head_dim: int) -> list[dict]:
    """For every case of single samples: the mesh that `auto` takes among those measured with the ring transport that training takes.

    `meshes` counts them. `ratio` is the time of the taken mesh over that of our fastest, None if it was not measured. `verdict` is `right`;
    `wrong` (more than 5% slower than another); `only one mesh measured`, which confirms nothing; or `taken mesh not measured`.
    """
    cases, choices = defaultdict(lambda: defaultdict(list)), []
    for row in rows:
        mesh = re.fullmatch(r"mmsp ulysses(\d+)(?: ring\d+ (\w+))?", row["scheme"])
        if mesh and row["work"] == "forward+backward":
            times = cases[row["heads"], row["seq_len"], row["hosts"]]
            if mesh[2] in (None, "all_gather" if row["hosts"] == 1 else "p2p"):  # as models/llm.py resolves `auto`
                times[int(mesh[1])].append(row["median_ms"])
    for (heads, seq_len, hosts), times in sorted(cases.items()):
        num_heads, num_kv_heads = map(int, heads.split("/"))
        machine = Machine(num_ranks // hosts, network_gb_per_s=EMULATED_GB_PER_S if hosts > 1 else Machine.network_gb_per_s)
        taken = rank_meshes(Heads(num_heads, num_kv_heads, head_dim), Row(seq_len), num_ranks, 1, machine)[0].ulysses_size
        medians = {ulysses_size: statistics.median(values) for ulysses_size, values in times.items()}
        best, ratio = min(medians, key=medians.get, default=None), None
        if taken not in medians:
            verdict = "taken mesh not measured"
        else:
            ratio = round(medians[taken] / medians[best], 4)
            verdict = "only one mesh measured" if len(medians) == 1 else "wrong" if ratio > 1.05 else "right"
        choices.append({
            "heads": heads, "seq_len": seq_len, "hosts": hosts, "taken": f"ulysses{taken}", "best": best and f"ulysses{best}",
            "meshes": len(medians), "ratio": ratio, "verdict": verdict,
        })  # fmt: skip
    return choices


def prepare_nccl(hosts: int) -> None:
    """Transfers before kernels, as in training; `hosts` > 1 makes NCCL send between as many groups of ranks through loopback sockets.

    TORCH_NCCL_HIGH_PRIORITY=0 in the environment gives transfers no priority. It holds for every scheme.
    """
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if hosts < 1 or size % hosts:
        raise ValueError(f"--hosts {hosts} must divide the number of ranks, {size}")
    if hosts > 1:
        os.environ |= {
            "NCCL_HOSTID": f"node{rank // (size // hosts)}", "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4",
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.plot:
        plot_attention(json.loads(arguments.output.read_text()), arguments.output)
        return
    if arguments.check_meshes:
        facts = json.loads(arguments.output.with_name(f"{arguments.output.stem}_machine.json").read_text())
        choices = check_meshes(json.loads(arguments.output.read_text()), facts["ranks"], arguments.head_dim)
        for choice in choices:
            print(*(f"{name} {value}" for name, value in choice.items()), sep=", ")
        if not choices:
            sys.exit(f"{arguments.output} has no `mmsp` row of forward+backward: nothing to compare")
        sys.exit(any(choice["verdict"] in ("wrong", "taken mesh not measured") for choice in choices))
    deadline = time.monotonic() + arguments.time_limit_s
    prepare_nccl(arguments.hosts)
    if not dist.is_initialized():
        platform.init_distributed(180)
    results = Results(arguments.output, "tools/benchmark_attention.py")
    cases = [
        (work, heads, seq_len, repeat)
        for seq_len in arguments.lengths
        for work in arguments.work
        for repeat in range(arguments.repeats)
        for heads in arguments.heads
    ]
    finished = all(run_case(arguments, results, *case, deadline) for case in cases)
    results.write()
    if dist.get_rank() == 0:
        print("all rows are there" if finished else "the time is up: run the same command again", flush=True)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        platform.shutdown_distributed()
