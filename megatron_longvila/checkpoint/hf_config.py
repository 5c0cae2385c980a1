"""Hugging Face configurations (Qwen2, Llama, SigLIP) to ours and back.

Reading understands both spellings of rotary settings (`rope_theta` with `rope_scaling`, `rope_parameters`) and fields that transformers
leaves out because they have its default. Whatever would change the computation and that we do not have is refused. Writing changes only
what differs, so that every key of an imported configuration comes back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_longvila.config import LLMConfig, RopeScaling, VisionConfig

Raw = dict[str, Any]

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
VISION_TYPES = ("siglip_vision_model", "siglip")
# Our field, theirs, and transformers' default per architecture (None: there is none in common).
_LLM_FIELDS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_LLM_DEFAULTS = {
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
}  # fmt: skip
_VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "layernorm_epsilon": "layer_norm_eps",
}
_VISION_DEFAULTS = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new")
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"},
}
_DEFAULT_THETA = 10_000.0
_POSITIVE = ("rms_norm_eps", "layer_norm_eps")  # every other number is a size


def read_llm(raw: Mapping[str, Any], where: str) -> LLMConfig:
    """The decoder that a Qwen2 or Llama configuration describes; `where` names its file in errors.

    Raises:
        ValueError: another architecture, or a setting that changes the computation and that we do not have.
    """
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{where} has model_type={architecture!r}; the decoder must be one of {sorted(ARCHITECTURES)}")
    _refuse_settings(
        where,
        {
            "hidden_act": raw.get("hidden_act", "silu") == "silu",
            "use_sliding_window": not raw.get("use_sliding_window"),
            "attention_bias": architecture != "llama" or not raw.get("attention_bias"),
            "mlp_bias": not raw.get("mlp_bias"),
            "partial_rotary_factor": raw.get("partial_rotary_factor") in (None, 1.0),
            "quantization_config": not raw.get("quantization_config"),
        },
        raw,
    )
    merged = _LLM_DEFAULTS[architecture] | {key: value for key, value in raw.items() if value is not None}
    heads = merged["num_attention_heads"]
    merged.setdefault("num_key_value_heads", heads)
    _check_numbers({name: merged[name] for name in _LLM_FIELDS.values() if name in merged and name != "tie_word_embeddings"}, where)
    if heads % merged["num_key_value_heads"]:
        raise ValueError(f"{where} has {heads} heads, which {merged['num_key_value_heads']} heads for keys and values do not divide")
    merged.setdefault("head_dim", merged["hidden_size"] // heads)
    fields = {ours: merged[theirs] for ours, theirs in _LLM_FIELDS.items()}
    base, scaling = read_rope(merged, where)
    if scaling is not None and scaling.type == "dynamic":
        # transformers' maximum is the trained length, from which on it scales; ours is the length that may be used.
        fields["max_position_embeddings"] = int(fields["max_position_embeddings"] * scaling.factor)
    return LLMConfig(architecture=architecture, rotary_base=base, rope_scaling=scaling, **fields)


def llava_text(raw: Mapping[str, Any]) -> Raw:
    """The decoder's configuration inside that of a LLaVA, whose embedding is tied if either of the two says so, as in transformers."""
    text = dict(raw.get("text_config") or {})
    return text | {"tie_word_embeddings": bool(text.get("tie_word_embeddings") or raw.get("tie_word_embeddings"))}


