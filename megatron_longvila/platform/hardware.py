"""What this process sees of its machine's accelerators and communication libraries, for the doctor."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_longvila import platform

_MATMUL_SIZE, _MATMUL_TIMES = 8192, 20


def devices() -> list[dict[str, Any]]:
    """Name, memory in bytes (total, used by others and by this process), and compute capability of every visible CUDA device."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": facts.name, "total": total, "used": total - free, "capability": f"{facts.major}.{facts.minor}"})
    return found


def built_for_cuda() -> str | None:
    """The CUDA version torch was built for, None for a build without CUDA."""
    return torch.version.cuda


def peer_access() -> list[tuple[int, int]]:
    """Pairs of visible devices that cannot reach each other's memory."""
    count = torch.cuda.device_count()
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    return [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]


def library_versions() -> dict[str, str | None]:
    """cuDNN and NCCL as torch was built with and finds them; None where it has none."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and dist.is_nccl_available() else None
    return {"cuDNN": cudnn and f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}", "NCCL": nccl}


def matmul_tflops() -> float | None:
    """bf16 matrix products of this rank's device in TFLOP/s; None on a CPU."""
    if platform.is_cpu():
        return None
    a = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, dtype=torch.bfloat16, device=platform.device())
    for _ in range(3):
        a @ a
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(_MATMUL_TIMES):
        a @ a
    platform.synchronize()
    return 2 * _MATMUL_SIZE**3 * _MATMUL_TIMES / (time.perf_counter() - start) / 1e12


def cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """A group of all ranks for CPU tensors and small objects, whatever the job's backend, with a limit of its own. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
