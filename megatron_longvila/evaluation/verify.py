"""Do two sets of weights make the same model? Each is run on built-in inputs, and every part's output is compared.

A side is a folder in Hugging Face's form, which transformers' own modules run (hf_reference.py), or a checkpoint of this project. Both
compute in fp32 on one process; whatever type the weights are stored in becomes fp32 without loss.

The limit of a difference is measured on the model at hand: one side is run again with every weight moved to a neighbouring fp32 number.
Another order of summation may change a few times as much (`_ORDERS`). Where the two sides are stored in different types, one of them was
rounded: the finer side, rounded to the coarser type, shows what that changes.

Shapes: F frames, S side of a frame in pixels, T tokens, V visual tokens of a frame.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longvila import config_io, platform
from megatron_longvila.config import CheckpointConfig, Config, ParallelConfig
from megatron_longvila.evaluation.hf_reference import HuggingFaceModel
from megatron_longvila.evaluation.logits import row_logits
from megatron_longvila.evaluation.model import load_model
from megatron_longvila.mesh import Mesh
from megatron_longvila.models.rope import inverse_frequencies, rotary_angles, softmax_scale
from megatron_longvila.parallel.groups import destroy_groups, initialize_groups
from megatron_longvila.parallel.plan import PLACEHOLDER_ID
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.dist_checkpointing import load_tensors_metadata  # isort: skip

VIDEO_FRAMES = 7  # odd on purpose: no mesh divides it
TEXT_TOKENS = 48
# A matrix product is summed in blocks: a handful of partial sums as large as the result are rounded, whatever its length, each by about as
# much as moving all its terms to their neighbours changes. Two sides do so, and the worst of many elements counts.
_ORDERS = 8

# What is compared, and the sizes that a side has if it has the part.
PARTS = {
    "rotary angles": {"vocab_size"},
    "embedding rows": {"vocab_size"},
    "text logits": {"vocab_size"},
    "vision features": {"image_size"},
    "projector output": {"tokens_per_frame"},
    "multimodal logits": {"tokens_per_frame", "vocab_size"},
}


class Side(Protocol):
    """What both sides can be asked; see HuggingFaceModel."""

    sizes: dict[str, int]
    dtypes: set[torch.dtype]

    def text_logits(self, ids_T: np.ndarray, positions_T: np.ndarray) -> Tensor: ...
    def vision_features(self, frames_FSS3: Tensor) -> Tensor: ...
    def projector_output(self, frames_FSS3: Tensor) -> Tensor: ...
    def multimodal_logits(self, frames_FSS3: Tensor, ids_T: np.ndarray) -> Tensor: ...
    def rotary(self, positions_T: np.ndarray) -> Tensor: ...
    def embedding_table(self) -> Tensor: ...
    def weights(self) -> list[Tensor]: ...


class CheckpointModel:
    """A checkpoint of this project on one rank, in fp32."""

    def __init__(self, folder: Path):
        """Joins a job of one rank if this process is in none. Raises ValueError if the checkpoint is damaged or the job larger."""
        if not dist.is_initialized():
            platform.init_distributed(600)
        saved = config_io.load(folder / "config.yaml")
        self.config: Config = replace(
            saved,
            # What a run chose for its GPUs may not exist here, and changes no name and no shape.
            model=replace(saved.model, layers="local", attention_backend="auto", kernels="reference"),
            parallel=ParallelConfig(),
            training=replace(saved.training, precision="fp32", recompute="none", recompute_vision=False),
            checkpoint=CheckpointConfig(load=str(folder)),
        )
        self.groups = initialize_groups(Mesh(1, 1, 1, 1, 1))
        self.model = load_model(self.config, self.groups).eval().requires_grad_(False)
        self.sizes = sizes_of(self.config)
        parts = ("vision_tower.", "projector.", "language_model.")
        entries = load_tensors_metadata(str(folder)).items()
        self.dtypes = {entry.dtype for name, entry in entries if name.startswith(parts) and entry.dtype.is_floating_point}

    def text_logits(self, ids_T: np.ndarray, positions_T: np.ndarray) -> Tensor:
        return row_logits(self.model, self.config, self.groups, ids_T, positions_L=positions_T)

    def vision_features(self, frames_FSS3: Tensor) -> Tensor:
        pixels_FCSS = ((frames_FSS3.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        return self.model.vision_tower(pixels_FCSS.to(platform.device()))

    def projector_output(self, frames_FSS3: Tensor) -> Tensor:
        return self.model.encode_frames(frames_FSS3.to(platform.device())).unflatten(0, (len(frames_FSS3), -1))

    def multimodal_logits(self, frames_FSS3: Tensor, ids_T: np.ndarray) -> Tensor:
        return row_logits(self.model, self.config, self.groups, ids_T, frames_FHWC=frames_FSS3)

    def rotary(self, positions_T: np.ndarray) -> Tensor:
        llm = self.config.model.llm
        scale = softmax_scale(llm)
        factor = 1.0 if scale is None else (scale * math.sqrt(llm.head_dim)) ** 0.5  # YaRN's: here it is part of the softmax scale
        frequencies = inverse_frequencies(llm, int(positions_T.max()) + 1)
        angles_TH = rotary_angles(torch.from_numpy(positions_T), frequencies)[:, 0, 0]
        return torch.stack((angles_TH.cos(), angles_TH.sin()), dim=1) * factor

    def embedding_table(self) -> Tensor:
        return self.model.language_model.embedding.word_embeddings.weight[: self.config.model.llm.vocab_size]

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())


@dataclass(frozen=True)
class Comparison:
    """One part on one input.

    Attributes:
        worst_absolute: largest difference of an element; nan if either side has one.
        worst_relative: largest norm of a token's (or patch's) difference, by the norm of side A's.
        limit: of worst_absolute.
    """

    part: str
    input: str
    worst_absolute: float
    worst_relative: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.worst_absolute <= self.limit


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        dtype: the type whose rounding the limits allow: fp32, or the coarser one if the sides are stored in different types.
        not_compared: parts that one side does not have.
    """

    a: str
    b: str
    dtype: str
    comparisons: tuple[Comparison, ...]
    not_compared: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def lines(self) -> list[str]:
        """A table to print."""
        found = [f"A: {self.a}", f"B: {self.b}", f"limits allow rounding in {self.dtype}"]
        found.append(f"{'part':18} {'input':14} {'absolute':>10} {'relative':>10} {'limit':>10}")
        for one in self.comparisons:
            numbers = f"{one.worst_absolute:10.2e} {one.worst_relative:10.2e} {one.limit:10.2e}"
            found.append(f"{one.part:18} {one.input:14} {numbers}  {'ok' if one.passed else 'FAILED'}")
        found += [f"{part}: not compared, only one side has it" for part in self.not_compared]
        return [*found, "the same model" if self.passed else "NOT the same model"]


