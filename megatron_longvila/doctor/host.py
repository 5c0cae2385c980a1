"""Checks of one host: software, devices, codecs, disks, limits, clock. None of them changes anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform as python_platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_longvila.doctor.finding import NOTE, OK, PROBLEM, Finding, problem_if
from megatron_longvila.platform import hardware

GIB, MIB = 2**30, 2**20
TESTED = {"torch": ("2.11", "2.14"), "megatron-core": ("0.16.1", "0.16.2")}  # from, below
PROGRAM_LIMIT_S = 120
NO_LIMIT = 1 << 60  # what version 1 of control groups says instead of nothing is above this


def check_host(paths: list[Path], disk_bytes: int, ranks: int | None = None) -> list[Finding]:
    """Every check of this host.

    Args:
        paths: the folders whose file systems are measured with `disk_bytes` each.
        ranks: of the job on this host; None: one for each device.
    """
    found: list[Finding] = []
    for check in (check_software, check_devices, check_links, check_optional, check_codecs, partial(check_limits, ranks), check_clock):
        found += check()
    for path in dict.fromkeys(paths):
        found += check_disk(path, disk_bytes)
    return found


def check_software() -> Iterator[Finding]:
    """Versions against those that are tested."""
    yield problem_if(
        sys.version_info[:2] not in ((3, 11), (3, 12)),
        "python",
        python_platform.python_version(),
        "use Python 3.11 or 3.12",
    )
    for name, (first, below) in TESTED.items():
        version = installed(name)
        fits = version is not None and number(first) <= number(version) < number(below)
        yield problem_if(not fits, name, version or "not installed", f"install {name} >= {first}, < {below} (bash tools/install.sh)")


def check_devices() -> Iterator[Finding]:
    """CUDA devices, what uses them, and the libraries torch drives them with."""
    devices = hardware.devices()
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not devices:
        remedy = "training runs on the CPU with gloo, for tests alone"
        if driver and hardware.built_for_cuda() is None:
            remedy = "the driver is there but this torch is built without CUDA: install torch from the CUDA index"
        elif driver:
            remedy = "the driver is there but no device is visible: look at CUDA_VISIBLE_DEVICES, --gpus of the job, nvidia-smi"
        yield Finding("devices", PROBLEM if driver else NOTE, "no CUDA device", remedy)
        return
    names = {device["name"] for device in devices}
    yield problem_if(
        len(names) > 1, "devices", f"{len(devices)} x {', '.join(sorted(names))}", "mixed devices run at the pace of the slowest one", NOTE
    )
    for index, device in enumerate(devices):
        busy = device["used"] > 0.1 * device["total"]
        value = f"{index}: {device['used'] / GIB:.1f} of {device['total'] / GIB:.0f} GiB used, capability {device['capability']}"
        yield problem_if(busy, "memory", value, "another process holds memory there: find it with nvidia-smi and end it")
    for name, version in hardware.library_versions().items():
        yield problem_if(version is None, name, version or "missing", f"this torch has no {name}: install the CUDA build of torch")
    yield from check_errors()


def check_errors() -> Iterator[Finding]:
    """Memory errors and throttling as the driver counts them."""
    fields = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,temperature.gpu"
    lines = run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    if lines is None:
        yield Finding("health", NOTE, "nvidia-smi gives no answer", "memory errors and throttling cannot be seen")
        return
    for line in lines.splitlines():
        index, errors, slowed, degrees = (field.strip() for field in line.split(","))
        bad = (errors.isdigit() and int(errors) > 0) or slowed == "Active"
        value = f"{index}: uncorrected memory errors {errors}, slowed down by hardware: {slowed}, {degrees} C"
        yield problem_if(bad, "health", value, "reset the device or drain the node; throttling: check cooling and power")


def check_links() -> Iterator[Finding]:
    """NVLink between the devices of this host and InfiniBand ports to others."""
    if len(hardware.devices()) > 1:
        apart = hardware.peer_access()
        yield problem_if(
            bool(apart), "peer access", f"{len(apart)} pairs without" if apart else "every pair",
            "these devices talk through host memory: check the topology (nvidia-smi topo -m), ACS and the container's devices",
        )  # fmt: skip
        status = run(["nvidia-smi", "nvlink", "--status"])
        links = 0 if status is None else status.count("GB/s")
        yield problem_if(links == 0, "NVLink", f"{links} links up", "keep ulysses_size small: its exchanges go over PCIe", NOTE)
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    for port in ports:
        state, rate = (port / name for name in ("state", "rate"))
        said = f"{port.parts[-3]}: {state.read_text().strip()}, {rate.read_text().strip()}"
        yield problem_if("ACTIVE" not in said, "InfiniBand", said, "NCCL leaves an inactive port out: check cable and subnet manager")
    if not ports:
        yield Finding("InfiniBand", OK, "none; NCCL uses TCP between hosts")


def check_optional() -> Iterator[Finding]:
    """Packages that are faster where they are installed; each is imported in a process of its own, which a broken one may take down."""
    for name, module, remedy in (
        ("TE", "transformer_engine.pytorch", "for fused layers: pip install transformer-engine[pytorch], built for this torch"),
        (
            "apex",
            "apex.optimizers; apex.optimizers.FusedAdam",
            "for its fused Adam: build NVIDIA's from source; PyPI's is another one",
        ),
        ("triton", "triton", "for the fused kernels: pip install triton"),
        ("py-spy", "", "for stacks of stuck ranks: pip install py-spy"),
    ):
        if not module:
            path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
            yield Finding(name, OK, path) if path else Finding(name, NOTE, "not installed", remedy)
            continue
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None:
            yield Finding(name, NOTE, "not installed", remedy)
            continue
        done = start([sys.executable, "-c", f"import {module}"])
        version = installed(package) or installed(name) or "there"
        broken = f"cannot be imported: {last_line(done)}; uninstall it, or install the build for this torch"
        yield problem_if(done.returncode != 0, name, version, broken)


def check_codecs() -> Iterator[Finding]:
    """What PyAV decodes."""
    reinstall = "install PyAV from its wheel (pip install --force-reinstall av): it carries these codecs"
    done = start([sys.executable, "-m", "megatron_longvila.doctor.codecs"])
    if done.returncode != 0:
        yield Finding("codecs", PROBLEM, last_line(done), reinstall)
        return
    said = json.loads(done.stdout)
    works = [name for name, wrong in said.items() if not wrong]
    fails = [f"{name}: {wrong}" for name, wrong in said.items() if wrong]
    value = f"PyAV {installed('av')}: {', '.join(works)}" + (f"; not {'; '.join(fails)}" if fails else "")
    yield problem_if(bool(fails), "codecs", value, reinstall)


def check_limits(ranks: int | None = None) -> Iterator[Finding]:
    """Shared memory, open files, locked memory, memory and processors of the job, which has `ranks` here."""
    shm = os.statvfs("/dev/shm")
    room = shm.f_bavail * shm.f_frsize
    yield problem_if(
        room < GIB, "/dev/shm", f"{room / GIB:.2f} GiB free",
        "NCCL and forked writers need it: docker --shm-size=16g (or --ipc=host), Enroot/Apptainer mount the host's; remove leftovers",
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield problem_if(soft < 4096, "open files", f"{soft} (hard {hard})", "ulimit -n 65536 in the batch script, or LimitNOFILE of slurmd")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    has_fabric = any(Path("/sys/class/infiniband").glob("*"))
    yield problem_if(
        not unlimited and has_fabric, "memlock", "unlimited" if unlimited else f"{locked / MIB:.2f} MiB",
        "InfiniBand needs to lock memory: ulimit -l unlimited, LimitMEMLOCK=infinity of slurmd, docker --ulimit memlock=-1",
    )  # fmt: skip
    cpus = len(os.sched_getaffinity(0))
    ranks = ranks or len(hardware.devices()) or 1
    yield problem_if(
        cpus < 2 * ranks, "processors", f"{cpus} for {ranks} ranks", "decoding threads need 4 or more each: raise --cpus-per-task", NOTE
    )
    limit = memory_limit(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    if limit is not None:
        yield Finding("memory limit", OK, f"{limit / GIB:.1f} GiB for this job")


def memory_limit(groups: str, root: Path) -> int | None:
    """The lowest limit in bytes on the way from this process's control group to the top, None without one.

    Args:
        groups: /proc/self/cgroup: lines number:controllers:path; version 2 has one, 0::path, version 1 one for the memory controller.
        root: where the groups are mounted.
    """
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (root, "memory.max") if controllers == "" else (root / "memory", "memory.limit_in_bytes")
        place = top / path.strip("/")
        for folder in (place, *place.parents):
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            if text != "max" and int(text) < NO_LIMIT:
                found.append(int(text))
            if folder == top:
                break
    return min(found, default=None)


def check_clock() -> Iterator[Finding]:
    """Whether something keeps this host's clock right; between hosts the offset is measured."""
    said = run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if said is None:
        yield Finding("clock", OK, f"{now}; whether it is synchronised cannot be seen here")
        return
    yield problem_if(said.strip() != "yes", "clock", f"{now}, synchronised: {said.strip()}", "start chronyd or systemd-timesyncd", NOTE)


