#!/usr/bin/env python3
"""One stage of a chain as a job of its own: what it trains, and what is left to do when it has trained."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's package, wherever the job was submitted from

from megatron_longvila.config_check import check  # noqa: E402
from megatron_longvila.training.chain import (  # noqa: E402
    RECORD,
    Chain,
    Planned,
    check_finished,
    find_stage,
    first_open,
    plan_chain,
    read_chain,
    training_words,
)
from megatron_longvila.training.chain_report import write_report  # noqa: E402
from megatron_longvila.training.metrics import write_json  # noqa: E402
from megatron_longvila.training.plan_run import describe_run  # noqa: E402

HELP = """
One stage of a chain as a job of its own: what it trains, and what is left to do when it has trained.

  python tools/slurm_stage.py --chain FILE --output_dir DIR --nodes N --ranks_per_node G [--stage NAME] ACTION [fields]

The chain file, DIR and the fields are those of tools/run_stages.py, which can go on where jobs have stopped, and the reverse. ACTION is

  --names   print the stages' names, one a line
  --plan    print what each stage would be on the nodes: mesh, batch, bytes on a GPU
  --begin   print the words of the stage's training command, one a line, nothing if the stage is finished; the stage before must be
  --end     after training: merge the stage's adapters, and rewrite DIR/summary.json and summary.html

examples/slurm/chain.sh and train.sbatch call it.
"""
EPILOG = "Exit status: 0 done, 1 something you gave does not fit, or the stage is not finished, 2 wrong usage."


def begin(planned: list[Planned], place: int) -> list[str]:
    """Words of a stage's training command, empty if nothing is left to train. Raises ValueError if the stage before is not finished."""
    one, before = planned[place], planned[place - 1] if place else None
    if before is not None and place >= first_open(planned) and not before.result:
        raise ValueError(f"stage {one.stage.name} begins with the weights of stage {before.stage.name}, which is {before.status()}")
    for change in check_finished(planned[: place + 1]):
        print(change, file=sys.stderr)
    if one.trained or place < first_open(planned):
        return []
    one.folder.mkdir(parents=True, exist_ok=True)
    beat = one.folder / "heartbeat.json"
    attempts = close(one.record.get("attempts", []), beat.stat().st_mtime if beat.exists() else 0.0, None)
    attempts.append({"seconds": 0.0, "exit_status": None, "started": time.time()})
    write_json(one.folder / RECORD, {"facts": one.facts, "digest": one.digest, "attempts": attempts})
    return training_words(one, str(before.result) if before else one.config.checkpoint.load)


def close(attempts: list[dict], ended: float, status: int | None) -> list[dict]:
    """The attempts with the seconds of one that is still open; a job that was lost ends with its last heartbeat."""
    for attempt in attempts:
        if "started" in attempt:
            attempt |= {"seconds": max(0.0, round(ended - attempt.pop("started"), 1)), "exit_status": status}
    return attempts


def end(chain: Chain, planned: list[Planned], place: int, output_dir: Path) -> None:
    """Merge what is to be merged and write the report. Raises ValueError if training left no finished checkpoint, or the merge failed."""
    one = planned[place]
    if place + 1 < first_open(planned):  # a later stage is finished: nobody needs this one any more
        return
    record = one.record
    write_json(one.folder / RECORD, record | {"attempts": close(record["attempts"], time.time(), 0)})
    if not one.trained:
        raise ValueError(f"stage {one.stage.name}: training ended without an error and left no finished checkpoint in {one.folder}")
    if one.merges and not one.result:
        shutil.rmtree(one.merged, ignore_errors=True)  # of a merge that was killed
        words = [sys.executable, str(ROOT / "tools/merge_lora.py"), "--checkpoint", str(one.trained), "--output", str(one.merged)]
        status = subprocess.run(words, stdout=sys.stderr).returncode
        if status or not one.result:
            raise ValueError(f"stage {one.stage.name}: merging its adapters ended with exit status {status} and no complete {one.merged}")
    write_report(chain, planned, output_dir)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--chain", type=Path, required=True, metavar="FILE", help="chain file, as tools/run_stages.py reads it")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="gets stages/NAME, summary.json and summary.html")
    parser.add_argument("--from_checkpoint", type=Path, metavar="DIR", help="weights the first stage begins with [fresh ones]")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of each job")
    parser.add_argument("--ranks_per_node", type=int, required=True, metavar="G", help="GPUs, or processes, of one node")
    parser.add_argument("--stage", metavar="NAME", help="the stage, for --begin and --end")
    action = parser.add_mutually_exclusive_group(required=True)
    for name in ("names", "plan", "begin", "end"):
        action.add_argument(f"--{name}", action="store_true")
    arguments, overrides = parser.parse_known_args(argv)
    if (arguments.begin or arguments.end) and not arguments.stage:
        parser.error("--begin and --end need --stage NAME")
    if min(arguments.nodes, arguments.ranks_per_node) < 1:
        parser.error(f"--nodes {arguments.nodes} and --ranks_per_node {arguments.ranks_per_node} must be at least 1")
    return arguments, overrides


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parse_arguments(argv)
    output_dir, num_ranks = arguments.output_dir.absolute(), arguments.nodes * arguments.ranks_per_node
    try:
        chain = read_chain(arguments.chain, overrides)
        if arguments.names:
            print("\n".join(stage.name for stage in chain.stages))
            return 0
        start = arguments.from_checkpoint and arguments.from_checkpoint.absolute()
        planned = plan_chain(chain, output_dir, start, num_ranks=num_ranks, ranks_per_host=arguments.ranks_per_node)
        if arguments.plan:
            for one in planned:
                print(f"== stage {one.stage.name}: {one.status()}")
                print(describe_run(one.config, check(one.config, num_ranks), num_nodes=arguments.nodes))
            return 0
        place = find_stage(planned, arguments.stage)
        if arguments.begin:
            words = begin(planned, place)
            if not words:
                print(f"stage {arguments.stage} has trained before", file=sys.stderr)
                end(chain, planned, place, output_dir)
            elif any("\n" in word for word in words):
                raise ValueError(f"stage {arguments.stage}: a word of its training command holds a line break: {words}")
            print("\n".join(words))
        else:
            end(chain, planned, place, output_dir)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
