"""Distributed attention against its peers: every scheme in turn, in one process group, on the same inputs.

    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output tools/benchmark_results/attention_4xh200.json --lengths 32K 64K
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 33336 131000               # no multiples of 256
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 32K --parts 1 2 4          # ulysses in parts
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 512K --time_limit_s 500   # again, until all is there
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 32K 128K --hosts 2        # two emulated nodes
    torchrun --nproc_per_node 4 tools/benchmark_attention.py --output ... --lengths 128K --work "packed forward" "packed forward+backward"
    python tools/benchmark_attention.py --output share_8.json --simulate_ranks 8 --heads 28/4 12/2            # ceilings of 8 GPUs, on one
    python tools/benchmark_attention.py --output ... --plot                                                   # pictures from the rows
    python tools/benchmark_attention.py --output ... --check_meshes                                           # was `auto` right?

Rows that OUTPUT holds are not measured again, so a run that was cut short goes on where it stopped; `run` says which entry of `runs` in
OUTPUT's twin `*_machine.json` measured a row: date, command, commit, driver. The twin also has hardware and versions, and which schemes
were left out and why. Code of another commit adds no rows to a file that names its commits, unless `--allow_other_commit` is given; a
copy without git has none to name. Times are medians of 5 iterations after
a warm-up, the largest over the ranks; TFLOP/s count the causal half and backward as 2.5 forwards. `peak_memory_gib` is what a step
allocates at most beyond its inputs and results. MM-SP with ulysses is timed from the output of the projection on, bias and rotary
included, as the model calls it; everything else starts at queries, keys and values. `fraction_of_no_communication` compares with the
fastest row named `no communication ...` of the same case and repeat: the same kernels on the same share of heads and rows, nothing sent.

With `--simulate_ranks N`, one process measures these `no communication ...` schemes alone, as a rank of N would compute them: for every
mesh of N ranks the share of each place in its ring. `median_ms` is the largest, `times_max_over_mean` says how even the work is, and
`simulated_ranks` is N. Such rows need a file of their own.
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
    parser.add_argument("--simulate_ranks", type=int, metavar="N", help="in one process: one rank's share of N, nothing is sent")
    parser.add_argument("--tiles", type=count, nargs="*", default=[], help="also run ours with these forward tiles")
    parser.add_argument("--parts", type=int, nargs="*", default=[], help="also run ulysses with the heads in so many parts")
    parser.add_argument("--schemes", default="", metavar="REGEX", help="only schemes whose name matches")
    parser.add_argument("--repeats", type=int, default=1, help="whole passes over all schemes, one after the other")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=None, help="default: 10 up to 64K tokens, 3 up to 128K, 1 above")
    parser.add_argument("--shortest_document", type=count, default=1 << 10)
    parser.add_argument("--longest_document", type=count, default=64 << 10)
    parser.add_argument("--time_limit_s", type=float, default=float("inf"), help="start no further scheme after this")
    parser.add_argument("--allow_other_commit", action="store_true", help="add to rows that another commit of this code measured")
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
    multiple = 2 * (arguments.simulate_ranks or dist.get_world_size())
    if seq_len % multiple:
        raise ValueError(f"length {seq_len} must be divisible by twice the ranks = {multiple}; choose a multiple")
    lengths = (seq_len,)
    if work.startswith("packed"):
        lengths = document_lengths(seq_len, arguments.shortest_document, arguments.longest_document, multiple)
    dtype = torch.float32 if platform.is_cpu() else torch.bfloat16
    return Case(num_heads, num_kv_heads, arguments.head_dim, lengths, dtype, arguments.hosts)


def ceilings(case: Case, tiles: list[int], parts: list[int], num_ranks: int) -> dict[str, tuple[int, Callable[..., Step]]]:
    """(ring size, builder of a rank's step from its `rank`) of everything that sends nothing, by name."""
    without = partial(peers.without_transfers, case, num_ranks=num_ranks)
    found: dict[str, tuple[int, Callable[..., Step]]] = {"no communication, one call": (1, partial(without, 1, "all_gather", 0))}
    for name, (_, ring, transport, tile, number) in our_schemes(case, tiles, parts, num_ranks).items():
        found[f"no communication, {name}"] = ring, partial(without, ring, transport, tile, number or 1)
    return found


def our_schemes(case: Case, tiles: list[int], parts: list[int], num_ranks: int) -> dict[str, tuple[int, int, str, int | None, int | None]]:
    """(ulysses, ring, transport, tile, parts) of every scheme of ours, by name; None takes what the code itself takes."""
    found = {}
    for ulysses, ring, transport in peers.our_meshes(num_ranks, case.num_kv_heads):
        mesh = f"ulysses{ulysses}" + (f" ring{ring} {transport}" if ring > 1 else "")
        found[mesh] = ulysses, ring, transport, None, None
        for tile in (tile for tile in tiles if 2 * tile < max(case.lengths)):
            found[f"{mesh} tile{tile}"] = ulysses, ring, transport, tile, None
        for number in (x for x in parts if ulysses > 1 and case.num_kv_heads % (ulysses * x) == 0):
            found[f"{mesh} parts{number}"] = ulysses, ring, transport, None, number
    return found


def schemes(case: Case, tiles: list[int], parts: list[int]) -> dict[str, Callable[[], Step]]:
    """Builder of every scheme, by name."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {name: partial(build, rank=rank) for name, (_, build) in ceilings(case, tiles, parts, size).items()}
    found |= {f"mmsp {name}": partial(peers.ours, case, *choice) for name, choice in our_schemes(case, tiles, parts, size).items()}
    found |= {f"TE {mode}": partial(peers.transformer_engine, case, mode) for mode in ("p2p", "all_gather", "a2a", "a2a+p2p")}
    found["three all-to-alls"] = partial(peers.three_all_to_alls, case)
    found["replicated"] = partial(peers.replicated, case)
    found |= {f"ring-flash-attn {kind}": partial(peers.ring_flash_attn, case, kind) for kind in ("zigzag", "stripe", "ring")}
    for ulysses in (divisor for divisor in range(size, 0, -1) if size % divisor == 0):
        found[f"yunchang ulysses{ulysses} ring{size // ulysses}"] = partial(peers.yunchang_usp, case, ulysses, size // ulysses, "flash")
    found[f"yunchang ulysses{size} cuDNN"] = partial(peers.yunchang_usp, case, size, 1, "cudnn")
    for kernel in ("CUDNN", "FLASH"):
        for rotation, suffix in (("allgather", ""), ("alltoall", " alltoall")):
            found[f"torch context_parallel {kernel}{suffix}"] = partial(peers.torch_context_parallel, case, f"{kernel}_ATTENTION", rotation)
    return found


def is_wanted(name: str, case: Case, work: str, num_ranks: int) -> bool:
    """Peers that lose by far at shorter lengths are not waited for at long ones.

    Beyond 256K these are left: the ceilings, ours with ulysses alone and with a ring of all ranks (all rings where heads forbid ulysses
    alone), and the two modes of TE that were fastest at 256K on four H200 before: p2p and a2a+p2p, not a2a.
    """
    length = case.total_rows
    if name == "replicated":
        return length <= LONGEST_REPLICATED
    if name.endswith("cuDNN"):  # yunchang's has no backward
        return "backward" not in work and length <= LONGEST_OF_ALL_PEERS
    if re.match(r"ring-flash-attn (stripe|ring)|torch|three|yunchang .*ring1$", name):
        return length <= LONGEST_OF_ALL_PEERS
    if re.match(r"ring-flash-attn|yunchang|TE (all_gather|a2a)$", name):
        return length <= LONGEST_OF_MOST
    ring = re.search(r"ring(\d+)", name)
    if ring and int(ring[1]) < num_ranks:
        return length <= LONGEST_OF_MOST or case.num_kv_heads % num_ranks != 0
    return True


def run_case(arguments: argparse.Namespace, results: Results, work: str, heads: str, seq_len: int, repeat: int, deadline: float) -> bool:
    """Measure what is missing of one case; False if the time is up."""
    num_ranks = arguments.simulate_ranks or dist.get_world_size()
    case = make_case(arguments, work, heads, seq_len)
    inputs, backward = peers.make_inputs(case, num_ranks), "backward" in work
    outputs = [inputs.grad_out, *((inputs.q, inputs.k, inputs.v) if backward else ())]  # by their sizes
    warm_up = arguments.warm_up if arguments.warm_up is not None else 10 if seq_len <= 64 << 10 else 3 if seq_len <= 128 << 10 else 1

    def timed(build: Callable[[], Step]) -> tuple[float, float | None]:
        return measure(partial(build(), inputs, backward), outputs, arguments.iterations, warm_up)

    settings = case, arguments.tiles, arguments.parts
    simulated = ceilings(*settings, num_ranks) if arguments.simulate_ranks else {}
    for name, build in (simulated or schemes(*settings)).items():
        key = dict(work=work, scheme=name, heads=heads, seq_len=seq_len, hosts=arguments.hosts, repeat=repeat)
        if not re.search(arguments.schemes, name) or not is_wanted(name, case, work, num_ranks) or results.has(key):
            continue
        late = torch.tensor(time.monotonic() > deadline, device=platform.device())
        dist.broadcast(late, 0)
        if late:
            return False
        try:
            if simulated:
                median_ms, peak, more = measure_ring(*build, num_ranks, timed)
            else:
                (median_ms, peak), more = timed(build), {}
        except Exception as error:
            if name.startswith(("mmsp", "no communication")) and not isinstance(error, NotAvailable):
                raise
            results.leave_out(f"{work}, {name}, {heads}, {seq_len}, hosts {arguments.hosts}", error)
            continue
        results.add(key, median_ms, peak, case.flops(backward, num_ranks), **more)
    return True


def measure_ring(
    ring_size: int, build: Callable[..., Step], num_ranks: int, timed: Callable[[Callable[[], Step]], tuple[float, float | None]]
) -> tuple[float, float | None, dict]:
    """One ceiling on simulated ranks: the share of every place in the ring in turn; along ulysses all shares are alike.

    Returns:
        (largest milliseconds, largest peak, {"times_max_over_mean": largest over mean of the times}).
    """
    ulysses_size = num_ranks // ring_size
    times, peaks = zip(*(timed(partial(build, rank=place * ulysses_size)) for place in range(ring_size)), strict=True)
    evenness = {"times_max_over_mean": round(max(times) / statistics.mean(times), 4)}
    return max(times), None if None in peaks else max(peaks), evenness


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


def check_simulation(num_ranks: int | None, hosts: int) -> None:
    """ValueError if `--simulate_ranks` cannot be done here; the message names the way out."""
    if num_ranks is None:
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1 or (dist.is_initialized() and dist.get_world_size() != 1):
        raise ValueError("--simulate_ranks measures one rank's share in one process; start it with python instead of torchrun")
    if num_ranks < 1 or num_ranks % hosts:
        raise ValueError(f"--simulate_ranks {num_ranks} must be at least 1 and divisible by --hosts {hosts}")


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
    check_simulation(arguments.simulate_ranks, arguments.hosts)
    prepare_nccl(1 if arguments.simulate_ranks else arguments.hosts)
    if not dist.is_initialized():
        platform.init_distributed(180)
    results = Results(arguments.output, "tools/benchmark_attention.py", arguments.simulate_ranks, arguments.allow_other_commit)
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
