#!/usr/bin/env python3
"""Show what a mixture comes down to: how many samples of which dataset an epoch draws."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_longvila.config import DataConfig
from megatron_longvila.data.training_data import check_mixture, open_training_data

HELP = """
Show what a mixture comes down to: how many samples of which dataset an epoch draws, and how often that shows each of them.

  python tools/show_mixture.py mixtures.yaml 'short_sft + 2*youcook2' --stage full

The expression is what --data.mixture says, the file --data.registry, the stage --data.stage. megatron_longvila/data/registry.py has the
format of the file, examples/mixtures/longvila.yaml is one.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", type=Path, metavar="FILE", help="YAML file of datasets and mixtures")
    parser.add_argument("mixture", metavar="EXPRESSION", help="a mixture of the file, or an expression of its names")
    parser.add_argument("--stage", default="", help="whose limits hold")
    arguments = parser.parse_args(argv)
    config = DataConfig(mixture=arguments.mixture, registry=str(arguments.registry), stage=arguments.stage)
    try:
        check_mixture(config)
        _, mixture = open_training_data(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [("from", "samples", "drawn an epoch", "share", "each shown")]
    for part in mixture.parts:
        size, share = len(part.numbers), part.count / len(mixture)
        rows.append((part.name, f"{size:,}", f"{part.count:,}", f"{share:.1%}", f"{part.count / size:.3g} x"))
    rows.append(("together", f"{len(mixture.numbers):,}", f"{len(mixture):,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
