"""Checks of `config.model`: tower, decoder, rotary scaling and adapters; `config_check.check` calls them.

Each refusal is a ValueError with the values, the rule and the way out.
"""

from __future__ import annotations

import math

from megatron_longvila.config import Config, LLMConfig, RopeScaling


def check_model(config: Config) -> None:
    """ValueError for the first rule that the model breaks, alone or with tp and the context length."""
    _check_vision(config)
    _check_llm(config)
    _check_lora(config)


def _check_vision(config: Config) -> None:
    vision = config.model.vision
    if vision.preprocess == "dynamic":
        raise ValueError(
            "model.vision.preprocess='dynamic' (tiling of images) is not supported: a frame is one square image; use 'resize' or 'pad'"
        )
    if vision.image_size < vision.patch_size:
        raise ValueError(
            f"model.vision.image_size={vision.image_size} must be at least patch_size={vision.patch_size}; raise image_size (384 or 448)"
        )
    if not 1 <= vision.built_layers <= vision.num_layers:
        raise ValueError(
            f"model.vision.select_layer={vision.select_layer} must count from the end, between -1 and -num_layers = -{vision.num_layers}; "
            "-2 is what LongVILA uses"
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise ValueError(
            f"model.vision.hidden_size={vision.hidden_size} must be divisible by num_attention_heads={vision.num_attention_heads}; "
            "take both from the tower's config.json"
        )
    for name in ("num_attention_heads", "ffn_hidden_size"):
        _check_tp(config, "vision", name)


def _check_llm(config: Config) -> None:
    llm = config.model.llm
    if llm.num_attention_heads % llm.num_query_groups:
        raise ValueError(
            f"model.llm.num_attention_heads={llm.num_attention_heads} must be divisible by num_query_groups={llm.num_query_groups} "
            "(query heads share KV heads in whole groups); take both from the model's config.json"
        )
    if llm.head_dim % 2:
        raise ValueError(
            f"model.llm.head_dim={llm.head_dim} must be even: rotary embeddings turn pairs; take it from the model's config.json"
        )
    for name in ("num_attention_heads", "ffn_hidden_size", "padded_vocab_size"):
        _check_tp(config, "llm", name)
    if llm.rotary_base <= 1:
        raise ValueError(f"model.llm.rotary_base={llm.rotary_base} must be above 1; Qwen2 uses 1000000.0, Llama 3 500000.0")
    if llm.rope_scaling is not None:
        _check_rope_scaling(llm, llm.rope_scaling)
    if config.data.context_length > llm.max_position_embeddings:
        raise ValueError(
            f"data.context_length={config.data.context_length} must not exceed model.llm.max_position_embeddings="
            f"{llm.max_position_embeddings}: positions beyond it were never trained; raise both it and rotary_base "
            "(the context-extension stage), or lower context_length"
        )


def _check_rope_scaling(llm: LLMConfig, scaling: RopeScaling) -> None:
    prefix, trained_length = "model.llm.rope_scaling", scaling.original_max_position_embeddings
    if scaling.factor < 1:
        raise ValueError(f"{prefix}.factor={scaling.factor} must be at least 1; remove rope_scaling for no scaling")
    if scaling.type != "linear" and trained_length < 1:
        raise ValueError(
            f"{prefix}.original_max_position_embeddings={trained_length} must be positive with type={scaling.type!r}: it is the context "
            "length before scaling; take it from the model's config.json"
        )
    if scaling.type == "llama3" and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"{prefix}.low_freq_factor={scaling.low_freq_factor} must be positive and below high_freq_factor={scaling.high_freq_factor}; "
            "Llama 3.1 uses 1.0 and 4.0"
        )
    if scaling.type == "dynamic" and trained_length >= llm.max_position_embeddings:
        raise ValueError(
            f"{prefix}.original_max_position_embeddings={trained_length} must be below model.llm.max_position_embeddings="
            f"{llm.max_position_embeddings} with type='dynamic', or no row is ever long enough to be scaled; raise "
            "max_position_embeddings or remove rope_scaling"
        )
    if scaling.type == "dynamic" and llm.head_dim < 4:
        raise ValueError(f"model.llm.head_dim={llm.head_dim} must be at least 4 for {prefix}.type='dynamic'; use 'linear'")
    if scaling.type == "yarn":
        _check_yarn(prefix, scaling)


