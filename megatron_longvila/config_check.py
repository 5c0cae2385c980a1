"""Cross-field checks of a configuration: every rule that joins two fields, before torch is imported and any GPU is touched.

Each refusal is a ValueError with the values, the rule and the way out.
"""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import NoReturn

from megatron_longvila.config import Config, DataConfig, OptimizerConfig, ParallelConfig
from megatron_longvila.config_check_model import check_model
from megatron_longvila.mesh import Mesh, pipeline_layers, resolve_mesh
from megatron_longvila.mesh_cost import Row

MAX_BATCH_TOKENS = 2**31 - 1  # megatron's schedules count tokens in int32
SPEAKS_WITHIN_S = 10.0  # the first rank of a host has met the same error by then


def check(config: Config, world_size: int) -> Mesh:
    """The mesh of a legal configuration on `world_size` ranks; ValueError for the first rule that is broken.

    Reads no file and imports no torch: `check_inputs` and `check_device` look at the disk and at the machine.
    """
    _check_finite(config)
    _check_positive(config)
    if not config.output_dir:
        raise ValueError("output_dir='' must name a folder, or the run would be strewn over the current one; set --output_dir DIR")
    check_model(config)
    mesh = _mesh(config, world_size)
    _check_parallel(config, mesh)
    _check_data(config, mesh)
    _check_optimizer(config.optimizer, config.training.steps)
    _check_training(config)
    _check_trainable(config)
    _check_checkpoint(config)
    _check_extras(config)
    return mesh


def resolve(config: Config, *, world_size: int, gpus_per_host: int) -> Config:
    """The checked `config` with every `auto` of the mesh replaced by its number: what is printed, saved and used by a resume.

    `gpus_per_host` is used where the configuration says `auto`. Raises ValueError as `check` does.
    """
    if config.parallel.gpus_per_host == "auto":
        config = replace(config, parallel=replace(config.parallel, gpus_per_host=gpus_per_host))
    mesh = check(config, world_size)
    return replace(
        config, parallel=replace(config.parallel, cp_size=mesh.cp_size, ulysses_size=mesh.ulysses_size, ring_size=mesh.ring_size)
    )


def check_inputs(config: Config) -> None:
    """Raises ValueError if a dataset, the tokenizer or the checkpoint a training run names is not there."""
    _check_mixture_fields(config.data)
    if not config.data.train and not config.data.mixture:
        raise ValueError(
            "data.train=[] must name at least one folder written by tools/preprocess_video.py or tools/preprocess_text.py; "
            "set --data.train '[DIR]'"
        )
    for name, folders in (("train", config.data.train), ("evaluation", config.data.evaluation)):
        for folder in folders:
            if not Path(folder, "dataset.json").is_file():
                raise ValueError(
                    f"data.{name}: {folder!r} holds no dataset.json; write it with tools/preprocess_video.py --output {folder} "
                    "(or tools/preprocess_text.py for plain text)"
                )
    if not config.data.tokenizer:
        raise ValueError(
            "data.tokenizer='' must be a SentencePiece .model file or a Hugging Face tokenizer folder; set --data.tokenizer PATH"
        )
    # A run that goes on has its weights; only training.check_trainable may want the old ones, and looks for them where they were, too.
    goes_on = config.checkpoint.resume and Path(config.output_dir, "checkpoints", "latest").is_file()
    for name, path in (("data.tokenizer", config.data.tokenizer), ("checkpoint.load", "" if goes_on else config.checkpoint.load)):
        if path and not Path(path).exists():
            raise ValueError(f"{name}={path!r} does not exist; correct the path (relative paths start at {Path.cwd()})")


def _check_mixture_fields(data: DataConfig) -> None:
    """data.train or data.mixture, and the registry that goes with the latter; what the registry says is looked at when it is read."""
    if data.mixture and data.train:
        raise ValueError(
            f"data.train={data.train} and data.mixture={data.mixture!r} are both set; a mixture names all it is made of: "
            "add the folders to the registry and set --data.train '[]', or leave data.mixture empty"
        )
    if data.mixture and not data.registry:
        raise ValueError(f"data.mixture={data.mixture!r} needs the file that says what its names are; set --data.registry FILE.yaml")
    for name in ("registry", "stage"):
        if getattr(data, name) and not data.mixture:
            raise ValueError(
                f"data.{name}={getattr(data, name)!r} means nothing while data.mixture is empty; set --data.mixture NAME, or leave it out"
            )


def refuse(error: ValueError, local_rank: int) -> NoReturn:
    """End this rank for what a user did wrong: one line on stderr and exit status 1.

    One voice per host: all ranks see the same command line, and a launcher ends them as soon as one has exited, so the others wait for the
    first one to speak. Whoever is still there afterwards has met an error of its own and speaks too.
    """
    if local_rank:
        time.sleep(SPEAKS_WITHIN_S)
    raise SystemExit(f"error: {error}")


