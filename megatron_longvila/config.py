"""The configuration tree: frozen, typed dataclasses that YAML files and command-line flags fill.

Nothing here imports torch: a configuration is read, checked and printed before any device is touched.
Every field is a flag of the same spelling (`--parallel.ulysses_size 4`). Sizes are counts, `_s` is seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PROJECTORS = ("mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "linear", "mlp2x_gelu")


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower. Defaults: so400m at 384 px.

    Attributes:
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels; patches at the right and bottom that do not fit are dropped (384 / 14 -> 27).
        num_layers: layers of the published tower; `num_layers + select_layer + 1` of them are built.
        select_layer: which hidden state is the feature; -2 is the input of the last layer (LLaVA, VILA).
        preprocess: `resize` to image_size x image_size, or `pad` to a square with the mean colour first.
        frames_per_micro_batch: frames that go through the tower at a time.
    """

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    ffn_hidden_size: int = 4304
    num_layers: int = 27
    num_attention_heads: int = 16
    layernorm_epsilon: float = 1e-6
    select_layer: int = -2
    preprocess: Literal["resize", "pad", "dynamic"] = "resize"
    frames_per_micro_batch: int = 32

    @property
    def built_layers(self) -> int:
        """Transformer layers whose output reaches the loss."""
        return self.num_layers + self.select_layer + 1

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ProjectorConfig:
    """Projector from patch features to visual tokens; `mlp_downsample_2x2_fix` is an alias of `mlp_downsample`."""

    type: Literal["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "linear", "mlp2x_gelu"] = "mlp_downsample"

    @property
    def downsample(self) -> int:
        """Patches merged along one side."""
        return {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}.get(self.type, 1)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling as in a Hugging Face config. Nothing but this field turns scaling on: a longer context alone never does.

    Attributes:
        type: `linear` divides positions by `factor`; `dynamic` raises the base with the length of the row's longest sample
            beyond `original_max_position_embeddings` (NTK-aware); `yarn` interpolates by wavelength and scales the angles' cosine and sine;
            `llama3` rescales by wavelength.
        factor: how many times longer than it was trained for the context becomes.
        low_freq_factor: of `llama3`.
        high_freq_factor: of `llama3`.
        original_max_position_embeddings: context length before scaling.
        beta_fast: of `yarn`: rotations within the original context above which a frequency stays as it is.
        beta_slow: of `yarn`: rotations below which a frequency is divided by `factor`.
        attention_factor: of `yarn`: what cosine and sine are multiplied by; 0 means 0.1 * ln(factor) + 1.
    """

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the decoder's attention projections; one per projection, also where Megatron fuses q, k and v.

    Attributes:
        rank: columns of A; 0 builds no adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: projections that get an adapter, in every decoder layer.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[Literal["q", "k", "v", "o"]] = field(default_factory=lambda: ["q", "k", "v", "o"])


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2 or Llama decoder. Defaults: Qwen2-7B.

    Attributes:
        num_query_groups: key/value heads.
        head_dim: dimension of one head.
        vocab_size: rows of the embedding table that mean something; it is padded to a multiple of 128 in memory.
    """

    architecture: Literal["qwen2", "llama"] = "qwen2"
    hidden_size: int = 3584
    ffn_hidden_size: int = 18944
    num_layers: int = 28
    num_attention_heads: int = 28
    num_query_groups: int = 4
    head_dim: int = 128
    vocab_size: int = 151648
    max_position_embeddings: int = 32768
    rotary_base: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows in memory: a multiple of 128 whatever the layout, so that checkpoints do not depend on tp."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class ModelConfig:
    """The three parts and how their layers run.

    Attributes:
        layers: `local` uses Megatron's own linear layers, `te` Transformer Engine's.
        attention_backend: `auto` is cuDNN on a GPU and torch's CPU kernel on a CPU.
        kernels: what runs between the matrix products and attention: Triton's fused kernels or plain PyTorch (`reference`); `auto` is
            Triton on a GPU and PyTorch on a CPU.
        init_std: standard deviation of freshly initialised weights.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    layers: Literal["local", "te"] = "local"
    attention_backend: Literal["auto", "cudnn", "flash", "cpu", "reference"] = "auto"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    init_std: float = 0.02

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of one frame or image, without the newline tokens that follow it."""
        return (-(-self.vision.grid_size // self.projector.downsample)) ** 2


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh. Ranks are laid out tp (fastest), ulysses, ring, dp, pp (slowest); cp_size = ulysses_size * ring_size.

    Attributes:
        cp_size: ranks that share one sequence; `auto` is ulysses_size * ring_size.
        ulysses_size: inner MM-SP axis (heads all-to-all); `auto` takes the largest that fits heads and host, unless the model in
            mesh_cost.py finds another mesh cheaper by more than it may be wrong.
        ring_size: outer MM-SP axis (keys and values travel); `auto` is cp_size / ulysses_size.
        pipeline_layers: decoder layers of each pipeline stage; empty means as even as possible, earlier stages smaller.
        virtual_pp_size: only 1 is supported.
        ring_transport: `all_gather` or `p2p`; `auto` is all_gather while a ring group stays on one host.
        gpus_per_host: ranks of one host; `auto` reads LOCAL_WORLD_SIZE, else the world size.
        host_gb_per_s, network_gb_per_s: 10**9 bytes per second that one GPU sends to others on its host, and across hosts; only the
            choice of an `auto` mesh looks at them.
        timeout_s: how long any collective of any group may take before the job is taken down.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int | Literal["auto"] = "auto"
    ulysses_size: int | Literal["auto"] = "auto"
    ring_size: int | Literal["auto"] = "auto"
    pipeline_layers: list[int] = field(default_factory=list)
    virtual_pp_size: int = 1
    sequence_parallel: bool = False
    ring_transport: Literal["auto", "all_gather", "p2p"] = "auto"
    gpus_per_host: int | Literal["auto"] = "auto"
    host_gb_per_s: float = 320.0
    network_gb_per_s: float = 45.0
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = False
    timeout_s: float = 600.0


@dataclass(frozen=True)
class VideoConfig:
    """How a video becomes frames (the rules of the paper's public code; see data/video.py).

    Attributes:
        frame_rule: `uniform` (num_frames by linspace), `fps_capped` (fps up to num_frames over the whole clip) or `fps_head`
            (fps from the start, the first num_frames only).
        fps: frames per second of the two fps rules.
        on_bad_frame: a frame that does not decode is replaced by the nearest good one, or skips the sample, or fails the run.
        timeout_s: wall-clock limit for decoding one video.
        fast_resize: let the decoder scale (quicker, not bit-equal to the default bicubic path).
    """

    frame_rule: Literal["uniform", "fps_capped", "fps_head"] = "uniform"
    num_frames: int = 8
    fps: float = 2.0
    on_bad_frame: Literal["nearest", "skip_sample", "fail"] = "nearest"
    timeout_s: float = 60.0
    fast_resize: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on. A row is one pack of whole samples and the unit of a micro-batch.

    Attributes:
        train: dataset folders written by tools/preprocess_video.py or tools/preprocess_text.py; an epoch shows every sample once.
        mixture: instead of `train`, what an epoch shows: a mixture of `registry`, or an expression such as `a + 2*b` of its names.
        registry: YAML file of datasets and mixtures (data/registry.py has the format).
        stage: whose limits in the registry hold.
        evaluation: the same, held out.
        tokenizer: a SentencePiece `.model` file or a Hugging Face tokenizer folder.
        context_length: tokens of a row before padding.
        text_attention: how a row of tools/preprocess_text.py is attended: `row` as a whole, across the documents in it (the paper's
            public recipe), or every `document` by itself, with its own positions.
        global_batch_size: rows of one optimizer step over all data-parallel ranks.
        num_workers: threads that decode ahead.
        max_bad_fraction: the run fails when more samples than this share had to be skipped.
    """

    train: list[str] = field(default_factory=list)
    mixture: str = ""
    registry: str = ""
    stage: str = ""
    evaluation: list[str] = field(default_factory=list)
    tokenizer: str = ""
    template: Literal["chatml", "llama3", "plain"] = "chatml"
    context_length: int = 4096
    text_attention: Literal["row", "document"] = "row"
    global_batch_size: int = 1
    num_workers: int = 2
    max_bad_fraction: float = 0.05
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. Exactly one of warmup_steps and warmup_fraction may be non-zero."""

    backend: Literal["torch", "te", "apex"] = "torch"
    lr: float = 2e-5
    min_lr: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, for how long, and how memory is spent.

    Attributes:
        steps: optimizer steps; 0 means `epochs` decides.
        trainable: parts whose parameters train. `llm` is the whole decoder; `lora` its adapters; `llm_norms` its norms and
            `llm_embeddings` its input embedding and output layer, for training next to the adapters.
        check_trainable: after the third step with lr > 0 whose rows held media and labels, and at the end, fail if a trainable tensor has
            not moved or a frozen one has. At the end the last checkpoint's frozen tensors are also compared with the input's files.
        may_see_no_gradient: names (shell patterns) of trainable tensors that may go without gradient for the whole run.
        recompute: `full` recomputes decoder layers in backward, `selective` only their attention.
        loss_chunk_rows: labelled rows whose logits exist at a time.
        evaluation_interval: steps between evaluations; 0 means only at the end.
        evaluation_rows: rows of the held-out set to use; 0 means all.
    """

    steps: int = 0
    epochs: int = 1
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    trainable: list[Literal["vision", "projector", "llm", "lora", "llm_norms", "llm_embeddings"]] = field(
        default_factory=lambda: ["vision", "projector", "llm"]
    )
    check_trainable: bool = True
    may_see_no_gradient: list[str] = field(default_factory=list)
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_vision: bool = False
    loss_chunk_rows: int = 4096
    evaluation_interval: int = 0
    evaluation_rows: int = 0


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are Megatron `torch_dist` folders under `output_dir/checkpoints`.

    Attributes:
        save_interval: steps between checkpoints; 0 means only at the end and on a signal.
        save_at_end: write one after the last step; off for benchmarks, whose weights nobody wants.
        keep_last: how many are kept.
        async_save: write in the background while training goes on.
        resume: continue from the newest complete checkpoint of output_dir if there is one.
        load: a checkpoint folder whose weights start the run (no optimizer, no data position).
        load_parts: the parts taken from it; the others, and adapters it does not hold, are initialised.
    """

    save_interval: int = 0
    save_at_end: bool = True
    keep_last: int = 2
    async_save: bool = False
    resume: bool = True
    load: str = ""
    load_parts: list[Literal["vision", "projector", "llm"]] = field(default_factory=lambda: ["vision", "projector", "llm"])


@dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl is always written; TensorBoard and W&B are optional sinks."""

    interval: int = 1
    sample_ids: bool = False
    tensorboard: bool = False
    wandb_project: str = ""


@dataclass(frozen=True)
class Config:
    """Everything a run is."""

    output_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
