"""Synthetic rows, and one training step's loss and gradients on any mesh: what the oracle tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.config import (
    Config,
    LLMConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    ProjectorConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel.groups import destroy_groups, initialize_groups
from megatron_longvila.parallel.plan import IGNORE_INDEX, PLACEHOLDER_ID, RowSpec, plan_row

IMAGE_SIZE = 28
TOKENS_PER_FRAME = 4
VOCAB_SIZE = 120


@dataclass(frozen=True)
class SyntheticRow:
    """An unpadded row: ids with placeholders, labels already shifted, and the pixels of its frames."""

    spec: RowSpec
    input_ids: np.ndarray
    labels: np.ndarray
    frames_FHWC: np.ndarray


def make_row(samples: list[list[int | str]], seed: int, labelled: bool = True) -> SyntheticRow:
    """Each sample is a list of text lengths (int) and frame counts ("3f"); the last half of its last text is the answer."""
    rng = np.random.default_rng(seed)
    ids, labels, starts, lengths = [], [], [], []
    for segments in samples:
        sample, is_answer = [], []
        for index, segment in enumerate(segments):
            if isinstance(segment, str):
                for _ in range(int(segment.removesuffix("f"))):
                    starts.append(sum(lengths) + len(sample))
                    sample += [PLACEHOLDER_ID] * TOKENS_PER_FRAME + [7]
                    is_answer += [False] * (TOKENS_PER_FRAME + 1)
            else:
                sample += rng.integers(0, VOCAB_SIZE, segment).tolist()
                answer = segment - segment // 2 if index == len(segments) - 1 and labelled else 0
                is_answer += [False] * (segment - answer) + [True] * answer
        targets = [token if answer else IGNORE_INDEX for token, answer in zip(sample, is_answer, strict=True)]
        ids += sample
        labels += targets[1:] + [IGNORE_INDEX]
        lengths.append(len(sample))
    frames = rng.integers(0, 256, (len(starts), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return SyntheticRow(RowSpec(tuple(lengths), tuple(starts), TOKENS_PER_FRAME), np.array(ids), np.array(labels), frames)


# Each batch is two rows, so that dp 2 splits it and every other mesh accumulates two micro-batches with unequal token counts.
BATCHES = {
    "seven_frames": [make_row([[3, "7f", 9]], 1), make_row([[2, "5f", 4]], 2)],
    "two_frames": [make_row([[5, "2f", 8]], 3), make_row([["2f", 13]], 4)],
    "no_frame": [make_row([[33]], 5), make_row([[9], [14]], 6)],
    "image_and_video": [make_row([[2, "1f", 3, "6f", 12]], 7), make_row([["1f", 5, "3f", 2]], 8)],
    "three_packed": [make_row([[1, "1f", 6], [2, "4f", 17], [4, "2f", 3]], 9), make_row([[3, "1f", 2], [21]], 10)],
    "text_with_video": [make_row([[18], [2, "5f", 6]], 11), make_row([[2, "3f", 6], [11]], 12, labelled=False)],
}


def tiny_config(architecture: str = "qwen2", tie_embeddings: bool = False, **overrides) -> Config:
    """A model small enough for eight ranks on two cores and legal on every mesh of the oracle."""
    model = ModelConfig(
        vision=VisionConfig(IMAGE_SIZE, 7, 32, 48, 3, 4, frames_per_micro_batch=2),
        projector=ProjectorConfig("mlp_downsample"),
        llm=LLMConfig(architecture, 64, 96, 4, 8, 4, 16, VOCAB_SIZE, 256, 10_000.0, tie_embeddings=tie_embeddings),
        lora=LoraConfig(**overrides.pop("lora", {})),
        init_std=0.1,
    )
    training = TrainingConfig(precision="fp32", loss_chunk_rows=5, **overrides.pop("training", {}))
    return Config(model=model, parallel=ParallelConfig(**overrides.pop("parallel", {})), training=training, **overrides)


def rank_batch(row: SyntheticRow, mesh: Mesh, cp_rank: int, row_multiple: int):
    """(frames, input_ids, positions, labels, plan) of one cp rank."""
    plan = plan_row(row.spec, ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size, row_multiple=row_multiple)[cp_rank]
    source = np.maximum(plan.row_source_T, 0)
    input_ids = np.where(plan.is_padding_T, 0, row.input_ids[source])
    labels = np.where(plan.is_padding_T, IGNORE_INDEX, row.labels[source])
    frames = row.frames_FHWC[plan.frames.start : plan.frames.stop]
    tensors = (torch.from_numpy(array).to(platform.device()) for array in (frames, input_ids, plan.positions_T, labels))
    return *tensors, plan


def run_batch(model, batch: list[SyntheticRow], config: Config, groups, make_labels=None):
    """One forward and backward through Megatron's schedule. Returns (loss per labelled token, labelled tokens); gradients in main_grad.

    `make_labels(row, labels_T, plan)` lets a test break the labels on purpose.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_longvila.training.loss import token_loss

    mesh = groups.mesh
    multiple = mesh.tp_size if config.parallel.sequence_parallel else 1
    mine = batch[groups.dp.rank() :: mesh.dp_size]

    def forward_step(iterator, model):
        row = next(iterator)
        frames, input_ids, positions, labels, plan = rank_batch(row, mesh, groups.cp.rank(), multiple)
        if make_labels is not None:
            labels = make_labels(row, labels, plan)
        hidden = model(frames, input_ids, positions, plan)
        return hidden, partial(token_loss, model.module.language_model, labels_T=labels, config=config)

    model.zero_grad_buffer()
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(mine), model=model, num_microbatches=len(mine),
        seq_length=max(sum(row.spec.sample_lengths) for row in mine), micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    sums = [sum(output[key].item() for output in outputs) for key in ("loss_sum", "count")]
    totals = torch.tensor(sums, dtype=torch.double, device=platform.device())
    dist.all_reduce(totals, group=groups.dp_cp)
    dist.all_reduce(totals, group=groups.pp)
    return (totals[0] / totals[1]).item(), int(totals[1])


def build(config: Config, mesh_sizes: dict[str, int], state: dict | None, overlap: bool = False, trainable=("vision", "projector", "llm")):
    """Groups and a DDP-wrapped model with the given full weights (None: not initialised), for the calling rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_longvila.checkpoint.hf import load_full_state
    from megatron_longvila.models.longvila import build_model
    from megatron_longvila.training.optimizer import freeze

    mesh = Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | mesh_sizes)
    groups = initialize_groups(mesh, timeout_s=60)
    platform.seed(0, groups.pp.rank())
    model = build_model(config, groups)
    if state is not None:
        load_full_state(model, state, config, groups)
    freeze(model, list(trainable))
    # Small buckets, so that overlapping has several to keep apart; whole gradients on every rank, so that they can be compared.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=False, bucket_size=2000
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    model.config.no_sync_func = wrapped.no_sync
    if overlap:
        model.config.grad_sync_func = wrapped.start_grad_sync
    return wrapped, groups


def teardown() -> None:
    destroy_groups()