@dataclass(frozen=True)
class Inputs:
    """The built-in inputs, made from sizes alone. Positions of `far` are powers of two: there, and only there, the fp32 product of position
    and frequency that transformers takes is exact, however far apart the positions are."""

    text_ids: np.ndarray
    text_positions: np.ndarray
    far_ids: np.ndarray
    far_positions: np.ndarray
    frames_FSS3: Tensor
    image_ids: np.ndarray
    video_ids: np.ndarray


def sizes_of(config: Config) -> dict[str, int]:
    """What the built-in inputs for a model of ours depend on."""
    return {
        "image_size": config.model.vision.image_size,
        "tokens_per_frame": config.model.tokens_per_frame,
        "vocab_size": config.model.llm.vocab_size,
        "max_positions": config.model.llm.max_position_embeddings,
    }


def make_inputs(sizes: dict[str, int]) -> Inputs:
    """Inputs for a model of `sizes`; a missing size stands for a part that is not there."""
    vocab, side, visual = sizes.get("vocab_size", 2), sizes.get("image_size", 1), sizes.get("tokens_per_frame", 1)
    far = np.array([0] + [2**power for power in range(sizes.get("max_positions", 1).bit_length() + 1)])
    # The lower half only, so that LLaVA's image token, one of the last, is not among them.
    question = _spread(16, max(vocab // 2, 1))
    frame = np.full(visual, PLACEHOLDER_ID)
    y, x = np.mgrid[:side, :side]
    # Moving waves, other in each channel and frame; no two patches alike.
    frames = [
        np.stack([127.5 + 127.5 * np.sin(0.37 * x * (c + 1) + 0.23 * y + 0.011 * x * y + 1.3 * f + c) for c in range(3)], axis=-1)
        for f in range(VIDEO_FRAMES)
    ]
    return Inputs(
        text_ids=np.concatenate(([0, vocab - 1], _spread(TEXT_TOKENS - 2, vocab))),
        text_positions=np.arange(TEXT_TOKENS),
        far_ids=_spread(len(far), vocab),
        far_positions=far,
        frames_FSS3=torch.from_numpy(np.stack(frames).astype(np.uint8)),
        image_ids=np.concatenate((question[:3], frame, question[3:])),
        # A text token between the frames, as LongVILA has its newline.
        video_ids=np.concatenate((question[:2], *[np.append(frame, question[2])] * VIDEO_FRAMES, question[3:])),
    )


def _spread(count: int, below: int) -> np.ndarray:
    """`count` ids all over the vocabulary, always the same."""
    return (np.arange(count, dtype=np.int64) * 2654435761 + 12345) // 7 % below


@torch.no_grad()
def run_parts(
    side: Side, inputs: Inputs, sizes: dict[str, int], progress: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str], Tensor]:
    """Outputs of `side` by part and input; `sizes` say which parts, and `side` must have them. `progress` is told what comes next."""
    image, video = inputs.frames_FSS3[:1], inputs.frames_FSS3
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    found["rotary angles", "far positions"] = lambda: side.rotary(inputs.far_positions)
    found["embedding rows", "every id"] = lambda: _fingerprint(side.embedding_table())
    found["text logits", "text"] = lambda: side.text_logits(inputs.text_ids, inputs.text_positions)
    found["text logits", "far positions"] = lambda: side.text_logits(inputs.far_ids, inputs.far_positions)
    found["vision features", "image"] = lambda: side.vision_features(image)
    found["vision features", "video"] = lambda: side.vision_features(video)
    found["projector output", "image"] = lambda: side.projector_output(image)
    found["projector output", "video"] = lambda: side.projector_output(video)
    found["multimodal logits", "image"] = lambda: side.multimodal_logits(image, inputs.image_ids)
    found["multimodal logits", "video"] = lambda: side.multimodal_logits(video, inputs.video_ids)
    outputs = {}
    for (part, name), run in found.items():
        if PARTS[part] <= sizes.keys():
            progress(f"{part}, {name}")
            outputs[part, name] = run().float().cpu()
    return outputs


def _fingerprint(table_VD: Tensor) -> Tensor:
    """Four fixed sums over each row [V, 4]: the texts are too short to look up every row, and the table is too large to keep."""
    columns = torch.arange(4 * table_VD.shape[1], dtype=torch.float32).view(-1, 4)
    return table_VD.cpu() @ torch.cos(1.7 * columns + 0.013 * columns**1.5)


def open_side(path: Path, *, allow_pickle: bool = False) -> Side:
    """A checkpoint of this project, or a folder in Hugging Face's form. Raises ValueError if it is neither or cannot be loaded."""
    if (path / "config.yaml").is_file():
        return CheckpointModel(path)
    if (path / "config.json").is_file() or (path / "llm" / "config.json").is_file():
        return HuggingFaceModel(path, allow_pickle=allow_pickle)
    raise ValueError(f"{path} holds neither config.yaml (a checkpoint like RUN/checkpoints/step_0000100) nor config.json (Hugging Face)")


def verify(a: Path, b: Path, *, allow_pickle: bool = False, progress: Callable[[str], None] = lambda text: None) -> Report:
    """Compare all parts that both sides have. One side is in memory at a time, in fp32; the first is run twice.

    Args:
        progress: told what runs next, which takes minutes for a large model.

    Raises:
        ValueError: a side cannot be loaded, the sides differ in a size, or they have no part in common.
    """
    side_a = open_side(a, allow_pickle=allow_pickle)
    inputs, sizes_a, dtypes_a = make_inputs(side_a.sizes), side_a.sizes, side_a.dtypes
    outputs_a = run_parts(side_a, inputs, sizes_a, lambda text: progress(f"A: {text}"))
    _move_to_neighbours(side_a.weights())
    changes = _differences(outputs_a, run_parts(side_a, inputs, sizes_a, lambda text: progress(f"A with its weights moved: {text}")))
    limits = {key: _ORDERS * change for key, (change, _) in changes.items()}
    _close(side_a)
    del side_a

    side_b = open_side(b, allow_pickle=allow_pickle)
    sizes_b, dtypes_b = side_b.sizes, side_b.dtypes
    common = _common_sizes(a, b, sizes_a, sizes_b)
    outputs_b = run_parts(side_b, inputs, common, lambda text: progress(f"B: {text}"))
    differences = _differences(outputs_a, outputs_b)
    coarse = _coarsest(dtypes_a | dtypes_b) if dtypes_a != dtypes_b else torch.float32
    finer, exact = side_b, outputs_b
    if coarse != torch.float32:
        if _finest(dtypes_a) < _finest(dtypes_b):
            _close(side_b)
            finer, exact = open_side(a, allow_pickle=allow_pickle), outputs_a
        _round_to(finer.weights(), coarse)
        rounding = _differences(exact, run_parts(finer, inputs, common, lambda text: progress(f"rounded: {text}")))
        limits = {key: limits[key] + 2 * change for key, (change, _) in rounding.items()}
    _close(finer)
    comparisons = []
    for (part, name), (absolute, relative) in differences.items():
        ulp = torch.finfo(torch.float32).eps * outputs_a[part, name].abs().max().item()
        comparisons.append(Comparison(part, name, absolute, relative, limits[part, name] + 4 * ulp))
    only_one = tuple(part for part in PARTS if (PARTS[part] <= sizes_a.keys()) != (PARTS[part] <= sizes_b.keys()))
    return Report(str(a), str(b), str(coarse).removeprefix("torch."), tuple(comparisons), only_one)


def _common_sizes(a: Path, b: Path, sizes_a: dict[str, int], sizes_b: dict[str, int]) -> dict[str, int]:
    """The sizes both sides have. Raises ValueError if one is not the same, or if no part can be compared."""
    common = {name: size for name, size in sizes_a.items() if name in sizes_b}
    # The context length is a promise, no part of the computation.
    different = [f"{name} {size} and {sizes_b[name]}" for name, size in common.items() if name != "max_positions" and size != sizes_b[name]]
    if different:
        raise ValueError(f"{a} and {b} are not the same model: {', '.join(different)}")
    if not common:
        raise ValueError(f"{a} and {b} have no part in common: one has a language model alone, the other a vision tower alone")
    return common


def _differences(a: dict[tuple[str, str], Tensor], b: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], tuple[float, float]]:
    """(largest absolute, largest relative) difference of what both have."""
    found = {}
    for key in a.keys() & b.keys():
        difference = (a[key] - b[key]).flatten(0, -2)
        norms = a[key].flatten(0, -2).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        found[key] = difference.abs().max().item(), (difference.norm(dim=-1) / norms).max().item()
    return {key: found[key] for key in a if key in found}


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _finest(dtypes: set[torch.dtype]) -> float:
    """The smallest step of any of them."""
    return min(torch.finfo(dtype).eps for dtype in dtypes)


def _move_to_neighbours(weights: list[Tensor]) -> None:
    """Every element to the next larger or smaller fp32 number, by a coin."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        for piece in weight.data.view(-1).split(1 << 24):  # in pieces: temporaries of a whole embedding table would be gigabytes
            up = torch.rand(piece.shape, generator=generator).to(piece.device) < 0.5
            target = torch.where(up, torch.inf, -torch.inf).to(piece)
            piece.copy_(torch.nextafter(piece, target))


def _round_to(weights: list[Tensor], dtype: torch.dtype) -> None:
    for weight in weights:
        weight.data.copy_(weight.data.to(dtype))


def _close(side: Side) -> None:
    """Let another side have the memory and the groups."""
    if isinstance(side, CheckpointModel):
        destroy_groups()
        del side.model
    gc.collect()
