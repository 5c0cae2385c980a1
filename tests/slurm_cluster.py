"""A throw-away Slurm cluster on this machine, from Debian's packages: virtual nodes; no systemd, no cgroups, no file outside a folder."""

from __future__ import annotations

import contextlib
import copy
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue")
PAIRS, CPUS, GRACE_S = 3, 4, 120

# proctrack/pgid: a signal reaches the agent of a step and none of its ranks, each of which torchrun starts in a session of its own. So it
# is with the cgroups of a real cluster, too. GPUs are devices that every machine has; the jobs that ask for them compute on the CPU.
# cred_expire: a requeued job waits so long before it starts again (120 s by default). The grace time is long because a job that has saved
# itself leaves early; SlurmdTimeout is how long a lost node stays unnoticed.
CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/run/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=00:00:00
KillWait=30
MinJobAge=86400
FirstJobId={first_job}
SlurmctldTimeout=60
SlurmdTimeout=20
InactiveLimit=0
{nodes}
"""
PAIR = """
PartitionName=main{pair} Nodes={names} MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent{pair} Nodes={names} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm and munge this machine lacks."""
    places = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=places) is None]


class Cluster:
    """Two virtual nodes with a partition for jobs and one whose jobs preempt those.

    There are several such pairs, that tests which mostly wait can run side by side; `pair` is the same cluster seen from another one.
    """

    def __init__(self, folder: Path):
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.all_names = [f"vn{number}" for number in range(1, 2 * PAIRS + 1)]
        self.number, self.names = 0, self.all_names[:2]
        self._daemons: dict[str, subprocess.Popen] = {}

    def pair(self, number: int) -> Cluster:
        """This cluster from its pair `number` of nodes; 0 is the first."""
        other = copy.copy(self)
        other.number, other.names = number, self.all_names[2 * number : 2 * number + 2]
        return other

    @property
    def partition(self) -> str:
        return f"main{self.number}"

    def environment(self, **more: object) -> dict[str, str]:
        """Of Slurm's commands and of the jobs: gloo on the loopback device, this interpreter, this checkout."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "LONGVILA_"))}
        own = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(self.conf),
            "SBATCH_PARTITION": self.partition,
            "LONGVILA_ROOT": str(ROOT),
            "LONGVILA_PYTHON": sys.executable,
            "LONGVILA_RANKS_PER_NODE": "2",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        return clean | own | {name: str(value) for name, value in more.items()}

    def start(self) -> None:
        """Daemons in the foreground, as children of this process. RuntimeError with their logs if the nodes do not become idle."""
        for name in ("state", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        os.chmod(self.folder, 0o755)  # munged wants its socket where everybody can reach it
        os.chmod(self.folder / "run", 0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        socket_path, log = self.folder / "run/munge.sock", self.folder / "log"
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}",
            f"--pid-file={self.folder}/run/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={self.folder}/run/munge.seed",
        )  # fmt: skip
        self.conf.write_text(self._configuration())
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        self._until(socket_path.exists, "munged opens its socket", 20)
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", self.conf)
        for name in self.all_names:
            self.start_node(name)
        self._until(lambda: self.idle() == len(self.all_names), "all nodes are idle", 60)

    def stop(self) -> None:
        """Cancel all jobs, end the daemons by the process ids known since their start, and whatever of the jobs is still there."""
        if "slurmctld" in self._daemons:
            for job in set(self.run("squeue", "-h", "-o", "%A", check=False).split()):
                self.run("scancel", "--full", "--signal=KILL", job, check=False)
        for name in (*self.all_names, "slurmctld", "munged"):
            self._end(name)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def start_node(self, name: str) -> None:
        (self.folder / "run" / f"spool-{name}").mkdir(exist_ok=True)
        self._spawn(name, "slurmd", "-D", "-N", name, "-f", self.conf)

    def lose_node(self, name: str) -> None:
        """What a power failure does: the node's daemon and everything its jobs run there end at once."""
        self._daemons.pop(name).kill()
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                for above in process.parents():
                    if above.name() == "slurmstepd":
                        above.kill()
                process.kill()

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """What the jobs run on one node, or everything that belongs to this cluster and is no daemon."""
        found, daemons = [], {daemon.pid for daemon in self._daemons.values()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == str(self.conf) and process.pid not in daemons
                if ours and node in (None, environment.get("SLURMD_NODENAME")):
                    found.append(process)
        return found

    def run(self, *words: object, check: bool = True, cwd: Path | None = None, timeout_s: float = 120, **environment: object) -> str:
        """A command's standard output and error. AssertionError with both if it fails."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment(**environment), cwd=cwd or self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def idle(self) -> int:
        """Nodes that wait for work; 0 as well while Slurm does not answer yet."""
        return len(set(re.findall(r"^vn\d+$", self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False), re.MULTILINE)))

    def submit(self, *words: object, **environment: object) -> int:
        """sbatch; returns the job's number."""
        return int(self.run("sbatch", "--parsable", *words, **environment).strip())

    @contextlib.contextmanager
    def grace(self, seconds: int) -> Iterator[None]:
        """Inside, a preempted job has so long to leave, and KillWait, instead of GRACE_S."""
        self.run("scontrol", "update", f"PartitionName={self.partition}", f"GraceTime={seconds}")
        try:
            yield
        finally:
            self.run("scontrol", "update", f"PartitionName={self.partition}", f"GraceTime={GRACE_S}")

    def preempt(self, seconds: float = 1.0) -> int:
        """Take both nodes for a moment by a job of higher priority."""
        words = (f"--partition=urgent{self.number}", "--nodes=2", f"--cpus-per-task={CPUS}", "--output=/dev/null")
        return self.submit(*words, f"--wrap=sleep {seconds}")

    def show(self, job: int | str) -> dict[str, str]:
        """Fields of `scontrol show job`; a task of an array is "12_0"."""
        text = self.run("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text)) | dict(re.findall(r"^ +(Std\w+)=(.*)$", text, re.MULTILINE))  # paths with spaces

    def wait(self, job: int | str, *states: str, timeout_s: float = 400.0) -> dict[str, str]:
        """The job's fields once it is in one of `states`. AssertionError with its log when it ends otherwise or takes too long."""
        deadline = time.monotonic() + timeout_s
        while (facts := self.show(job))["JobState"] not in states:
            over = facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") or time.monotonic() > deadline
            assert not over, f"job {job} is {facts['JobState']} ({facts['Reason']}), wanted {states}:\n{self.log(facts)}"
            time.sleep(0.3)
        return facts

    def log(self, facts: dict[str, str]) -> str:
        """What a job wrote, and the end of the controller's log."""
        path = Path(facts["StdOut"])
        own = path.read_text(errors="replace") if path.is_file() else ""
        return own + "\n--- controller\n" + (self.folder / "log/slurmctld.log").read_text()[-3000:]

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(len(self.all_names) + 1)
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.1.{number} Port={ports[number]} CPUs={CPUS} RealMemory=4000 "
            "Gres=gpu:2 State=UNKNOWN"
            for number, name in enumerate(self.all_names, 1)
        ]
        pairs = [PAIR.format(pair=number, names=",".join(self.pair(number).names), grace=GRACE_S) for number in range(PAIRS)]
        text = CONF.format(
            host=host, controller_port=ports[0], user=pwd.getpwuid(os.getuid()).pw_name, folder=self.folder,
            first_job=os.getpid() % 1900 + 1,  # the ports of the jobs follow from it, and another cluster may run beside
            nodes="\n".join(lines),
        )  # fmt: skip
        return text + "".join(pairs)

    def _spawn(self, name: str, *words: object) -> None:
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            self._daemons[name] = subprocess.Popen(
                list(map(str, words)), env=self.environment(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _until(self, done, what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.folder / "log").iterdir()))
                raise RuntimeError(f"not within {timeout_s} s: {what}\n{logs}")
            time.sleep(0.2)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that is up, and down afterwards."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> Sequence[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
