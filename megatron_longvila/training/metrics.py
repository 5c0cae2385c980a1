"""What a training step reports: model FLOPs, one JSON line per logged step, optional TensorBoard and W&B, and the loss curve.

FLOPs are those of the model, not of the machine: recomputed layers, padding, padded vocabulary columns and pipeline bubbles do not count.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
import uuid
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_longvila.config import Config

# Dense bf16 peak of one device in FLOP/s, by a piece of its name; the first that fits counts, so cards with less power come before those
# they are named after. Sources: the vendors' data sheets, figures without sparsity.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PEAK_FLOPS |= {"GB200": 2500e12, "B200": 2250e12}
PACE_STEPS = 50  # the ETA follows the mean of so many recent steps


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, None if the name is not in the table (a CPU, for one)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"{name}(?!\d)", device_name)), None)  # an A1000 is no A100


@dataclass
class Pace:
    """What happened since the last logged step, and how long recent steps took."""

    tokens: float = 0.0
    frames: float = 0.0
    flops: float = 0.0
    elapsed_s: float = 0.0
    data_wait_s: float = 0.0
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))

    def eta_s(self, steps: int) -> float:
        """Seconds that so many steps take at the recent pace."""
        return steps * sum(self.recent_s) / len(self.recent_s)

    def reset(self) -> None:
        """Begin the next logging interval."""
        self.tokens = self.frames = self.flops = self.elapsed_s = self.data_wait_s = 0.0


@dataclass(frozen=True)
class RowCost:
    """Forward and backward FLOPs of a row, split as they scale: `frame` per frame, `token` per unpadded token, `pair` per attended pair
    of positions of one sample (L * (L + 1) / 2 of them for a sample of L tokens), `label` per labelled row."""

    frame: float
    token: float
    pair: float
    label: float

    def row(self, sample_lengths: tuple[int, ...], num_frames: int, num_labels: int) -> float:
        """FLOPs of a row of samples of these unpadded lengths."""
        pairs = sum(length * (length + 1) / 2 for length in sample_lengths)
        return self.frame * num_frames + self.token * sum(sample_lengths) + self.pair * pairs + self.label * num_labels


def row_cost(config: Config) -> RowCost:
    """FLOPs of training on a row, from the matrix products of the model; 2 FLOPs per multiply-add.

    Forward: a linear layer of a x b costs 2ab per row, attention 4 * heads * head_dim per pair (scores and values). Backward costs a linear
    layer once more for its weight (if it is trained) and once more for its input (if anything before it is trained); attention has no
    weight, and its backward costs twice its forward. Norms, activations, rotary, softmax and adapters are left out.
    """
    vision, projector, llm = config.model.vision, config.model.projector, config.model.llm
    trained = set(config.training.trainable)
    tower_factor = 3 if "vision" in trained else 1
    projector_factor = 1 + ("projector" in trained) + ("vision" in trained)
    # A trained decoder passes gradients through all of its layers; a frozen one only if something before it is trained.
    llm_factor = 3 if "llm" in trained else 2 if trained else 1
    llm_attention_factor = 3 if trained else 1
    head_factor = 3 if trained & {"llm", "llm_embeddings"} else llm_factor

    patches, width = vision.grid_size**2, vision.hidden_size
    tower_layer = 2 * patches * (4 * width * width + 2 * width * vision.ffn_hidden_size) + 4 * patches * patches * width
    frame = tower_factor * (vision.built_layers * tower_layer + 2 * patches * 3 * vision.patch_size**2 * width)
    hidden = llm.hidden_size
    first = width * projector.downsample**2 * hidden
    if projector.type == "linear":
        layers = width * hidden
    elif projector.type == "mlp_downsample_3x3_fix":
        layers = 9 * width * 3 * width + 3 * width * hidden + hidden * hidden
    else:
        layers = first + hidden * hidden
    frame += projector_factor * 2 * config.model.tokens_per_frame * layers

    heads = llm.num_attention_heads * llm.head_dim
    kv_heads = llm.num_query_groups * llm.head_dim
    layer = 2 * (hidden * (heads + 2 * kv_heads) + heads * hidden + 3 * hidden * llm.ffn_hidden_size)
    return RowCost(
        frame=frame,
        token=llm_factor * llm.num_layers * layer,
        pair=llm_attention_factor * llm.num_layers * 4 * heads,
        label=head_factor * 2 * hidden * llm.vocab_size,
    )


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        loss: mean over the labelled tokens of the global batch; None if it had none (the step then changed nothing).
        grad_norm: before clipping; None if there was no update.
        tokens_per_s, frames_per_s: unpadded tokens and frames of the whole job.
        mfu: model FLOPs per second over the peak of all devices; None where the peak is unknown.
        data_wait_s: the longest any rank waited for its rows.
        memory_gib: the most any rank has used so far.
        skipped_samples: samples skipped since the run began.
        eta_s: seconds to the last step at the recent pace.
        sample_ids: of the global batch, row after row; only written with logging.sample_ids.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    frames_per_s: float
    mfu: float | None
    data_wait_s: float
    memory_gib: float
    skipped_samples: int
    eta_s: float
    sample_ids: list[list[str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `sample_ids` only if recorded."""
        fields = asdict(self)
        if self.sample_ids is None:
            del fields["sample_ids"]
        return fields

    def line(self, total_steps: int) -> str:
        """For the console."""
        loss = "no labels" if self.loss is None else f"{self.loss:.4f}"
        norm = "-" if self.grad_norm is None else f"{self.grad_norm:.3f}"
        mfu = "" if self.mfu is None else f" | mfu {self.mfu:.1%}"
        minutes, seconds = divmod(round(self.eta_s), 60)
        return (
            f"step {self.step}/{total_steps} | loss {loss} | lr {self.lr:.3e} | grad norm {norm} | {self.tokens_per_s:.0f} tokens/s | "
            f"{self.frames_per_s:.1f} frames/s{mfu} | data wait {self.data_wait_s:.2f} s | {self.memory_gib:.2f} GiB | "
            f"skipped {self.skipped_samples} | eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        )


@dataclass
class Totals:
    """What a run has done so far, the parts before a resume included; every checkpoint holds it.

    Attributes:
        tokens, labelled_tokens, frames: of all global batches, unpadded.
        counted_steps: see `stages.TrainableCheck`.
        earlier_s: wall time of the parts that the loaded checkpoint ends; what a kill undid does not count.
    """

    tokens: int = 0
    labelled_tokens: int = 0
    frames: int = 0
    counted_steps: int = 0
    earlier_s: float = 0.0

    def __post_init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, evaluations and checkpoints included."""
        return self.earlier_s + time.perf_counter() - self._start

    def start(self) -> None:
        """Let the time run from here."""
        self._start = time.perf_counter()

    def add(self, *, tokens: float, labelled_tokens: float, frames: float) -> None:
        """Count a step."""
        self.tokens += round(tokens)
        self.labelled_tokens += round(labelled_tokens)
        self.frames += round(frames)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self) | {"earlier_s": self.wall_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


class MetricsLog:
    """metrics.jsonl of a run directory and the sinks the configuration asks for. For rank 0."""

    def __init__(self, run_dir: Path, config: Config, resumed_step: int):
        """Open the log. Lines past `resumed_step` (a run that was killed after its last checkpoint) are removed: each step stands once.

        Raises:
            ValueError: a sink is asked for and its package is not installed.
        """
        self.path = run_dir / "metrics.jsonl"
        keep_until(self.path, resumed_step)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (open for the whole run, one write per line)
        self._board = self._run = None
        if config.logging.tensorboard:
            writer = _require("torch.utils.tensorboard", "tensorboard", "--logging.tensorboard false")
            self._board = writer.SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        if config.logging.wandb_project:
            wandb = _require("wandb", "wandb", '--logging.wandb_project ""')
            id_path = run_dir / "wandb_id"
            if not id_path.exists():  # a resumed run goes on in the same W&B run
                id_path.write_text(uuid.uuid4().hex[:8])
            self._run = wandb.init(
                project=config.logging.wandb_project, name=run_dir.name, dir=str(run_dir), id=id_path.read_text(), resume="allow"
            )

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; `values["step"]` is the step."""
        self._file.write(json.dumps(values) + "\n")
        scalars = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, values["step"])
        if self._run is not None:
            self._run.log(scalars, step=values["step"])

    def close(self) -> None:
        """Flush and close every sink."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, empty if there is none. A last line without its newline was cut off by a kill and is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def keep_until(path: Path, step: int) -> None:
    """Remove the lines past `step`; the file exists afterwards."""
    _replace(path, "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step))


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Add one JSON line."""
    with open(path, "a") as stream:
        stream.write(json.dumps(values) + "\n")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a small JSON file in one step: a reader never sees half of it."""
    _replace(path, json.dumps(values) + "\n")


def plot_loss(run_dir: Path) -> Path:
    """Draw the losses of metrics.jsonl and evaluation.jsonl over the steps into loss.png and return its path.

    Raises:
        ValueError: matplotlib is not installed.
    """
    _require("matplotlib", "matplotlib", "draw it elsewhere from metrics.jsonl")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name, label in (("metrics.jsonl", "training"), ("evaluation.jsonl", "held out")):
        points = [(line["step"], line["loss"]) for line in read_lines(run_dir / name) if line["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per labelled token (nats)", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _require(module: str, package: str, otherwise: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} could not be imported ({error}); run: pip install {package}, or {otherwise}") from error
