#!/usr/bin/env python3
"""Run a chain of training stages: each begins with the weights of the one before, and what is done is not done again."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_longvila.pulse import MARKER
from megatron_longvila.training.chain import (
    RECORD,
    Chain,
    Planned,
    check_finished,
    find_stage,
    first_open,
    plan_chain,
    read_chain,
    restart_from,
    training_words,
)
from megatron_longvila.training.chain_report import write_report
from megatron_longvila.training.metrics import write_json

ROOT = Path(__file__).resolve().parents[1]
HELP = """
Run a chain of training stages: each begins with the weights of the one before, and what is done is not done again.

  python tools/run_stages.py --chain examples/chains/NAME.yaml --output_dir runs/chain --num_ranks 8

trains every stage of the chain file in runs/chain/stages/STAGE with megatron_longvila.train. A stage takes the weights of the stage
before it and nothing else: optimizer, schedule and data position are fresh. After a stage with adapters (model.lora) tools/merge_lora.py
merges them into the weights, which the next stage loads. --dry_run shows all commands and changes nothing.

The chain file (paths in it are relative to it):

  name: five stages
  base: [../models/tiny.yaml]            configuration files of every stage
  tokenizer: data/tokenizer.model        data.tokenizer of every stage
  flags: {training.seed: 1}              fields of every stage
  stages:
    - name: alignment
      config: [alignment.yaml]           configuration files laid over the base
      flags: {data.train: [data/images]} fields of this stage
    - name: extension
      config: [extension.yaml]
      merge_lora: true                   default: if the stage has adapters

Fields on the command line win over the file: --FIELD VALUE holds for all stages, --stages.NAME.FIELD VALUE for one:

  ... --training.recompute full --stages.alignment.data.train '["/data/images"]'

Before anything starts, every stage is checked for the given ranks: its fields, its data, and that the weights of each fit the next.

Stop it with SIGTERM or SIGUSR1: the running stage saves itself after its step, and the command ends with status 0. Started again - also
after a crash or kill - the same command skips finished stages and goes on inside the unfinished one. A finished stage whose settings,
data or input have changed is refused; --restart_from NAME removes its folder and those of all stages after it, and trains them again.

output_dir gets summary.json and summary.html, rewritten after each stage: loss curves, parameters trained and frozen, tokens, frames, time.
Checkpoints hold pickled Python objects: start only from those you trust.
"""
EPILOG = (
    "Exit status: 0 all stages finished, or stopped by a signal; 1 something you gave does not fit; 2 wrong usage; 3 a stage failed; "
    "130 interrupted from the keyboard."
)


class StageFailed(RuntimeError):
    """A program of the chain ended with an error; carries the stage's name."""

    def __init__(self, stage: str, message: str):
        super().__init__(message)
        self.stage = stage


class Programs:
    """Runs one program at a time, and hands a SIGTERM or SIGUSR1 that this process gets on to the training run in it."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, lock: Any):
        self.stop_requested: int = 0
        self._lock = lock
        for number in self.SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = number

    def run(self, words: Sequence[str], run_dir: Path) -> int:
        """Run a program to its end and return its exit status. `run_dir` is the run directory of the training it does."""
        print("$", shlex.join(words), flush=True)
        heartbeat = run_dir / "heartbeat.json"
        before = read_heartbeat(heartbeat)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        # The launcher inherits the lock: if this process is killed, no second chain can start beside the training that goes on.
        with subprocess.Popen(words, env=environment, pass_fds=[self._lock.fileno()]) as process:
            told = False
            while process.poll() is None:
                if self.stop_requested and not told:
                    told = ask_to_stop(process, self.stop_requested, heartbeat, before)
                time.sleep(0.1)
        return process.returncode


def read_heartbeat(path: Path) -> str:
    """What training wrote last, empty before it has."""
    return path.read_text() if path.exists() else ""


def ask_to_stop(launcher: subprocess.Popen, number: int, heartbeat: Path, before: str) -> bool:
    """Make the training of `launcher` stop after its step. False as long as the heartbeat is what it was `before` it was started.

    The signal goes to the rank that writes the heartbeat: one is enough, and torchrun would end its ranks without waiting for their
    checkpoint. If that rank runs on another host, the launcher gets the signal itself, as srun passes it on.
    """
    beat = read_heartbeat(heartbeat)
    if beat == before:  # its time is no sign: a shared disk may have a clock of its own
        return False
    rank = json.loads(beat)["pid"]
    try:
        process = psutil.Process(launcher.pid)
        if rank in {process.pid, *(child.pid for child in process.children(recursive=True))}:
            os.kill(rank, signal.SIGUSR1)
        else:
            launcher.send_signal(number)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return True  # it has just ended
    return True


@contextmanager
def locked(output_dir: Path) -> Iterator[Any]:
    """The lock of an output directory. Raises ValueError if another process holds it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output_dir {output_dir} is in use: a chain, or training that outlived its chain, runs in it; wait for it or end it"
            ) from None
        yield stream


