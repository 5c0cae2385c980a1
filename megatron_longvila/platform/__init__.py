"""Device, backend, process group and seeds: the only package that knows whether it runs on CUDA/NCCL or on a CPU/gloo.

Importing this imports torch but not megatron; `platform.mcore` is the door to megatron-core.
"""

from __future__ import annotations

import os
import random
import resource
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def is_cpu() -> bool:
    """True when this process has no CUDA device."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: its CUDA device (set by `init_distributed`), else the CPU."""
    return torch.device("cpu") if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def device_name() -> str:
    """Product name of this rank's CUDA device, `cpu` without one."""
    return "cpu" if is_cpu() else torch.cuda.get_device_name(device())


def backend() -> str:
    """`nccl` on CUDA, `gloo` on a CPU."""
    return "gloo" if is_cpu() else "nccl"


def init_distributed(timeout_s: float) -> None:
    """Join the job torchrun started, or make a job of one rank when started by plain python.

    `timeout_s` bounds every collective of the default group; megatron's groups get it from parallel/groups.py.
    Raises ValueError if this host has fewer CUDA devices than local ranks.
    """
    timeout = timedelta(seconds=timeout_s)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not is_cpu():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} needs CUDA device {local_rank}, but this host shows {torch.cuda.device_count()}; "
                "lower --nproc_per_node or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
    # No device_id: with it every group connects when it is made, and Megatron makes some twenty of which a job uses half.
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
        return
    # A lone process has nobody to meet: a store in its own memory needs neither a port nor a file.
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def limit_collectives(timeout_s: float) -> None:
    """Change what bounds every collective of the default group from now on. Every rank calls it."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))


def shutdown_distributed() -> None:
    """Leave the job; harmless when none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def collectives_begun() -> int:
    """Collectives that this rank has begun so far on all its groups: two waits with different numbers are different waits."""
    groups = list(dist.distributed_c10d._world.pg_map)  # at once: another thread may be making groups
    return sum(group._get_sequence_number_for_group() for group in groups)


def synchronize() -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if not is_cpu():
        torch.cuda.synchronize()


def upload(values: torch.Tensor, to: torch.device) -> torch.Tensor:
    """`values`, a CPU tensor, on `to`; the tensor itself where that is the CPU.

    The host does not wait for what it gave the device to do before, as it would in a copy out of pageable memory.
    """
    return values.pin_memory().to(to, non_blocking=True) if to.type == "cuda" else values.to(to)


def seed(seed: int, pp_rank: int) -> None:
    """Seed python, numpy, torch and Megatron's RNG tracker. Needs megatron's parallel state.

    Pipeline stages differ (as in Megatron-LM, 100 apart); the other ranks of a stage agree, because with CPU initialisation each tp rank
    draws the whole weight and keeps its slice: different seeds would give inconsistent weights without any error.
    """
    from megatron_longvila.platform import mcore

    stage_seed = seed + 100 * pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    mcore.seed_tracker(stage_seed)


def rng_state() -> dict[str, Any]:
    """Every random state `seed` touched, for the checkpoint of the same layout."""
    from megatron_longvila.platform import mcore

    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "tracker": mcore.tracker_states()}
    if not is_cpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. Raises ValueError if it was taken on the other kind of device."""
    from megatron_longvila.platform import mcore

    if ("cuda" in state) == is_cpu():
        taken = "a CUDA device" if "cuda" in state else "a CPU"
        raise ValueError(f"the random state was saved on {taken} and this process runs on {device()}; drop the random state to continue")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    mcore.set_tracker_states(state["tracker"])
    if not is_cpu():
        torch.cuda.set_rng_state(state["cuda"])


def memory_gib() -> float:
    """Peak memory of this rank in GiB: allocated by torch on CUDA, resident on a CPU."""
    if not is_cpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
