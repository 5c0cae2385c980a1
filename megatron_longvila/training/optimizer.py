"""Megatron's data parallelism, distributed optimizer and schedule, set up from the configuration.

Always the DistributedOptimizer, also at dp 1: checkpoints of both kinds of optimizer have different keys, and layouts must be exchangeable.
"""

from __future__ import annotations

import math

import torch

from megatron_longvila.config import Config
from megatron_longvila.models.init import unfused_name
from megatron_longvila.models.lora import is_adapter
from megatron_longvila.platform import mcore

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # isort: skip
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # isort: skip
from megatron.core.optimizer.optimizer import ChainedOptimizer  # isort: skip
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes  # isort: skip

# Part of the model as a user names it -> whether a parameter belongs to it, by its name as models/init.py gives it.
PARTS = {
    "vision": lambda name: name.startswith("vision_tower."),
    "projector": lambda name: name.startswith("projector."),
    "llm": lambda name: name.startswith("language_model.") and not is_adapter(name),
    "lora": is_adapter,
    "llm_norms": lambda name: name.startswith("language_model.") and "norm" in name,
    "llm_embeddings": lambda name: name.startswith(("language_model.embedding.", "language_model.output_layer.")),
}


def is_trainable(name: str, trainable: list[str]) -> bool:
    """Whether the parameter `name` trains when `trainable` lists the parts that do."""
    return any(PARTS[part](unfused_name(name)) for part in trainable)


def freeze(model: torch.nn.Module, trainable: list[str]) -> None:
    """Let only the parameters of the parts in `trainable` take gradients. Must run before DDP, which sizes its buffers by that.

    Raises:
        ValueError: `trainable` is empty or names an unknown part, or names adapters of a model without, or the reverse.
    """
    unknown = sorted(set(trainable) - PARTS.keys())
    if unknown or not trainable:
        raise ValueError(f"training.trainable={trainable} must name at least one of {sorted(PARTS)} and nothing else")
    adapted = any(is_adapter(name) for name, _ in model.named_parameters())
    if "lora" in trainable and not adapted:
        raise ValueError(f"training.trainable={trainable} names lora, but model.lora.rank=0 builds no adapter; use --model.lora.rank 8")
    if adapted and "lora" not in trainable:
        raise ValueError(
            f"training.trainable={trainable} leaves the adapters of model.lora.rank frozen; add lora to it, or merge them into the "
            "weights with tools/merge_lora.py and set --model.lora.rank 0"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trainable(name, trainable)


def wrap_ddp(model: torch.nn.Module, config: Config) -> DistributedDataParallel:
    """Megatron's DDP around one model chunk: gradients summed in fp32 over dp x cp, then divided once by the token count."""
    for parameter in model.parameters():
        # Plain modules (the patch convolution, norms) would otherwise be taken for tensor-parallel duplicates or shards by the grad norm.
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # the loop checks loss and gradient norm itself, and names the samples
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(model: DistributedDataParallel, config: Config) -> MegatronOptimizer:
    """AdamW over the trainable parameters; biases and other one-dimensional parameters have no weight decay.

    Ranks without a trainable parameter get an optimizer too: gradient norm and checkpoint are collectives over all ranks.
    """
    mcore.select_adam(config.optimizer.backend)
    bf16 = config.training.precision == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.beta1,
        adam_beta2=config.optimizer.beta2,
        adam_eps=config.optimizer.eps,
        clip_grad=config.optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # The gloo twins of the data-parallel groups gather the optimizer state for checkpoints in host memory.
    return get_megatron_optimizer(settings, [model], use_gloo_process_groups=True)


def warmup_steps(config: Config, total_steps: int) -> int:
    """Warm-up steps of a run of `total_steps`. Raises ValueError if the warm-up does not leave a step to train at full rate."""
    settings = config.optimizer
    if settings.warmup_steps and settings.warmup_fraction:
        raise ValueError(
            f"optimizer.warmup_steps={settings.warmup_steps} and optimizer.warmup_fraction={settings.warmup_fraction} are set; keep one"
        )
    steps = settings.warmup_steps or math.ceil(settings.warmup_fraction * total_steps)
    if steps >= total_steps:
        field = "warmup_steps" if settings.warmup_steps else "warmup_fraction"
        raise ValueError(
            f"the warm-up of {steps} steps must be shorter than the run of {total_steps} steps; "
            f"lower optimizer.{field}={getattr(settings, field)}, 0 is no warm-up"
        )
    return steps


def build_scheduler(optimizer: MegatronOptimizer, config: Config, total_steps: int | None) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then cosine to min_lr at the last step, or constant. Counted in steps; weight decay is constant.

    Args:
        total_steps: None where `set_length` will say it, before the first step.

    Raises:
        ValueError: see `warmup_steps`.
    """
    settings = config.optimizer
    warmup, total_steps = (0, 1) if total_steps is None else (warmup_steps(config, total_steps), total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run takes the count of steps from the checkpoint, the rest from the configuration
    )


def set_length(scheduler: OptimizerParamScheduler, config: Config, total_steps: int) -> None:
    """Let a schedule end at step `total_steps`, which a resumed run knows only when its data position is loaded.

    Raises:
        ValueError: see `warmup_steps`.
    """
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps = warmup_steps(config, total_steps), total_steps


def apply_settings(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, config: Config) -> None:
    """Write the configured rates into the optimizer's groups: a loaded optimizer state brings its own, and the configuration wins."""
    for group in optimizer.param_groups:
        group.update(max_lr=config.optimizer.lr, min_lr=config.optimizer.min_lr, eps=config.optimizer.eps)
        group["betas"] = (config.optimizer.beta1, config.optimizer.beta2)
    scheduler.step(0)


def step(optimizer: ChainedOptimizer) -> float:
    """Clip and apply the gradients; returns their norm before clipping, equal on all ranks.

    A norm that is not finite changes nothing: weights and optimizer state stay as they were, and the caller decides.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm
