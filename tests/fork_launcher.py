"""What torchrun does on one host, in half the processor time: `python fork_launcher.py NUM_RANKS -m MODULE ARGUMENTS...` imports torch and
Megatron once and forks the ranks. The first rank that fails ends all of them; the exit status is then 1."""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import signal
import socket
import sys
from typing import NoReturn

import torch.distributed as dist

import megatron_longvila.training.loop  # noqa: F401  (what every rank needs: forked ranks share it)


def main() -> NoReturn:
    num_ranks, module, arguments = int(sys.argv[1]), sys.argv[3], sys.argv[4:]
    assert sys.argv[2] == "-m", sys.argv
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    gc.collect()
    gc.freeze()  # the ranks' collections leave the shared pages alone
    ranks = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            listener.close()
            become_rank(rank, num_ranks, port)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__")
            leave(0)
        ranks.add(pid)
    # The port is taken before the forks, so that no other program gets it; the store, which is a thread, begins after them.
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    status = wait(ranks)
    del store
    leave(status)


def wait(ranks: set[int]) -> int:
    """Wait for these children; kill those that are left when one fails. The exit status for the launcher."""
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            return 1
    return 0


def leave(status: int) -> NoReturn:
    """End this process without taking the interpreter apart, which takes as long as a tiny training."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def become_rank(rank: int, num_ranks: int, port: int) -> None:
    """The environment torchrun gives a rank; the store is the launcher's."""
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


if __name__ == "__main__":
    main()