def check_disk(path: Path, count: int) -> Iterator[Finding]:
    """Room in `path`, its speed with `count` bytes written, synced and read back, and what replacing a small file costs."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        what = "cannot be written" if path.is_dir() else "is not there"
        yield Finding("disk", PROBLEM, f"{path} {what}", "create it, or ask for the rights")
        return
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    room = f"{path}: {free / GIB:.1f} GiB free"
    if free < 2 * count:
        yield Finding("disk", PROBLEM, room, "make room: a checkpoint takes 14 to 18 bytes per parameter, and two must fit")
        return
    write_s, read_s, replace_s = disk_times(path, count)
    speeds = f"writes {count / write_s / MIB:.0f} MiB/s, reads {count / read_s / MIB:.0f} MiB/s"
    value = f"{room}, {speeds}, replaces a file in {replace_s * 1e3:.2f} ms"
    slow = count / write_s < 50 * MIB or replace_s > 0.1
    remedy = "a save and every heartbeat wait for it: use another file system for output_dir, or checkpoint.async_save"
    yield problem_if(slow, "disk", value, remedy)


def disk_times(path: Path, count: int) -> tuple[float, float, float]:
    """Seconds to write and sync `count` bytes, to read them back past the page cache where the system lets go of it, to replace a file."""
    descriptor, name = tempfile.mkstemp(prefix=".doctor.", dir=path)  # one of its own: hosts share disks
    os.close(descriptor)
    file, block = Path(name), os.urandom(MIB)
    try:
        start = time.perf_counter()
        with open(file, "wb") as stream:
            for _ in range(count // MIB):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            write_s = time.perf_counter() - start
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with open(file, "rb") as stream:
            while stream.read(MIB):
                pass
        read_s = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(20):
            temporary = file.with_name(file.name + ".new")
            temporary.write_text("x" * 300)
            os.replace(temporary, file)
        return write_s, read_s, (time.perf_counter() - start) / 20
    finally:
        file.unlink(missing_ok=True)


def installed(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def number(version: str) -> tuple[int, ...]:
    """A version as numbers: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(piece) for piece in version.split("+")[0].split(".") if piece.isdigit())


def start(words: list[str]) -> subprocess.CompletedProcess:
    """Run a program to its end; past the limit its exit code is 124."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"no answer within {PROGRAM_LIMIT_S} s")


def run(words: list[str]) -> str | None:
    """Output of a program, None if it is missing or fails."""
    done = start(words) if shutil.which(words[0]) else None
    return done.stdout if done is not None and done.returncode == 0 else None


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a program said last before it failed."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def check_speed(tflops: dict[int, float | None]) -> Iterator[Finding]:
    """Matrix products by rank: a device far below the others holds every step back."""
    measured = {rank: value for rank, value in tflops.items() if value is not None}
    if not measured:
        return
    median = sorted(measured.values())[len(measured) // 2]
    slow = {rank: value for rank, value in measured.items() if value < 0.85 * median}
    value = f"bf16 products: {min(measured.values()):.0f} to {max(measured.values()):.0f} TFLOP/s"
    if slow:
        value += f"; slow ranks: {', '.join(f'{rank} ({value:.0f})' for rank, value in slow.items())}"
    yield problem_if(bool(slow), "speed", value, "look for throttling (nvidia-smi -q -d PERFORMANCE), or leave the host out")
