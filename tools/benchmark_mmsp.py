"""The multimodal front: vision tower, projector and the way of visual tokens to the ranks that own their positions, forward and backward.

    torchrun --nproc_per_node 4 tools/benchmark_mmsp.py --output tools/benchmark_results/mmsp_4xh200.json \\
        --config examples/models/qwen2_7b_siglip_448.yaml --frames 256 --frames_per_micro_batch 16 --repeats 3
    python tools/benchmark_mmsp.py --output tools/benchmark_results/mmsp_4xh200.json --plot    # a picture of the rows

Schemes, all with the same weights, frames, frame micro-batch and recompute:
  - `mmsp reshard`: each rank encodes its frames, one all-to-all-v brings each token to its owner (what trains);
  - `replicated towers`: every rank encodes every frame and keeps the rows it owns, as Megatron's LLaVA does;
  - `all-gather + slice`: each rank encodes its frames, all tokens are gathered everywhere, each rank keeps the rows it owns;
  - `one-stage sharding`: frames go where an even cut of text and placeholders, one per frame, puts them, and their tokens stay there;
  - `no communication`: each rank encodes its frames, and that is all.

Gradients of the tower are left unsummed in all of them. Rows are as in tools/benchmark_attention.py, and say by how much the largest share
of frames and of decoder tokens exceeds the mean (`frames_max_over_mean`, `tokens_max_over_mean`). TFLOP/s count forward three times, no
recompute.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from benchmark_plots import plot_front  # noqa: E402
from benchmark_rows import Results, add_rows, measure  # noqa: E402
from collective_pairs import gather_rows  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_longvila import platform  # noqa: E402
from megatron_longvila.config import Config, VisionConfig  # noqa: E402
from megatron_longvila.config_check import check  # noqa: E402
from megatron_longvila.config_io import load  # noqa: E402
from megatron_longvila.models.init import initialize_weights  # noqa: E402
from megatron_longvila.models.longvila import LongVILA, build_model  # noqa: E402
from megatron_longvila.parallel.groups import Groups, destroy_groups, initialize_groups  # noqa: E402
from megatron_longvila.parallel.plan import PLACEHOLDER_ID, RankPlan, RowSpec, plan_row  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--config", type=Path, metavar="MODEL.yaml", help="needed unless --plot")
    parser.add_argument("--frames", type=int, nargs="+", default=[256])
    parser.add_argument("--videos", type=int, default=4, help="samples of the row, each a video between two texts")
    parser.add_argument("--text_tokens", type=int, default=128, help="tokens of text before and after each video")
    parser.add_argument("--frames_per_micro_batch", type=int, default=16)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--schemes", default="", metavar="REGEX", help="only schemes whose name matches")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--allow_other_commit", action="store_true", help="add to rows that another commit of this code measured")
    parser.add_argument("--plot", action="store_true", help="draw OUTPUT and stop")
    arguments = parser.parse_args(argv)
    if arguments.config is None and not arguments.plot:
        parser.error("--config MODEL.yaml is needed to measure; only --plot goes without it")
    return arguments


def configure(arguments: argparse.Namespace) -> Config:
    """The named model with one decoder layer and a small vocabulary, which no scheme touches, on cp = all ranks."""
    config = load(arguments.config)
    model = config.model
    size = dist.get_world_size()
    llm = replace(model.llm, num_layers=1, vocab_size=384)
    vision = replace(model.vision, frames_per_micro_batch=arguments.frames_per_micro_batch)
    training = replace(
        config.training, recompute="none", recompute_vision=arguments.recompute, precision="fp32" if platform.is_cpu() else "bf16"
    )
    return replace(
        config,
        model=replace(model, llm=llm, vision=vision),
        training=training,
        parallel=replace(config.parallel, cp_size=size, gpus_per_host=size),
    )


def make_row(num_frames: int, videos: int, text_tokens: int, tokens_per_frame: int) -> RowSpec:
    """`videos` samples: text, frames with a token of text behind each, text."""
    lengths, starts, position = [], [], 0
    for video in range(videos):
        frames = num_frames // videos + (video < num_frames % videos)
        first = position + text_tokens
        starts += [first + index * (tokens_per_frame + 1) for index in range(frames)]
        lengths.append(2 * text_tokens + frames * (tokens_per_frame + 1))
        position += lengths[-1]
    return RowSpec(tuple(lengths), tuple(starts), tokens_per_frame)


def row_ids(spec: RowSpec) -> np.ndarray:
    """Token ids of the unpadded row: placeholders and zeros."""
    ids = np.zeros(sum(spec.sample_lengths), dtype=np.int64)
    for start in spec.frame_starts:
        ids[start : start + spec.tokens_per_frame] = PLACEHOLDER_ID
    return ids


def one_stage_frames(spec: RowSpec, size: int) -> list[range]:
    """Frames of each rank if the row, with one placeholder per frame, is cut evenly before anything is encoded."""
    text_before = np.array(spec.frame_starts) - np.arange(len(spec.frame_starts)) * spec.tokens_per_frame
    places = text_before + np.arange(len(spec.frame_starts))
    length = sum(spec.sample_lengths) - len(spec.frame_starts) * (spec.tokens_per_frame - 1)
    edges = np.searchsorted(places, [length * rank / size for rank in range(size + 1)]).tolist()
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


class Front:
    """One row on this rank, and every scheme as a function of no arguments that runs forward and backward."""

    def __init__(self, model: LongVILA, groups: Groups, spec: RowSpec):
        self.model, self.groups, self.spec = model, groups, spec
        mesh, device = groups.mesh, platform.device()
        self.plans: list[RankPlan] = plan_row(spec, ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size)
        self.rank, self.size = groups.cp.rank(), groups.cp.size()
        plan = self.plan = self.plans[self.rank]
        ids = row_ids(spec)
        source = plan.row_source_T
        self.ids = torch.from_numpy(np.where(source < 0, 0, ids[np.maximum(source, 0)])).to(device)
        # Local rows that hold a visual token, and which token of the row's frames it is.
        token_of_row = np.full(len(ids), -1)
        token_of_row[ids == PLACEHOLDER_ID] = np.arange(len(spec.frame_starts) * spec.tokens_per_frame)
        tokens = np.where(source < 0, -1, token_of_row[np.maximum(source, 0)])
        self.rows = torch.from_numpy(np.flatnonzero(tokens >= 0)).to(device)
        self.tokens = torch.from_numpy(tokens[tokens >= 0]).to(device)
        side = model.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        self.frames = torch.randint(0, 256, (len(spec.frame_starts), side, side, 3), dtype=torch.uint8, generator=generator).to(device)
        self.one_stage = one_stage_frames(spec, self.size)
        num_rows = max(len(self.ids), len(self.one_stage[self.rank]) * spec.tokens_per_frame)
        width = model.config.hidden_size
        generator = torch.Generator(device).manual_seed(self.rank)
        self.grad = torch.randn(num_rows, 1, width, generator=generator, dtype=model.config.params_dtype, device=device)

    def schemes(self) -> dict[str, Callable[[], Tensor]]:
        """By name; `no communication` first, because the others are compared with it."""
        own = self.frames[self.plan.frames.start : self.plan.frames.stop]
        local = self.one_stage[self.rank]
        return {
            "no communication": partial(self._encode_only, own),
            "mmsp reshard": lambda: self._backward(self.model.embed(own, self.ids, self.plan)),
            "replicated towers": lambda: self._backward(self._place(self.model.encode_frames(self.frames))),
            "all-gather + slice": lambda: self._backward(self._place(self._gathered(self.model.encode_frames(own)))),
            "one-stage sharding": partial(self._encode_only, self.frames[local.start : local.stop]),
        }

    def _backward(self, out_T1D: Tensor) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        out_T1D.backward(self.grad[: out_T1D.shape[0]])
        return out_T1D

    def _encode_only(self, frames: Tensor) -> Tensor:
        return self._backward(self.model.encode_frames(frames)[:, None])

    def _place(self, visual_VD: Tensor) -> Tensor:
        """Rows of this rank from the tokens of all frames."""
        text_TD = self.model.language_model.embedding(input_ids=self.ids.clamp(min=0)[None], position_ids=None).squeeze(1)
        kernels = self.model.kernels
        taken_VD = kernels.take_rows(visual_VD, self.tokens)
        return kernels.place_rows(text_TD, taken_VD.to(text_TD.dtype), self.rows)[:, None]

    def _gathered(self, visual_VD: Tensor) -> Tensor:
        """Tokens of all frames, from blocks padded to the largest."""
        counts = [len(plan.frames) * self.spec.tokens_per_frame for plan in self.plans]
        padded = torch.nn.functional.pad(visual_VD, (0, 0, 0, max(counts) - counts[self.rank]))
        blocks = gather_rows(padded, self.groups.cp).split(max(counts))
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    def imbalance(self, scheme: str) -> tuple[float, float]:
        """(frames, decoder tokens): the largest share of a rank over the mean."""
        frames = [len(plan.frames) for plan in self.plans]
        tokens = [len(plan.row_source_T) for plan in self.plans]
        if scheme == "replicated towers":
            frames = [len(self.frames)] * self.size
        if scheme == "one-stage sharding":
            frames = [len(part) for part in self.one_stage]
            text = (sum(self.spec.sample_lengths) - len(self.frames) * (self.spec.tokens_per_frame - 1)) / self.size
            tokens = [text + len(part) * (self.spec.tokens_per_frame - 1) for part in self.one_stage]
        return tuple(round(max(shares) / (sum(shares) / len(shares)), 4) for shares in (frames, tokens))


def tower_flops(vision: VisionConfig, num_frames: int) -> float:
    """Of one forward through the layers that are built."""
    patches, width = vision.grid_size**2, vision.hidden_size
    per_patch = 2 * (4 * width * width + 2 * width * vision.ffn_hidden_size) + 4 * patches * width
    return num_frames * patches * vision.built_layers * per_patch


def run(arguments: argparse.Namespace, results: Results) -> None:
    config = configure(arguments)
    mesh = check(config, dist.get_world_size())
    groups = initialize_groups(mesh)
    platform.seed(0, 0)
    model = build_model(config, groups)
    initialize_weights(model, config, 0)
    work = f"front, micro-batch {arguments.frames_per_micro_batch}, {'recompute' if arguments.recompute else 'no recompute'}"
    heads = f"{config.model.llm.num_attention_heads}/{config.model.llm.num_query_groups}"
    for num_frames in arguments.frames:
        front = Front(model, groups, make_row(num_frames, arguments.videos, arguments.text_tokens, config.model.tokens_per_frame))
        seq_len = sum(front.spec.sample_lengths)
        for repeat in range(arguments.repeats):
            for name, step in front.schemes().items():
                key = dict(work=f"{work}, {num_frames} frames", scheme=name, heads=heads, seq_len=seq_len, hosts=1, repeat=repeat)
                if not re.search(arguments.schemes, name) or results.has(key):
                    continue
                # The gradients of the step before are there when it begins and go when its own come.
                median_ms, peak = measure(step, [], arguments.iterations, arguments.warm_up)
                flops = 3 * tower_flops(config.model.vision, num_frames) / dist.get_world_size()
                frames, tokens = front.imbalance(name)
                results.add(key, median_ms, peak, flops, frames_max_over_mean=frames, tokens_max_over_mean=tokens)
    destroy_groups()


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.plot:
        plot_front(json.loads(arguments.output.read_text()), arguments.output)
        return
    add_rows("tools/benchmark_mmsp.py", arguments, run)


if __name__ == "__main__":
    main()
