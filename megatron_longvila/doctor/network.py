"""Checks between the ranks of a job: the offset of the hosts' clocks, and how fast they exchange data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.doctor.finding import NOTE, OK, Finding, problem_if

MIB = 2**20
PINGS = 10
MOST_OFFSET_S = 1.0
SLOW_SHARE = 0.5  # of the median pair
ROUNDS = 5


def clock_offset(group: dist.ProcessGroup, rank: int) -> tuple[float, float]:
    """(seconds the clock of `rank` is ahead of rank 0's, half the quickest round trip: the error). Collective; valid on rank 0.

    Of several round trips the quickest tells most: the other clock was read within it.
    """
    best, offset = float("inf"), 0.0
    for _ in range(PINGS if rank else 0):
        if dist.get_rank() == 0:
            stamp = torch.zeros(1, dtype=torch.float64)
            start = time.time()
            dist.send(stamp, rank, group=group)
            dist.recv(stamp, rank, group=group)
            end = time.time()
            if end - start < best:
                best, offset = end - start, stamp.item() - (start + end) / 2
        elif dist.get_rank() == rank:
            stamp = torch.zeros(1, dtype=torch.float64)
            dist.recv(stamp, 0, group=group)
            stamp.fill_(time.time())
            dist.send(stamp, 0, group=group)
    return offset, (best / 2 if rank else 0.0)


def check_clocks(group: dist.ProcessGroup, leaders: dict[str, int]) -> Iterator[Finding]:
    """The clocks of all hosts against that of rank 0. `leaders` is one rank of each host. Collective; findings are valid on rank 0."""
    for host, rank in leaders.items():
        offset_s, error_s = clock_offset(group, rank)
        value = f"{host} {offset_s:+.3f} s from rank 0's host (within {error_s:.3f} s)"
        yield problem_if(
            abs(offset_s) - error_s > MOST_OFFSET_S, "clock offset", value, "start chronyd or systemd-timesyncd: logs and causes mix up"
        )


def check_all_reduce(count: int) -> Iterator[Finding]:
    """All-reduce of `count` bytes and of one number over all ranks. Collective."""
    world_size = dist.get_world_size()
    large = torch.zeros(count // 4, dtype=torch.float32, device=platform.device())
    seconds, latency_s = (_time(lambda tensor=tensor: dist.all_reduce(tensor)) for tensor in (large, large[:1]))
    rate = 2 * (world_size - 1) / world_size * count / seconds / 1e9
    value = (
        f"{world_size} ranks: {count / MIB:.0f} MiB in {seconds * 1e3:.1f} ms (bus {rate:.2f} GB/s), one number in {latency_s * 1e3:.2f} ms"
    )
    yield Finding("all-reduce", OK, value)


def check_pairs(leaders: dict[str, int], count: int) -> Iterator[Finding]:
    """Each host with the next one alone, to find the slow link. Collective over all ranks."""
    hosts = list(leaders)
    pairs = list(zip(hosts, hosts[1:] + hosts[:1], strict=True)) if len(hosts) > 2 else [tuple(hosts)] if len(hosts) == 2 else []
    rates: dict[str, float] = {}
    for one, other in pairs:
        ranks = [leaders[one], leaders[other]]
        group = dist.new_group(ranks)
        seconds = torch.zeros(1, dtype=torch.float64, device=platform.device())
        if dist.get_rank() in ranks:
            data = torch.zeros(count // 4, dtype=torch.float32, device=platform.device())
            seconds += _time(lambda data=data, group=group: dist.all_reduce(data, group=group), group) / 2
        dist.all_reduce(seconds)
        rates[f"{one} - {other}"] = count / seconds.item() / 1e9
    yield from judge_pairs(rates)


def judge_pairs(rates: dict[str, float]) -> Iterator[Finding]:
    """The slowest pair of hosts against the median one; rates in GB/s."""
    if not rates:
        return
    median = sorted(rates.values())[len(rates) // 2]
    slow = [name for name, rate in rates.items() if rate < SLOW_SHARE * median]
    value = f"{min(rates.values()):.2f} to {max(rates.values()):.2f} GB/s, slowest {min(rates, key=rates.__getitem__)}"
    if slow:
        value += f"; slow pairs: {', '.join(slow)}"
    yield problem_if(bool(slow), "host pairs", value, "the host that the slow pairs share has a bad link or port: leave it out (--exclude)")


def alone() -> Sequence[Finding]:
    """What one process can say of the network."""
    return [Finding("network", NOTE, "one process", "start it on all hosts (torchrun or srun) to measure clocks and links between them")]


def _time(exchange, group: dist.ProcessGroup | None = None) -> float:
    """Seconds of one exchange, the slowest rank's, mean over rounds after a warm-up. Collective over `group`."""
    exchange()
    platform.synchronize()
    dist.barrier(group=group)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        exchange()
    platform.synchronize()
    took = torch.tensor([(time.perf_counter() - start) / ROUNDS], dtype=torch.float64, device=platform.device())
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group)
    return took.item()
