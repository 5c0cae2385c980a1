"""Worker processes that can be killed: native decoders hang and crash on bad files, and only a process boundary stops them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

_ORPHAN_GRACE_S = 10.0
_START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Killed:
    """What became of a task whose worker did not live to answer."""

    reason: str


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    task: object = None
    end: float = float("inf")  # monotonic time at which it is killed


def run_tasks(function: Callable, tasks: Iterable, *, num_workers: int, timeout_s: float | None = None) -> Iterator[tuple[object, object]]:
    """(task, function(task)) for every task, in the order they finish; (task, Killed) where the worker crashed or overran `timeout_s`.

    `function` is a top-level function. An exception in it is raised here. Leaving the loop early kills the workers; workers also
    end by themselves when this process is killed, because their pipe breaks.
    """
    # forkserver: workers fork from a clean process without threads (a progress bar has one), quicker than spawn
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    queue = deque(tasks)
    workers: list[_Worker] = []
    try:
        while True:
            while queue and len(workers) < num_workers:
                workers.append(_start(context, function, timeout_s))
            for worker in [worker for worker in workers if worker.task is None]:
                if queue:
                    _give(worker, queue.popleft(), timeout_s)
                else:
                    workers.remove(worker)
                    _stop(worker)
            if not workers:
                return
            next_end = min(worker.end for worker in workers)
            patience_s = None if next_end == float("inf") else max(0.0, next_end - time.monotonic())
            ready = wait([worker.connection for worker in workers], patience_s)
            for worker in list(workers):
                answered = worker.connection in ready
                if answered or time.monotonic() > worker.end:
                    task, worker.task = worker.task, None
                    answer = _collect(worker, answered, timeout_s)
                    if isinstance(answer, Killed):
                        workers.remove(worker)
                    yield task, answer
    finally:
        for worker in workers:
            _stop(worker)


class Assistant:
    """A worker process that is asked one task after the other, by one thread at a time; it starts when it is first asked.

    `function` is a top-level function; what it keeps between tasks (an open file) lives as long as the process.
    """

    def __init__(self, function: Callable, timeout_s: float):
        self._function, self._timeout_s = function, timeout_s
        self._worker: _Worker | None = None

    def ask(self, task: object) -> object:
        """function(task), or Killed where the process crashed or overran the limit; the next task gets a new one. Raises what it raises."""
        if self._worker is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([self._function.__module__])
            self._worker = _start(context, self._function, self._timeout_s)
        worker = self._worker
        _give(worker, task, self._timeout_s)
        answer = _collect(worker, worker.connection.poll(self._timeout_s), self._timeout_s)
        if isinstance(answer, Killed):
            self._worker = None
        return answer

    def close(self) -> None:
        if self._worker is not None:
            _stop(self._worker)
            self._worker = None


def _start(context, function: Callable, timeout_s: float | None) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, timeout_s), daemon=True)
    process.start()
    theirs.close()  # else the pipe would not break when the worker dies
    if not ours.poll(_START_LIMIT_S):  # imports are over when it says so: a task's time starts after them
        process.kill()
        raise RuntimeError(f"a worker process did not start within {_START_LIMIT_S:g} s; the machine may be out of memory or processes")
    try:
        ours.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise RuntimeError(f"a worker process ended with exit code {process.exitcode} before its first task") from None
    return _Worker(process, ours)


def _give(worker: _Worker, task: object, timeout_s: float | None) -> None:
    worker.task = task
    worker.end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    with contextlib.suppress(ConnectionError):  # it died while idle: its pipe reads as ended, and _collect reports that
        worker.connection.send(task)


def _collect(worker: _Worker, answered: bool, timeout_s: float | None) -> object:
    if not answered:
        _stop(worker)
        return Killed(f"took longer than {timeout_s:g} s and was stopped")
    try:
        ok, answer = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
        _stop(worker)
        return Killed(f"crashed its reader ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")
    if not ok:
        raise answer
    return answer


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, function: Callable, timeout_s: float | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # what libraries say about strange files; what matters is in the answer
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        if timeout_s is not None:  # ends a hanging call (SIGALRM's default action) where no parent is left to do it
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
        try:
            answer = (True, function(task))
        except Exception as error:  # handed to the parent, which raises it
            answer = (False, error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(answer)
        except ConnectionError:
            return