def _check_yarn(prefix: str, scaling: RopeScaling) -> None:
    if not 0 < scaling.beta_slow < scaling.beta_fast:
        raise ValueError(
            f"{prefix}.beta_slow={scaling.beta_slow} must be positive and below beta_fast={scaling.beta_fast}; YaRN uses 1.0 and 32.0"
        )
    least = 2 * math.pi * scaling.beta_slow
    if scaling.original_max_position_embeddings <= least:
        raise ValueError(
            f"{prefix}.original_max_position_embeddings={scaling.original_max_position_embeddings} must exceed 2 * pi * beta_slow = "
            f"{least:.1f}, or no frequency is interpolated; set it to the context the model was trained on"
        )
    if scaling.attention_factor < 0:
        raise ValueError(f"{prefix}.attention_factor={scaling.attention_factor} must not be negative; 0 takes 0.1 * ln(factor) + 1")


def _check_lora(config: Config) -> None:
    lora, llm = config.model.lora, config.model.llm
    if lora.rank < 0:
        raise ValueError(f"model.lora.rank={lora.rank} must not be negative; 0 builds no adapter")
    if not lora.rank:
        return
    if lora.alpha <= 0:
        raise ValueError(f"model.lora.alpha={lora.alpha} must be positive: adapters are scaled by alpha / rank; LongVILA uses 16")
    if not lora.targets or len(set(lora.targets)) != len(lora.targets):
        raise ValueError(
            f"model.lora.targets={lora.targets} must name at least one of q, k, v, o, each once; set --model.lora.targets '[q, k, v, o]' "
            "or --model.lora.rank 0"
        )
    heads = {"q": llm.num_attention_heads, "k": llm.num_query_groups, "v": llm.num_query_groups, "o": llm.num_attention_heads}
    sides = {target: min(llm.hidden_size, heads[target] * llm.head_dim) for target in lora.targets}
    target = min(sides, key=sides.__getitem__)
    if lora.rank >= sides[target]:
        raise ValueError(
            f"model.lora.rank={lora.rank} must be below {sides[target]}, the smaller side of the {target} projection, or the adapter is no "
            "smaller than the weight; lower rank (8 is LongVILA's) or train the whole decoder (training.trainable [llm])"
        )
    tp_size = config.parallel.tp_size
    if llm.num_query_groups % tp_size and set(lora.targets) & {"q", "k", "v"}:
        fits = max(size for size in range(1, tp_size + 1) if llm.num_query_groups % size == 0 and _divides_model(config, size))
        raise ValueError(
            f"model.llm.num_query_groups={llm.num_query_groups} must be divisible by parallel.tp_size={tp_size}, because adapters of "
            f"q, k and v are split by whole key/value heads; use --parallel.tp_size {fits} or --model.lora.targets '[o]'"
        )


def _check_tp(config: Config, part: str, name: str) -> None:
    value, tp_size = getattr(getattr(config.model, part), name), config.parallel.tp_size
    if value % tp_size:
        fits = max(size for size in range(1, tp_size + 1) if _divides_model(config, size))
        raise ValueError(f"model.{part}.{name}={value} must be divisible by parallel.tp_size={tp_size}; use --parallel.tp_size {fits}")


def _divides_model(config: Config, tp_size: int) -> bool:
    """Whether no rule about tp_size and the model alone is broken."""
    vision, llm = config.model.vision, config.model.llm
    split = (vision.num_attention_heads, vision.ffn_hidden_size, llm.num_attention_heads, llm.ffn_hidden_size, llm.padded_vocab_size)
    groups = llm.num_query_groups
    return all(value % tp_size == 0 for value in split) and (groups % tp_size == 0 or tp_size % groups == 0)