def run_stage(one: Planned, before: Planned | None, launcher: list[str], programs: Programs) -> bool:
    """Train, and merge, one stage. False if a signal stopped it first.

    Raises:
        StageFailed: a program ended with an error.
    """
    load = str(before.result) if before else one.config.checkpoint.load
    if not one.trained:
        started = {"facts": one.facts, "digest": one.digest, "attempts": one.record.get("attempts", [])}
        one.folder.mkdir(parents=True, exist_ok=True)
        status = attempt(one, started, [*launcher, "-m", "megatron_longvila.train", *training_words(one, load)], programs)
        # A signal to the whole process group reaches the launcher too, which then reports an error of its own.
        if (one.folder / MARKER).exists() and (programs.stop_requested or not status):
            return False
        if status:
            raise StageFailed(one.stage.name, f"training ended with exit status {status}; its output above says why")
        if not one.trained:
            raise StageFailed(one.stage.name, f"training ended without an error and left no finished checkpoint in {one.folder}")
    if one.merges and not one.result:
        if programs.stop_requested:
            return False
        shutil.rmtree(one.merged, ignore_errors=True)  # of a merge that was killed
        merge = [sys.executable, str(ROOT / "tools/merge_lora.py"), "--checkpoint", str(one.trained), "--output", str(one.merged)]
        status = attempt(one, one.record, merge, programs)
        if status or not one.result:
            raise StageFailed(one.stage.name, f"merging its adapters ended with exit status {status} and no complete {one.merged}")
    return True


def attempt(one: Planned, record: dict[str, Any], words: Sequence[str], programs: Programs) -> int:
    """Run a program of a stage; what it took is written to the stage's record, also if it fails."""
    write_json(one.folder / RECORD, record)
    start, status = time.monotonic(), None
    try:
        status = programs.run(words, one.folder)
        return status
    finally:
        record["attempts"].append({"seconds": round(time.monotonic() - start, 1), "exit_status": status})
        write_json(one.folder / RECORD, record)


def run_chain(chain: Chain, planned: list[Planned], launcher: list[str], output_dir: Path, programs: Programs) -> int:
    """Run what is not finished; returns the exit status."""
    before, done = None, first_open(planned)
    for number, one in enumerate(planned, 1):
        title = f"== stage {number} of {len(planned)}: {one.stage.name}"
        if number <= done:
            print(f"{title}: finished before{'' if one.result else ', its weights removed since'}", flush=True)
        else:
            print(title, flush=True)
            try:
                done = run_stage(one, before, launcher, programs)
            except StageFailed as error:
                write_report(chain, planned, output_dir, failed=error.stage)
                print(f"error: stage {error.stage}: {error}; the same command goes on from its last checkpoint", file=sys.stderr)
                return 3
            finished = write_report(chain, planned, output_dir)["finished"]
            if not done or (programs.stop_requested and not finished):
                print(f"stopped by a signal at stage {one.stage.name}; start the same command again to continue", flush=True)
                return 0
        before = one
    summary = write_report(chain, planned, output_dir)
    print(f"all {len(planned)} stages finished; weights: {summary['checkpoint']}; page: {output_dir / 'summary.html'}")
    return 0


def show(planned: list[Planned], launcher: list[str], done: int) -> None:
    """The commands that are still to run after the first `done` stages, for --dry_run."""
    before = None
    for number, one in enumerate(planned, 1):
        print(f"== stage {one.stage.name}: {'finished' if number <= done else 'to be trained' if one.result else one.status()}")
        if number <= done:
            before = one.result
            continue
        trained = None if one.result else one.trained  # a result here is one that --restart_from removes
        last = one.folder / f"checkpoints/{f'step_{one.config.training.steps:07d}' if one.config.training.steps else 'LAST_STEP'}"
        if not trained:
            words = training_words(one, str(before) if before else one.config.checkpoint.load)
            print("$", shlex.join([*launcher, "-m", "megatron_longvila.train", *words]))
        if one.merges:
            merge = ["--checkpoint", str(trained or last), "--output", str(one.merged)]
            print("$", shlex.join([sys.executable, str(ROOT / "tools/merge_lora.py"), *merge]))
        before = one.merged if one.merges else last


