"""The vision tower on one GPU: ours on Megatron's and on Transformer Engine's linears, and transformers' SigLIP, in turn in one process.

    python tools/benchmark_tower.py --output runs/tower.json --config examples/models/qwen2_7b_siglip_448.yaml --frames 16 32 --repeats 3

All have the same sizes, as many layers as ours builds, random weights and the same frames. transformers computes attention by torch's
scaled_dot_product_attention, as it is and under torch.compile; `plain kernels` are ours without Triton (model.kernels: reference). Rows are
as in tools/benchmark_attention.py, with `frames_per_s`; TFLOP/s count backward as two forwards, memory is what a step needs beyond its
result, the gradients of the weights included. A peer that is not installed is left out, and OUTPUT's twin `*_machine.json` says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from benchmark_mmsp import tower_flops  # noqa: E402
from benchmark_rows import Results, add_rows, measure  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.config import Config, VisionConfig  # noqa: E402
from megatron_longvila.config_check import check  # noqa: E402
from megatron_longvila.config_io import load  # noqa: E402
from megatron_longvila.models.siglip import SiglipTower  # noqa: E402
from megatron_longvila.parallel.groups import Groups, destroy_groups, initialize_groups  # noqa: E402

Tower = Callable[[Tensor], Tensor]
"""Pixels [F, 3, S, S] to features [F, P, D]."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--config", type=Path, required=True, metavar="MODEL.yaml")
    parser.add_argument("--frames", type=int, nargs="+", default=[16], help="in one call [%(default)s]")
    parser.add_argument("--schemes", default="", metavar="REGEX", help="only schemes whose name matches")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--allow_other_commit", action="store_true", help="add to rows that another commit of this code measured")
    return parser.parse_args(argv)


def ours(config: Config, groups: Groups, **model: str) -> torch.nn.Module:
    """`model` replaces fields of ModelConfig."""
    return SiglipTower(replace(config, model=replace(config.model, **model)), groups)


def transformers_tower(vision: VisionConfig, dtype: torch.dtype, compiled: bool) -> torch.nn.Module:
    """The encoder of transformers' SigLIP with the same layers; its post-norm stays, its pooling head goes."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = SiglipVisionConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.ffn_hidden_size, num_hidden_layers=vision.built_layers,
        num_attention_heads=vision.num_attention_heads, image_size=vision.image_size, patch_size=vision.patch_size, vision_use_head=False,
    )  # fmt: skip
    sizes._attn_implementation = "sdpa"
    model = SiglipVisionModel(sizes).to(platform.device(), dtype)
    return torch.compile(model) if compiled else model


def towers(config: Config, groups: Groups, dtype: torch.dtype) -> dict[str, Callable[[], torch.nn.Module]]:
    """Builders by name."""
    found = {
        "ours": partial(ours, config, groups),
        "ours, plain kernels": partial(ours, config, groups, kernels="reference"),
        "transformers": partial(transformers_tower, config.model.vision, dtype, False),
    }
    if not platform.is_cpu():  # on a CPU the first is not there, the second asks for a C++ compiler
        found["ours, Transformer Engine's linears"] = partial(ours, config, groups, layers="te")
        found["transformers, compiled"] = partial(transformers_tower, config.model.vision, dtype, True)
    return found


def step_of(tower: torch.nn.Module, pixels: Tensor, backward: bool) -> Callable[[], Tensor]:
    """One forward, or one forward and backward with new gradients."""
    grads: list[Tensor] = []

    def features() -> Tensor:
        out = tower(pixels)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def step() -> Tensor:
        if not backward:
            with torch.no_grad():
                return features()
        for parameter in tower.parameters():
            parameter.grad = None
        out = features()
        grads[:] = grads or [torch.randn_like(out)]
        out.backward(grads[0])
        return out.detach()

    return step


def run(arguments: argparse.Namespace, results: Results) -> None:
    config = load(arguments.config)
    precision = "fp32" if platform.is_cpu() else "bf16"
    config = replace(config, training=replace(config.training, precision=precision))
    vision, dtype = config.model.vision, torch.float32 if platform.is_cpu() else torch.bfloat16
    groups = initialize_groups(check(config, dist.get_world_size()))
    platform.seed(0, 0)
    heads = f"{vision.num_attention_heads}/{vision.num_attention_heads}"
    for repeat in range(arguments.repeats):
        for name, build in towers(config, groups, dtype).items():
            if not re.search(arguments.schemes, name):
                continue
            try:
                tower = build()
            except (ImportError, ValueError) as error:  # a peer, or Transformer Engine, that is not installed
                results.leave_out(name, error)
                continue
            for parameter in tower.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            for frames in arguments.frames:
                pixels = torch.randn(frames, 3, vision.image_size, vision.image_size, device=platform.device(), dtype=dtype)
                for work in ("tower forward", "tower forward+backward"):
                    key = dict(work=work, scheme=name, heads=heads, seq_len=frames * vision.grid_size**2, hosts=1, repeat=repeat)
                    if results.has(key):
                        continue
                    backward = work.endswith("backward")
                    step = step_of(tower, pixels, backward)
                    median_ms, peak = measure(step, [step()], arguments.iterations, arguments.warm_up)
                    flops = tower_flops(vision, frames) * (3 if backward else 1)
                    results.add(key, median_ms, peak, flops, frames=frames, frames_per_s=round(frames / median_ms * 1e3, 2))
            del tower
    destroy_groups()


def main(argv: list[str] | None = None) -> None:
    add_rows("tools/benchmark_tower.py", parse(argv), run)


if __name__ == "__main__":
    main()