def check_device(config: Config) -> None:
    """Raises ValueError if this machine has not what the configuration asks of it. Imports torch."""
    from megatron_longvila import platform

    if not platform.is_cpu():
        if config.training.precision == "fp32" and config.model.attention_backend == "auto":
            raise ValueError(
                "model.attention_backend='auto' is cuDNN on a CUDA device, which has no fp32 kernel, but training.precision='fp32'; use "
                "--training.precision bf16 or --model.attention_backend reference, or hide the devices with CUDA_VISIBLE_DEVICES="
            )
        if config.model.attention_backend == "cpu":
            raise ValueError("model.attention_backend='cpu' is for machines without a CUDA device; use --model.attention_backend auto")
        return
    for name, value, otherwise in (
        ("model.layers", config.model.layers, "local"),
        ("model.attention_backend", config.model.attention_backend, "auto"),
        ("model.kernels", config.model.kernels, "auto"),
        ("optimizer.backend", config.optimizer.backend, "torch"),
    ):
        if value in ("te", "apex", "cudnn", "flash", "triton"):
            raise ValueError(f"{name}={value!r} needs a CUDA device and this machine shows none; use --{name} {otherwise}")


def _check_finite(part: object, prefix: str = "") -> None:
    """No field is infinite, and none is `nan`, which would pass the rules below: it is neither above nor below anything."""
    for field in fields(part):
        name, value = prefix + field.name, getattr(part, field.name)
        if is_dataclass(value):
            _check_finite(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number; give one, or leave it out for the default")


def _check_positive(config: Config) -> None:
    """Counts that make no sense below one (or zero)."""
    vision, llm, video = config.model.vision, config.model.llm, config.data.video
    for prefix, part, names in (
        (
            "model.vision",
            vision,
            "image_size patch_size hidden_size ffn_hidden_size num_attention_heads frames_per_micro_batch layernorm_epsilon",
        ),
        ("model.llm", llm, "hidden_size ffn_hidden_size num_layers num_attention_heads num_query_groups head_dim vocab_size norm_epsilon"),
        ("model", config.model, "init_std"),
        ("data", config.data, "context_length global_batch_size"),
        ("data.video", video, "num_frames fps timeout_s"),
        ("parallel", config.parallel, "tp_size pp_size timeout_s"),
        ("training", config.training, "loss_chunk_rows"),
        ("checkpoint", config.checkpoint, "keep_last"),
        ("logging", config.logging, "interval"),
    ):
        for name in names.split():
            if getattr(part, name) <= 0:
                raise ValueError(f"{prefix}.{name}={getattr(part, name)} must be positive; the default is {getattr(type(part)(), name)}")
    for prefix, part, names in (
        ("training", config.training, "steps evaluation_interval evaluation_rows"),
        ("checkpoint", config.checkpoint, "save_interval"),
        ("data", config.data, "num_workers"),
    ):
        for name in names.split():
            if getattr(part, name) < 0:
                raise ValueError(f"{prefix}.{name}={getattr(part, name)} must not be negative; 0 turns it off")


def _mesh(config: Config, world_size: int) -> Mesh:
    llm, parallel = config.model.llm, config.parallel
    gpus_per_host = world_size if parallel.gpus_per_host == "auto" else parallel.gpus_per_host
    if gpus_per_host < 1:
        raise ValueError(f"parallel.gpus_per_host={gpus_per_host} must be at least 1; `auto` takes torchrun's LOCAL_WORLD_SIZE")
    for name in ("host_gb_per_s", "network_gb_per_s"):
        speed = getattr(parallel, name)
        if not speed > 0:
            raise ValueError(f"parallel.{name}={speed} must be positive; the default is {getattr(ParallelConfig(), name)}")
    return resolve_mesh(
        parallel,
        world_size=world_size,
        num_kv_heads=llm.num_query_groups,
        num_heads=llm.num_attention_heads,
        gpus_per_host=gpus_per_host,
        head_dim=llm.head_dim,
        row=_expected_row(config),
    )


def _expected_row(config: Config) -> Row:
    """A full row as the cost of a mesh sees it, guessed without a look at the data.

    Where tower or projector are trained, it is a pack of samples with `num_frames` frames each, as many as fit; a real row holds more
    if they are pictures or short videos, and fewer if their texts are long. Else it is taken for a row of text that is attended as a whole,
    one sample, also where documents are attended by themselves. Too few samples make a ring look cheaper than it is, and too many dearer.
    """
    length = config.data.context_length
    sees = {"vision", "projector"} & set(config.training.trainable)
    return Row(length, max(1, length // _visual_tokens(config)) if sees else 1)


def _visual_tokens(config: Config) -> int:
    """Of a sample with all its frames: each is followed by at least one newline token."""
    return config.data.video.num_frames * (config.model.tokens_per_frame + 1)


def _check_parallel(config: Config, mesh: Mesh) -> None:
    parallel = config.parallel
    if parallel.virtual_pp_size != 1:
        # Megatron's interleaved schedule on two stages gives wrong gradients with batched p2p, without an error.
        raise ValueError(
            f"parallel.virtual_pp_size={parallel.virtual_pp_size} is not supported, only 1 is: interleaved stages are silently wrong on "
            "pp_size=2 in megatron-core 0.16.1; balance the stages with --parallel.pipeline_layers instead"
        )
    pipeline_layers(config.model.llm.num_layers, mesh.pp_size, parallel.pipeline_layers)
    if parallel.sequence_parallel and mesh.tp_size == 1:
        raise ValueError(
            "parallel.sequence_parallel=true shards norm activations over tp and needs tp_size > 1, but tp_size=1; "
            "raise tp_size or set --parallel.sequence_parallel false (MM-SP over ulysses and ring does not need it)"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError(
            "parallel.overlap_param_gather=true needs overlap_grad_reduce=true, which is false; set --parallel.overlap_grad_reduce true"
        )


def _check_data(config: Config, mesh: Mesh) -> None:
    data, model = config.data, config.model
    if data.global_batch_size % mesh.dp_size:
        below, above = data.global_batch_size // mesh.dp_size * mesh.dp_size, -(-data.global_batch_size // mesh.dp_size) * mesh.dp_size
        way_out = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(
            f"data.global_batch_size={data.global_batch_size} must be divisible by dp_size = world_size / (tp * pp * cp) = "
            f"{mesh.world_size} / ({mesh.tp_size} * {mesh.pp_size} * {mesh.cp_size}) = {mesh.dp_size}; use {way_out}, or spread each "
            "sequence over more ranks (ulysses_size, ring_size)"
        )
    visual_tokens = _visual_tokens(config)
    if visual_tokens >= data.context_length:  # a sample has some text
        fits = (data.context_length - 1) // (model.tokens_per_frame + 1)
        way_out = f"lower num_frames to {fits} or less" if fits else "raise context_length"
        raise ValueError(
            f"data.video.num_frames={data.video.num_frames} frames of {model.tokens_per_frame} visual tokens and a newline are "
            f"{visual_tokens} tokens, which must stay below data.context_length={data.context_length} to leave room for text; {way_out}, "
            f"or set --data.context_length above {visual_tokens}"
        )
    batch_tokens = data.global_batch_size * data.context_length
    if batch_tokens > MAX_BATCH_TOKENS:
        raise ValueError(
            f"data.global_batch_size * data.context_length = {data.global_batch_size} * {data.context_length} = {batch_tokens} must not "
            f"exceed {MAX_BATCH_TOKENS}: megatron counts the tokens of a step in int32; lower global_batch_size"
        )
    if not 0 <= data.max_bad_fraction <= 1:
        raise ValueError(f"data.max_bad_fraction={data.max_bad_fraction} must be between 0 and 1; 0.05 allows one bad sample in twenty")


def _check_optimizer(optimizer: OptimizerConfig, steps: int) -> None:
    if optimizer.warmup_steps and optimizer.warmup_fraction:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} and warmup_fraction={optimizer.warmup_fraction} are both set; set one to 0"
        )
    if optimizer.warmup_steps < 0 or not 0 <= optimizer.warmup_fraction < 1:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must not be negative and warmup_fraction={optimizer.warmup_fraction} must be "
            "in [0, 1); 0.03 warms up over 3% of the steps"
        )
    if steps and optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be below training.steps={steps}; the schedule would never leave "
            "warm-up: lower warmup_steps"
        )
    if optimizer.warmup_fraction and 0 < steps <= math.ceil(optimizer.warmup_fraction * steps):
        raise ValueError(
            f"optimizer.warmup_fraction={optimizer.warmup_fraction} of training.steps={steps}, rounded up, is the whole run; the schedule "
            "would never leave warm-up: lower warmup_fraction, 0 is no warm-up"
        )
    if optimizer.lr <= 0 or not 0 <= optimizer.min_lr <= optimizer.lr:
        raise ValueError(
            f"optimizer.lr={optimizer.lr} must be positive and min_lr={optimizer.min_lr} between 0 and lr; lower min_lr or raise lr"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise ValueError(
                f"optimizer.{name}={getattr(optimizer, name)} must be in [0, 1); the default is {getattr(OptimizerConfig(), name)}"
            )
    for name in ("weight_decay", "clip_grad"):
        if getattr(optimizer, name) < 0:
            raise ValueError(f"optimizer.{name}={getattr(optimizer, name)} must not be negative; 0 turns it off")
    if optimizer.eps <= 0:
        raise ValueError(f"optimizer.eps={optimizer.eps} must be positive: AdamW divides by it where a gradient is always 0; use 1e-8")


def _check_training(config: Config) -> None:
    training, model = config.training, config.model
    if not training.steps and training.epochs < 1:
        raise ValueError(f"training.epochs={training.epochs} must be at least 1 when training.steps=0; set one of them")
    if training.evaluation_interval and not config.data.evaluation:
        raise ValueError(
            f"training.evaluation_interval={training.evaluation_interval} needs held-out rows, but data.evaluation=[]; name a dataset "
            "folder or set evaluation_interval to 0"
        )
    if training.precision == "fp32":
        if model.layers == "te":
            raise ValueError(
                "model.layers='te' with training.precision='fp32' would multiply in TF32, not in fp32; use --training.precision bf16 or "
                "--model.layers local"
            )
        if model.attention_backend in ("cudnn", "flash"):
            raise ValueError(
                f"model.attention_backend={model.attention_backend!r} has no fp32 kernel, but training.precision='fp32'; use "
                "--training.precision bf16 or --model.attention_backend reference"
            )


def _check_trainable(config: Config) -> None:
    """Parts that exist, and none inside another."""
    parts, rank = config.training.trainable, config.model.lora.rank
    if not parts:
        raise ValueError(
            "training.trainable=[] leaves nothing to train; name at least one of vision, projector, llm, lora, llm_norms, llm_embeddings"
        )
    if len(set(parts)) != len(parts):
        raise ValueError(f"training.trainable={parts} names a part twice; name each part once")
    inside = [part for part in ("lora", "llm_norms", "llm_embeddings") if part in parts]
    if "llm" in parts and inside:
        raise ValueError(
            f"training.trainable={parts}: llm is the whole decoder, and {', '.join(inside)} part of it or beside it; leave "
            f"{', '.join(inside)} out to train every weight (with model.lora.rank=0), or leave llm out"
        )
    if "lora" in parts and not rank:
        raise ValueError(
            f"training.trainable={parts} names lora, but model.lora.rank=0 builds no adapter; set --model.lora.rank 8 or leave out lora"
        )
    if rank and "lora" not in parts:
        raise ValueError(
            f"model.lora.rank={rank} builds adapters, but training.trainable={parts} does not train them and they would stay zero; "
            "add lora to training.trainable or set --model.lora.rank 0"
        )
    if not all(pattern.strip() for pattern in config.training.may_see_no_gradient):
        raise ValueError(
            f"training.may_see_no_gradient={config.training.may_see_no_gradient} holds an empty pattern, which matches no name; remove it"
        )


def _check_checkpoint(config: Config) -> None:
    parts = config.checkpoint.load_parts
    if not parts or len(set(parts)) != len(parts):
        raise ValueError(
            f"checkpoint.load_parts={parts} must name at least one of vision, projector, llm, each once; to start from initialised weights "
            "leave checkpoint.load empty"
        )


def _check_extras(config: Config) -> None:
    """Optional packages a configuration asks for, looked up without importing them."""
    te = "pip install 'megatron-longvila[te]' on a machine with CUDA"
    for name, value, wanted, package, remedy, otherwise in (
        ("model.layers", config.model.layers, "te", "transformer_engine", te, "--model.layers local"),
        ("optimizer.backend", config.optimizer.backend, "te", "transformer_engine", te, "--optimizer.backend torch"),
        (
            "logging.tensorboard",
            config.logging.tensorboard,
            True,
            "tensorboard",
            "pip install 'megatron-longvila[logging]'",
            "set it to false",
        ),
        (
            "logging.wandb_project",
            bool(config.logging.wandb_project),
            True,
            "wandb",
            "pip install 'megatron-longvila[logging]'",
            "leave it empty",
        ),
    ):
        if value == wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{name}={value!r} needs the package {package}, which is not installed; {remedy}, or {otherwise}")
    if config.optimizer.backend == "apex" and not _has_apex_optimizers():
        raise ValueError(
            "optimizer.backend='apex' needs NVIDIA apex (apex.optimizers), which is not installed; build it from its source repository "
            "(the package named apex on the index is another one), or --optimizer.backend torch"
        )


def _has_apex_optimizers() -> bool:
    """NVIDIA's apex has a folder `optimizers`; the unrelated package of that name has not. Nothing is imported."""
    spec = importlib.util.find_spec("apex")
    return spec is not None and any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ())
