"""Attention over ranks against attention on one, with the real kernels and NCCL, at lengths where transfers and kernels overlap.

    torchrun --nproc_per_node 2 tests/gpu/attention_ranks_gpu.py

Every rank holds all rows, computes the whole attention by itself, then its rows of it together with the others, several times with some
ranks late by turns: a buffer that is read before it was received, or written before it was sent, shows as a block of rows far off. A
last time the host must not wait for the device. Prints one line per mesh and pack; the exit code is 1 if any line fails. On a CPU it runs
toys in fp32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.attention import ulysses  # noqa: E402
from megatron_longvila.attention.attention_2d import attention_2d, packed_attention_2d  # noqa: E402
from megatron_longvila.attention.backends import get_backend  # noqa: E402
from megatron_longvila.attention.ring import RingCall  # noqa: E402
from megatron_longvila.kernels.choice import get_kernels  # noqa: E402
from megatron_longvila.mesh import Mesh, rank_groups  # noqa: E402
from megatron_longvila.parallel.plan import SequenceLayout, owned_rows, pad_samples  # noqa: E402

NAMES = ("out", "dq", "dk", "dv")
LATE_CYCLES = 10_000_000  # about 5 ms of a GPU
# Both sides round to bf16: the output once, gradients also their probabilities and those' gradients, 2**-9 each. fp32 on a CPU.
BOUNDS = {torch.bfloat16: 6 * 2**-9, torch.float32: 1e-5}


def meshes(size: int) -> Iterator[tuple[str, int, int, dict]]:
    """(name, ulysses, ring, how the ring sends or how many parts ulysses takes) of every mesh of all ranks."""
    for ulysses_size in (divisor for divisor in range(size, 0, -1) if size % divisor == 0):
        ring_size = size // ulysses_size
        if ring_size == 1:
            yield from ((f"ulysses{ulysses_size} parts{parts}", ulysses_size, 1, {"parts": parts}) for parts in (1, 2, 4))
            continue
        for transport, crosses_hosts in (("all_gather", False), ("p2p", False), ("p2p", True)):
            ring = {"transport": transport, "crosses_hosts": crosses_hosts}
            yield f"ulysses{ulysses_size} ring{ring_size} {transport}{' hosts' * crosses_hosts}", ulysses_size, ring_size, ring


@cache
def groups(ulysses_size: int, ring_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's (ulysses, ring) groups."""
    mesh, mine = Mesh(dist.get_world_size(), 1, 1, ulysses_size, ring_size), []
    for axis in ("ulysses", "ring"):
        made = [(ranks, dist.new_group(ranks)) for ranks in rank_groups(mesh.axes, axis)]
        mine.append(next(group for ranks, group in made if dist.get_rank() in ranks))
    return tuple(mine)


def worst_block(value: Tensor, right: Tensor, rows: int) -> float:
    """Largest ||value - right|| / ||right|| of a run of rows; a hundredth of the largest norm forgives what is nearly zero."""
    error, scale = (torch.stack([part.float().norm() for part in x.split(rows)]) for x in (value.float() - right.float(), right))
    ratio = error / (scale + 0.01 * scale.max())
    return math.inf if ratio.isnan().any() else ratio.max().item()


def step(tensors: list[Tensor], call: RingCall, group: dist.ProcessGroup | None, parts: int | None, packed: bool) -> list[Tensor]:
    """[out, dq, dk, dv]; `packed`: from the send buffers, as the fused kernel hands them over."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    with mock.patch("megatron_longvila.attention.attention_2d.num_parts", lambda *_: parts):
        if packed:
            buffers = ulysses.pack_heads((q, k, v), call.layout.ulysses_size, parts)
            out = packed_attention_2d(buffers, q.shape[1] // k.shape[1], call, group)
        else:
            out = attention_2d(q, k, v, call, group)
        out.backward(tensors[3])
    return [out.detach(), q.grad, k.grad, v.grad]


def waits_for_device(run: Callable[[], object]) -> str:
    """What torch says where `run`, which ran before, lets the host wait for the GPU; '' if it never does."""
    if platform.is_cpu():
        return ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return f" waits for the device: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def check(heads: tuple[int, int], lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype, repeats: int, block: int) -> int:
    """Compare every mesh; returns how many fail."""
    device, scale, failures = platform.device(), 1 / math.sqrt(head_dim), 0
    backend, kernels = get_backend("auto"), get_kernels("auto", device)
    for name, ulysses_size, ring_size, how in meshes(dist.get_world_size()):
        parts = how.get("parts")
        if heads[1] % (ulysses_size * (parts or 1)):
            continue
        layout = pad_samples(lengths, ulysses_size=ulysses_size, ring_size=ring_size)
        generator = torch.Generator(device).manual_seed(0)
        whole = [torch.randn(layout.total_rows, n, head_dim, generator=generator, device=device).to(dtype) for n in (*heads, heads[1])]
        whole.append(torch.randn(whole[0].shape, generator=generator, device=device).to(dtype))
        alone = RingCall(SequenceLayout(1, 1, layout.sample_lengths), 0, None, "all_gather", backend, scale, kernels)
        right = step(whole, alone, None, None, packed=False)
        rows = torch.from_numpy(owned_rows(layout)[dist.get_rank()]).to(device)
        mine, right = [x[rows] for x in whole], [x[rows] for x in right]
        del whole
        group, ring = groups(ulysses_size, ring_size)
        sending = how.get("transport", "all_gather"), backend, scale, kernels, how.get("crosses_hosts", False)
        call = RingCall(layout, dist.get_rank(ring), ring, *sending)
        errors = []
        for repeat in range(repeats):
            if not platform.is_cpu() and repeat % dist.get_world_size() == dist.get_rank():
                torch.cuda._sleep(LATE_CYCLES)
            values = step(mine, call, group, parts, packed=parts is not None and repeat % 2 == 1)
            errors.append([worst_block(value, exact, block) for value, exact in zip(values, right, strict=True)])
        worst = torch.tensor(errors, device=device).amax(0)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        waits = waits_for_device(partial(step, mine, call, group, parts, packed=False))
        failed = bool(waits) or not bool((worst <= BOUNDS[dtype]).all())
        failures += failed
        if dist.get_rank() == 0:
            text = " ".join(f"{part} {error:.1e}" for part, error in zip(NAMES, worst.tolist(), strict=True))
            print(f"{'FAIL' if failed else 'ok  '} {name:34} {heads[0]}/{heads[1]} {lengths}: {text}{waits}", flush=True)
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args(argv)
    if not dist.is_initialized():
        platform.init_distributed(120)
    if platform.is_cpu():
        cases, head_dim, dtype, block = [((8, 4), (50,)), ((16, 8), (21, 1, 38))], 8, torch.float32, 4
    else:
        cases = [((32, 8), (32768,)), ((28, 4), (33333,)), ((32, 8), (19991, 1, 300, 12477))]
        head_dim, dtype, block = 128, torch.bfloat16, 128
    return sum(check(heads, lengths, head_dim, dtype, arguments.repeats, block) for heads, lengths in cases)


if __name__ == "__main__":
    failed = main()
    platform.shutdown_distributed()
    sys.exit(failed > 0)