def read_rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(base, scaling) in either spelling.

    Raises:
        ValueError: the two spellings contradict each other, or the scaling is of a kind, or has a setting, that we do not have.
    """
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if any(settings and not isinstance(settings, Mapping) for settings in (old, new)):
        raise ValueError(f"{where} has rope_scaling={old!r} and rope_parameters={new!r}; each must be an object or null")
    rope = dict(new or old or {})
    if old and new and {**old, "rope_theta": 0} != {**new, "rope_theta": 0}:
        raise ValueError(f"{where} has rope_scaling={old} and rope_parameters={new}, which are not the same; remove the wrong one")
    bases = {float(base) for base in (rope.pop("rope_theta", None), raw.get("rope_theta")) if base is not None}
    if len(bases) > 1:
        raise ValueError(f"{where} has two values for rope_theta, {sorted(bases)}; remove the wrong one")
    base = bases.pop() if bases else _DEFAULT_THETA
    if not 0 < base < math.inf:
        raise ValueError(f"{where} has rope_theta={base}; it must be a positive number")
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not rope and not kinds else None
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{where} has rotary scaling {dict(new or old)}; its type must be one of {', '.join(_ROPE_KEYS)}")
    rope = {key: value for key, value in rope.items() if value is not None and not (key == "partial_rotary_factor" and value == 1.0)}
    unknown = rope.keys() - _ROPE_KEYS[kind] - {"truncate"} if kind != "default" else {"partial_rotary_factor"} & rope.keys()
    if unknown or rope.pop("truncate", True) is not True:
        raise ValueError(f"{where} has rotary settings {sorted(unknown) or ['truncate']} with type {kind!r}, which are not supported")
    if kind == "default":
        return base, None
    if "factor" not in rope or not all(isinstance(value, int | float) and value > 0 for value in rope.values()):
        raise ValueError(f"{where} has rotary scaling {dict(new or old)}; it needs a factor, and its numbers must be positive")
    if kind != "linear":
        rope.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    if kind == "dynamic":  # transformers looks at the maximum alone here
        rope["original_max_position_embeddings"] = raw["max_position_embeddings"]
    numbers = {key: int(value) if key.startswith("original") else float(value) for key, value in rope.items()}
    return base, RopeScaling(kind, **numbers)


def read_vision(raw: Mapping[str, Any], where: str, *, select_layer: int = -2) -> VisionConfig:
    """The tower that a SigLIP configuration describes (a vision configuration, or a whole model's with one inside).

    Raises:
        ValueError: as `read_llm`.
    """
    if raw.get("model_type") not in VISION_TYPES:
        raise ValueError(f"{where} has model_type={raw.get('model_type')!r}; the vision tower must be SigLIP ({', '.join(VISION_TYPES)})")
    raw = _tower_settings(raw)
    activation = raw.get("hidden_act", "gelu_pytorch_tanh")
    _refuse_settings(where, {"hidden_act": activation in _GELU_TANH, "num_channels": raw.get("num_channels", 3) == 3}, raw)
    merged = _VISION_DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    _check_numbers({name: merged[name] for name in _VISION_FIELDS.values()}, where)
    if not isinstance(select_layer, int) or not -merged["num_hidden_layers"] <= select_layer < 0:
        raise ValueError(
            f"{where} has {merged['num_hidden_layers']} layers, of which the feature is taken from layer {select_layer!r}; it must be a "
            f"number from {-merged['num_hidden_layers']} to -1"
        )
    return VisionConfig(select_layer=select_layer, **{ours: merged[theirs] for ours, theirs in _VISION_FIELDS.items()})


def update_llm(raw: Mapping[str, Any], llm: LLMConfig, where: str = "config.json") -> Raw:
    """`raw` with those keys changed that say something else than `llm`; equal to `raw` if it says the same."""
    before, updated = read_llm(raw, where), dict(raw)
    for ours, theirs in _LLM_FIELDS.items():
        if getattr(before, ours) != getattr(llm, ours):
            updated[theirs] = getattr(llm, ours)
    if llm.rope_scaling is not None and llm.rope_scaling.type == "dynamic" and before != llm:
        updated["max_position_embeddings"] = llm.rope_scaling.original_max_position_embeddings
    # Not of `before`: a trained length that the settings leave out is the maximum, which may be another now.
    after = read_llm(updated, where)
    if (after.rotary_base, after.rope_scaling) != (llm.rotary_base, llm.rope_scaling):
        _write_rope_(updated, llm)
    after = read_llm(updated, where)
    # Ours alone says how far beyond the trained length a dynamically scaled model may go.
    assert replace(after, max_position_embeddings=0) == replace(llm, max_position_embeddings=0), (after, llm)
    return updated


def write_llm(llm: LLMConfig) -> Raw:
    """A configuration for a decoder that was never imported; rotary settings in the old spelling, which every reader understands."""
    raw = {"architectures": [ARCHITECTURES[llm.architecture]], "model_type": llm.architecture, "hidden_act": "silu"}
    raw |= {theirs: getattr(llm, ours) for ours, theirs in _LLM_FIELDS.items()}
    _write_rope_(raw, llm)
    if llm.rope_scaling is not None and llm.rope_scaling.type == "dynamic":
        raw["max_position_embeddings"] = llm.rope_scaling.original_max_position_embeddings
    if llm.architecture == "qwen2":
        raw["use_sliding_window"] = False
    return raw


def with_old_rope(raw: Mapping[str, Any], llm: LLMConfig) -> Raw:
    """`raw` with its rotary settings in the old spelling too: readers before transformers 5 overlook rope_parameters and take a default."""
    updated = {"rope_theta": None, "rope_scaling": None} | raw
    _write_rope_(updated, llm)
    return updated


def update_vision(raw: Mapping[str, Any], vision: VisionConfig, where: str = "config.json") -> Raw:
    """As `update_llm`, for the tower; a whole SigLIP model's configuration keeps its other parts."""
    inner = dict(_tower_settings(raw))
    before = read_vision(raw, where, select_layer=vision.select_layer)
    for ours, theirs in _VISION_FIELDS.items():
        if getattr(before, ours) != getattr(vision, ours):
            inner[theirs] = getattr(vision, ours)
    return {**raw, "vision_config": inner} if raw.get("vision_config") else inner


def write_vision(vision: VisionConfig) -> Raw:
    """A configuration for a tower that was never imported."""
    raw = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    raw |= {theirs: getattr(vision, ours) for ours, theirs in _VISION_FIELDS.items()}
    return raw | {"num_channels": 3, "vision_use_head": False}


def _write_rope_(raw: Raw, llm: LLMConfig) -> None:
    """Replace the rotary settings of `raw`, in every spelling it has, or in the old one."""
    scaling = llm.rope_scaling
    rope: Raw = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.type} | {key: getattr(scaling, key) for key in sorted(_ROPE_KEYS[scaling.type])}
        if not rope.get("attention_factor", 1.0):
            del rope["attention_factor"]  # 0 stands for the value that follows from the factor
        if scaling.type == "dynamic":
            del rope["original_max_position_embeddings"]  # max_position_embeddings says it
    if "rope_parameters" in raw:
        raw["rope_parameters"] = {"rope_theta": llm.rotary_base} | rope
    old = {"rope_theta": llm.rotary_base, "rope_scaling": None if scaling is None else rope}
    # Where both spellings are there, both must say it.
    raw.update({key: value for key, value in old.items() if key in raw or "rope_parameters" not in raw})


def _tower_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's half of a whole SigLIP's configuration, or all of a tower's own."""
    return raw.get("vision_config") or raw


def _check_numbers(found: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for sizes that are no positive integers, and for other numbers that are not positive."""
    wrong = {
        name: value
        for name, value in found.items()
        if isinstance(value, bool) or not isinstance(value, int | float if name in _POSITIVE else int) or not value > 0
    }
    if wrong:
        raise ValueError(f"{where} has {wrong}; sizes must be positive integers, and norms' epsilons positive numbers")


def _refuse_settings(where: str, allowed: Mapping[str, bool], raw: Mapping[str, Any]) -> None:
    wrong = {name: raw.get(name) for name, fine in allowed.items() if not fine}
    if wrong:
        raise ValueError(f"{where} has {wrong}, which this model does not have: its outputs would be others")
