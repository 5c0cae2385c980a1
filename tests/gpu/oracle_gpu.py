"""The oracle on GPUs, through NCCL: N ranks against one, in fp32 with the reference attention (sharp) and in bf16 with cuDNN and flash.

    python tests/gpu/oracle_gpu.py --save one_rank.pt
    torchrun --nproc_per_node 2 tests/gpu/oracle_gpu.py --check one_rank.pt  # the meshes of 2 ranks
    torchrun --nproc_per_node 4 tests/gpu/oracle_gpu.py --check one_rank.pt  # and of 4

Prints one line per mesh and batch with the largest relative gradient error; the exit code is 1 if any line fails.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from oracle import BATCHES, build, run_batch, teardown, tiny_config  # noqa: E402

MESHES = {
    "tp2": ({"tp_size": 2}, {}),
    "tp2_sp": ({"tp_size": 2}, {"sequence_parallel": True}),
    "pp2": ({"pp_size": 2}, {}),
    "dp2": ({}, {}),
    "ulysses2": ({"ulysses_size": 2}, {}),
    "ring2": ({"ring_size": 2}, {"ring_transport": "all_gather"}),
    "ring2_p2p": ({"ring_size": 2}, {"ring_transport": "p2p"}),
    "ulysses2_ring2": ({"ulysses_size": 2, "ring_size": 2}, {"ring_transport": "all_gather"}),
    "ulysses4": ({"ulysses_size": 4}, {}),
    "ring4_p2p": ({"ring_size": 4}, {"ring_transport": "p2p"}),
    "dp2_ulysses2": ({"ulysses_size": 2}, {}),
    "tp2_sp_ulysses2": ({"tp_size": 2, "ulysses_size": 2}, {"sequence_parallel": True}),
    "pp2_ring2_p2p": ({"pp_size": 2, "ring_size": 2}, {"ring_transport": "p2p"}),
}


def fits(name: str) -> bool:
    """The mesh uses exactly the ranks of this job."""
    replica = math.prod(MESHES[name][0].values())
    return dist.get_world_size() == replica * (2 if name.startswith("dp2") else 1)


def configured(precision: str, backend: str, parallel: dict, recompute: str = "none"):
    config = tiny_config(parallel=dict(parallel), training={"recompute": recompute})
    return replace(
        config,
        model=replace(config.model, attention_backend=backend),
        training=replace(config.training, precision=precision),
    )


def gradients(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): parameter.main_grad.float().cpu().clone() for name, parameter in model.named_parameters()}


def random_weights(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: ("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def save(path: str) -> None:
    """One rank: fp32 with the reference attention is the truth; bf16 of each backend shows what rounding alone does."""
    model, _ = build(configured("fp32", "reference", {}), {}, None)
    state = random_weights(model.module)
    teardown()
    results = {}
    for precision, backend in (("fp32", "reference"), ("bf16", "reference"), ("bf16", "cudnn"), ("bf16", "flash")):
        config = configured(precision, backend, {})
        model, groups = build(config, {}, state)
        for name, batch in BATCHES.items():
            results[precision, backend, name] = (*run_batch(model, batch, config, groups), gradients(model))
        teardown()
    torch.save({"state": state, "results": results}, path)


def worst_error(model, groups, expected: dict[str, torch.Tensor]) -> float:
    """Largest ||g - g_ref|| / (||g_ref|| + 1e-3 ||all||) over the parameters of this rank; the second term forgives what is nearly zero."""
    from megatron_longvila.models.init import global_parameters, shard_for_rank

    scale = torch.stack([grad.norm() for grad in expected.values()]).norm()
    worst = 0.0
    for name, parameter in global_parameters(model.module):
        reference = shard_for_rank(name, expected[name], parameter, groups.tp.rank(), groups.tp.size())
        error = (parameter.main_grad.float().cpu() - reference).norm() / (reference.norm() + 1e-3 * scale)
        worst = max(worst, error.item())
    return worst


def check(path: str) -> int:
    saved = torch.load(path, weights_only=False)
    state, results = saved["state"], saved["results"]
    failures = 0
    for name in filter(fits, MESHES):
        sizes, parallel = MESHES[name]
        for precision, backend in (("fp32", "reference"), ("bf16", "cudnn"), ("bf16", "flash")):
            config = configured(precision, backend, parallel, "full" if "sp" in name or "p2p" in name else "none")
            model, groups = build(config, sizes, state, overlap=name in ("ulysses2", "dp2", "ulysses4", "ulysses2_ring2"))
            for batch_name, batch in BATCHES.items():
                loss, count = run_batch(model, batch, config, groups)
                truth_loss, truth_count, truth = results["fp32", "reference", batch_name]
                error = torch.tensor(worst_error(model, groups, truth), device=platform.device())
                dist.all_reduce(error, op=dist.ReduceOp.MAX)
                if precision == "fp32":
                    limit, loss_limit = 1e-5, 1e-5
                else:
                    # What one rank loses in bf16 with the same backend, twice.
                    one_loss, _, one = results["bf16", backend, batch_name]
                    scale = torch.stack([grad.norm() for grad in truth.values()]).norm()
                    limit = 2 * max(((one[k] - truth[k]).norm() / (truth[k].norm() + 1e-3 * scale)).item() for k in truth)
                    loss_limit = max(2 * abs(one_loss - truth_loss) / truth_loss, 2e-3)
                loss_error = abs(loss - truth_loss) / truth_loss
                ok = error.item() <= limit and loss_error <= loss_limit and count == truth_count
                failures += not ok
                if dist.get_rank() == 0:
                    verdict = "ok  " if ok else "FAIL"
                    print(
                        f"{verdict} {name:10} {precision} {backend:9} {batch_name:16} gradient {error.item():.2e} (limit {limit:.2e}) "
                        f"loss {loss_error:.2e} (limit {loss_limit:.2e})",
                        flush=True,
                    )
            teardown()
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", metavar="FILE")
    what.add_argument("--check", metavar="FILE")
    arguments = parser.parse_args()
    platform.init_distributed(120)
    failures = save(arguments.save) or 0 if arguments.save else check(arguments.check)
    platform.shutdown_distributed()
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    sys.exit(main())
