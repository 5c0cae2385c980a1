#!/usr/bin/env python3
"""What a training job would be on so many nodes, or why it cannot be: before it is submitted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package, wherever the job was submitted from

from megatron_longvila.config import Config  # noqa: E402
from megatron_longvila.config_check import check  # noqa: E402
from megatron_longvila.training.plan_run import describe_run  # noqa: E402

HELP = """
What a training job would be on so many nodes, or why it cannot be: before it is submitted.

  python tools/slurm_plan.py --nodes 2 --ranks_per_node 8 --config examples/models/qwen2_7b_siglip_448.yaml [fields]

prints the mesh, the batch arithmetic and the bytes of weights, gradients and optimizer on a GPU, after the checks that training makes:
fields, mesh, data, tokenizer, weights to load. --nodes 1-2 asks for every number of nodes in the range. --print FIELD prints one field of
the configuration alone, for scripts.

It imports no torch and needs no GPU. examples/slurm/submit.sh and train.sbatch call it.
"""
EPILOG = "Exit status: 0 it fits, 1 it does not (the message says why and what would), 2 wrong usage."


def parse_nodes(text: str) -> range:
    """`4` or `2-4`, as sbatch takes them."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()) or not 1 <= int(first) <= int(last or first):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of nodes from 1 on, or a range like 1-2")
    return range(int(first), int(last or first) + 1)


def plan(flags: list[str], num_nodes: int, ranks_per_node: int) -> Config:
    """The configuration that training would resolve. Raises ValueError with the number of nodes in it."""
    from megatron_longvila.train import configure

    try:
        return configure(flags, world_size=num_nodes * ranks_per_node, gpus_per_host=ranks_per_node)
    except ValueError as error:
        raise ValueError(f"{num_nodes} nodes x {ranks_per_node} ranks: {error}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=parse_nodes, required=True, metavar="N[-M]", help="nodes of the job")
    parser.add_argument("--ranks_per_node", type=int, required=True, metavar="G", help="GPUs, or processes, of one node")
    parser.add_argument("--print", dest="field", metavar="FIELD", help="print this field of the configuration alone, e.g. output_dir")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.ranks_per_node < 1:
        parser.error(f"--ranks_per_node {arguments.ranks_per_node} must be at least 1")
    try:
        for num_nodes in arguments.nodes:
            config = plan(flags, num_nodes, arguments.ranks_per_node)
            if not arguments.field:
                print(describe_run(config, check(config, num_nodes * arguments.ranks_per_node), num_nodes=num_nodes))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.field:
        value = config
        for name in arguments.field.split("."):
            if not hasattr(value, name):
                raise SystemExit(f"error: --print {arguments.field}: there is no such field; see python -m megatron_longvila.train --help")
            value = getattr(value, name)
        print(value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
