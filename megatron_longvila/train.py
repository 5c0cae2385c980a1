"""The one entry point of every training stage.

    torchrun --nproc_per_node 4 -m megatron_longvila.train --config examples/models/qwen2_7b_siglip_448.yaml --config STAGE.yaml [flags]

The command line is parsed and checked before torch is imported: `--help` is quick, and a mistake costs no GPU time.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_longvila import watch
from megatron_longvila.config import Config
from megatron_longvila.config_check import check_device, check_inputs, refuse, resolve
from megatron_longvila.config_io import load, parse
from megatron_longvila.pulse import MARKER, Pulse, forget_earlier, read_records

PROGRAM = "python -m megatron_longvila.train"


def configure(argv: Sequence[str], *, world_size: int, gpus_per_host: int) -> Config:
    """The checked configuration of a command line with the mesh resolved. Raises ValueError for what a user did wrong."""
    return settle(parse(argv, prog=PROGRAM), world_size=world_size, gpus_per_host=gpus_per_host)


def settle(config: Config, *, world_size: int, gpus_per_host: int) -> Config:
    """`config` checked and with the mesh resolved. Raises ValueError as `configure`."""
    config = resolve(continue_mesh(config), world_size=world_size, gpus_per_host=gpus_per_host)
    check_inputs(config)
    if config.data.mixture:
        from megatron_longvila.data.training_data import check_mixture

        check_mixture(config.data)
    return config


def continue_mesh(config: Config) -> Config:
    """`config` with the cp axes of the run it resumes where it says `auto`, unless the sizes it gives differ from that run."""
    saved = Path(config.output_dir, "config.yaml")
    if not config.checkpoint.resume or not saved.is_file():
        return config
    now, before = config.parallel, load(saved).parallel
    axes = ("tp_size", "pp_size", "cp_size", "ulysses_size", "ring_size")
    if any(getattr(now, axis) not in ("auto", getattr(before, axis)) for axis in axes):
        return config
    return replace(config, parallel=replace(now, **{axis: getattr(before, axis) for axis in axes}))


def start_logging(rank: int) -> None:
    """Live lines of rank 0 and warnings of every rank, on standard output."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("megatron_longvila")
    package.addHandler(handler)
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


def log_path(run_dir: Path, rank: int) -> Path:
    """Where everything a rank says is kept."""
    return run_dir / "logs" / f"rank_{rank:05d}.log"


def check_alone(run_dir: Path, rank: int, limit_s: float = 30.0) -> None:
    """Refuse to train beside another job in the same folder: each would remove what the other is writing.

    Only a rank of the same host can be looked for. One that is about to end is given `limit_s`. Raises ValueError.
    """
    beat = read_records(run_dir, "beat", ranks=[rank]).get(rank)
    if beat is None or beat["host"] != host_name() or beat["pid"] == os.getpid():
        return
    deadline = time.monotonic() + limit_s
    while holds_open(beat["pid"], log_path(run_dir, rank)):  # its number alone may be another process's by now
        if time.monotonic() > deadline:
            raise ValueError(
                f"output_dir={run_dir} is in use: process {beat['pid']} on this host trains there as rank {rank}; "
                "end it or wait for it, or choose another output_dir"
            )
        time.sleep(0.2)


def holds_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; no for one that is gone or of another user."""
    try:
        return any(os.path.realpath(link) == os.path.realpath(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def open_log_file(run_dir: Path, rank: int) -> None:
    """Everything this rank says, with dates, also in RUN/logs/rank_00003.log; a resumed run goes on in the same file."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("megatron_longvila")
    for console in package.handlers:
        console.setLevel(package.level)  # what the console shows stays what it was
    package.addHandler(handler)
    package.setLevel(logging.DEBUG)
    for other in (logging.getLogger(), logging.getLogger("py.warnings")):
        other.addHandler(handler)
    package.info("rank %d of %s starts on %s, pid %d", rank, os.environ.get("WORLD_SIZE", "1"), host_name(), os.getpid())


def host_name() -> str:
    """What the scheduler calls this host, else what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def take_pulse(config: Config, local_world_size: int) -> Pulse:
    """This rank's log file and heartbeat, and on the first rank of a host the watch over its ranks."""
    run_dir, rank = Path(config.output_dir), int(os.environ.get("RANK", "0"))
    check_alone(run_dir, rank)
    if rank == 0:
        forget_earlier(run_dir, int(os.environ.get("WORLD_SIZE", "1")))
    open_log_file(run_dir, rank)
    watch.allow_debugger()
    pulse = Pulse(run_dir, rank, host_name(), timeout_s=config.parallel.timeout_s)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        watch.start(run_dir, host_name(), range(rank, rank + local_world_size), config.parallel.timeout_s)
    return pulse


def hold_requests() -> None:
    """Let a request to stop wait until training can follow it.

    SIGTERM is held where a launcher has it ignored (a batch script does that, so that torchrun does not end its ranks): it is a request
    there, and would be lost. Elsewhere it goes on ending a program that has nothing to save yet.
    """
    held = {signal.SIGUSR1}
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        held.add(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, held)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, train. A configuration error is one line on stderr and exit code 1."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    gpus_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)  # before the mesh is chosen, which says why
    hold_requests()
    try:
        config = parse(sys.argv[1:] if argv is None else argv, prog=PROGRAM)
        if rank == 0 and config.output_dir:  # an empty one is refused below, and would be the current folder here
            Path(config.output_dir, MARKER).unlink(missing_ok=True)  # also if this job is refused: it has not stopped after a save
        config = settle(config, world_size=world_size, gpus_per_host=gpus_per_host)
        check_device(config)
        pulse = take_pulse(config, gpus_per_host)
    except (ValueError, OSError) as error:
        refuse(error, int(os.environ.get("LOCAL_RANK", "0")))
    if config.parallel.tp_size > 1:
        # One queue to the GPU: Megatron's tensor-parallel collectives overlap with the matrix products only if they start in program order.
        # Only CUDA reads it, once, when it starts: it must be set before torch is imported.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.parallel.ring_size > 1:
        # A transfer that starts beside a running attention kernel must not wait until the last block of that kernel has found its place.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    try:
        from torch.distributed.elastic.multiprocessing.errors import record

        from megatron_longvila.training.loop import train

        # torchrun ends every rank when one fails; `record` leaves the traceback of that rank where torchrun's summary looks for it.
        record(train)(config, pulse)
    except BaseException as error:
        pulse.fail(error)
        logging.getLogger("megatron_longvila").debug("ended by an exception", exc_info=True)  # for the file: the console gets it anyway
        raise
    pulse.end()


if __name__ == "__main__":
    main()