def choose_launcher(launcher: str | None, num_ranks: int | None) -> tuple[list[str], int, int]:
    """(words of the launcher, ranks it starts, ranks of one host). Raises ValueError if the number of ranks cannot be known."""
    if launcher is None:
        ranks = num_ranks or 1
        local = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return [sys.executable, *(local if ranks > 1 else [])], ranks, ranks
    words = shlex.split(launcher)
    if not words:
        raise ValueError("--launcher is empty; leave it out to start the ranks by torchrun on this host")
    per_host = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", launcher)
    hosts, of_job = count_hosts(words), count_hosts_of_job(words)
    local = int(per_host[1]) if per_host else None
    told = local * (hosts or 1) if local and (hosts or (of_job or 1) == 1) else None
    if num_ranks is None and told is None:
        said = "--nproc_per_node N, and --nodes N of srun in a job of several nodes"
        raise ValueError(f"--launcher {launcher!r} does not say how many ranks it starts ({said}); add --num_ranks N")
    if num_ranks is not None and told is not None and hosts and num_ranks != told:
        raise ValueError(f"--num_ranks {num_ranks} and --launcher {launcher!r}, which starts {told}, differ; leave --num_ranks out")
    ranks = num_ranks or told
    if ranks % (hosts or 1):
        raise ValueError(f"--num_ranks {ranks} must be divisible by the {hosts} hosts of --launcher {launcher!r}; each starts as many")
    if hosts is None and of_job and ranks % of_job == 0:
        hosts = of_job
    return words, ranks, local or ranks // (hosts or 1)


def count_hosts(words: Sequence[str]) -> int | None:
    """Hosts that a launcher names: --nnodes of torchrun, --nodes or -N of srun."""
    text = " ".join(words)
    named = re.search(r"--nnodes[= ](\d+)(?![\d:])", text)
    if named is None and Path(words[0]).name == "srun":
        named = re.search(r" (?:--nodes[= ]|-N ?)(\d+)(?![\d-])", text)
    return int(named[1]) if named else None


def count_hosts_of_job(words: Sequence[str]) -> int | None:
    """Hosts of the Slurm job this runs in, which srun takes if none of its own words, those before the program, says what it starts."""
    nodes = os.environ.get("SLURM_NNODES")
    if Path(words[0]).name != "srun" or not nodes:
        return None
    rest = list(words[1:])
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if re.match(r"--(ntasks|nodelist|nodes)(=|$)|-[nwN]", option):
            return None
        value_follows = "=" not in option if option.startswith("--") else len(option) == 2
        if value_follows and rest and not rest[0].startswith("-"):  # after one that takes none this is the program: not looked into either
            rest.pop(0)
    return int(nodes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--chain", type=Path, required=True, metavar="FILE", help="chain file")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="gets stages/NAME, summary.json and summary.html")
    parser.add_argument("--from_checkpoint", type=Path, metavar="DIR", help="weights the first stage begins with [fresh ones]")
    parser.add_argument("--num_ranks", type=int, metavar="N", help="ranks of each stage, on this host [1]")
    parser.add_argument("--launcher", metavar="'WORDS'", help="starts the ranks in place of torchrun on this host; '-m ...' follows it")
    parser.add_argument("--restart_from", metavar="NAME", help="remove what is done of this stage and of all that follow, first")
    parser.add_argument("--dry_run", action="store_true", help="check, show the commands and change nothing")
    arguments, overrides = parser.parse_known_args(argv)
    output_dir = arguments.output_dir.absolute()
    try:
        launcher, num_ranks, ranks_per_host = choose_launcher(arguments.launcher, arguments.num_ranks)
        chain = read_chain(arguments.chain, overrides)
        start = arguments.from_checkpoint and arguments.from_checkpoint.absolute()
        ranks = {"num_ranks": num_ranks, "ranks_per_host": ranks_per_host}
        planned = plan_chain(chain, output_dir, start, **ranks, restart_from=arguments.restart_from)
        if arguments.dry_run:
            done = first_open(planned)
            if arguments.restart_from:
                done = first_open(planned[: find_stage(planned, arguments.restart_from)])
            check_finished(planned[:done] if arguments.restart_from else planned)
            show(planned, launcher, done)
            return 0
        with locked(output_dir) as lock:
            programs = Programs(lock)
            if arguments.restart_from:
                restart_from(planned, arguments.restart_from)
            for change in check_finished(planned):
                print(change, flush=True)
            return run_chain(chain, planned, launcher, output_dir, programs)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
