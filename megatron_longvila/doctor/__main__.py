"""What is live on this host, or on all hosts of a job, with a remedy for every problem.

    python -m megatron_longvila.doctor [--path DIR ...] [--json]
    torchrun --nnodes 2 --nproc_per_node 8 ... -m megatron_longvila.doctor
    srun --ntasks-per-node 8 python -m megatron_longvila.doctor

Started on several hosts it also measures the offset of their clocks and the speed between them. The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.doctor import host, network
from megatron_longvila.doctor.finding import PROBLEM, Finding, render
from megatron_longvila.platform import hardware

MIB = 2**20
JOIN_S = 900.0  # the first rank of a host comes when it has looked at the host: programs of up to 120 s each, and the disks


def join_slurm_step() -> None:
    """Under srun without torchrun: tell this rank what torchrun would have told it."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or tasks == 1:
        return
    address = find_first_node(os.environ["SLURM_STEP_NODELIST"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": os.environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
        "MASTER_ADDR": address,
        "MASTER_PORT": str(12000 + (int(os.environ["SLURM_JOB_ID"]) * 10 + 9) % 20000),  # below those that the kernel hands out
    }


def find_first_node(nodes: str) -> str:
    """Address of the first of these nodes, written as Slurm writes them: gpu[003-005,9],cpu1. Its name where there is no scontrol to ask,
    as in a container."""
    if shutil.which("scontrol") is None:
        first = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
        return "".join(piece or "" for piece in first.groups())
    first = ask_slurm("show", "hostnames", nodes).split()[0]
    address = re.search(r"\bNodeAddr=(\S+)", ask_slurm("show", "node", "-o", first))  # names of nodes need not be names of hosts
    return address[1] if address else first


def ask_slurm(*words: str) -> str:
    """What scontrol answers."""
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout


def examine(paths: list[Path], disk_bytes: int, exchange_bytes: int, timeout_s: float) -> list[Finding] | None:
    """The findings of all hosts on rank 0, None on the other ranks."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    own = [replace(one, host=name) for one in host.check_host(paths, disk_bytes, ranks)] if is_first else []
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [*own, *(replace(one, host=name) for one in (*host.check_speed({0: hardware.matmul_tflops()}), *network.alone()))]
    platform.init_distributed(JOIN_S)
    group = hardware.cpu_group(JOIN_S)
    answers: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(answers, (name, hardware.matmul_tflops(), own), group=group)
    platform.limit_collectives(timeout_s)
    leaders: dict[str, int] = {}
    for rank, (place, _, _) in enumerate(answers):
        leaders.setdefault(place, rank)
    between = [*network.check_clocks(group, leaders), *network.check_all_reduce(exchange_bytes)]
    between += network.check_pairs(leaders, exchange_bytes)
    between += host.check_speed({rank: tflops for rank, (_, tflops, _) in enumerate(answers)})
    found = [one for _, _, findings in answers for one in findings] + [replace(one, host=name) for one in between]
    rank = dist.get_rank()
    platform.shutdown_distributed()
    return found if rank == 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report on rank 0; returns 1 there if there is a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_longvila.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, nargs="+", default=[], help="folders to measure: output_dir and data; default: here")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    parser.add_argument("--disk_mib", type=int, default=256, help="MiB written to and read from each folder")
    parser.add_argument("--exchange_mib", type=int, default=64, help="MiB of the all-reduce between ranks")
    parser.add_argument("--timeout_s", type=float, default=120.0, help="limit of every exchange between ranks once all have joined")
    options = parser.parse_args(argv)
    for name in ("disk_mib", "exchange_mib", "timeout_s"):
        value, default = getattr(options, name), parser.get_default(name)
        if value <= 0:
            parser.error(f"--{name} {value} must be positive, or nothing is measured; the default is {default}")
    join_slurm_step()
    found = examine(options.path or [Path.cwd()], options.disk_mib * MIB, options.exchange_mib * MIB, options.timeout_s)
    if found is None:
        return 0
    text = json.dumps([asdict(one) for one in found], indent=1) if options.json else render(found)
    sys.stdout.write(text + "\n")
    return int(any(one.status == PROBLEM for one in found))


if __name__ == "__main__":
    sys.exit(main())
