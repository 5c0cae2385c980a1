"""From our configuration to Megatron's `TransformerConfig`, for the decoder and for the vision tower."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.mesh import pipeline_layers
from megatron_longvila.models.rope import softmax_scale
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config, groups: Groups) -> TransformerConfig:
    """Megatron's configuration of the decoder on this mesh."""
    llm, mesh = config.model.llm, groups.mesh
    stages = pipeline_layers(llm.num_layers, mesh.pp_size, config.parallel.pipeline_layers)
    layout = [["decoder"] * count for count in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[config.training.recompute]
    with warnings.catch_warnings():
        # "core_attn" recompute is what `selective` means here: our attention is not the fused one the warning is about.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer implementation")
        return TransformerConfig(
            num_layers=llm.num_layers,
            hidden_size=llm.hidden_size,
            ffn_hidden_size=llm.ffn_hidden_size,
            num_attention_heads=llm.num_attention_heads,
            num_query_groups=llm.num_query_groups,
            kv_channels=llm.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=llm.norm_epsilon,
            gated_linear_unit=True,
            activation_func=F.silu,
            use_te_activation_func=get_kernels(config.model.kernels, platform.device()).name == "triton",  # see layer_spec.SwiGLU
            add_bias_linear=False,
            add_qkv_bias=llm.architecture == "qwen2",
            softmax_scale=softmax_scale(llm),
            context_parallel_size=mesh.cp_size,
            sequence_parallel=config.parallel.sequence_parallel and mesh.tp_size > 1,
            pipeline_model_parallel_size=mesh.pp_size,
            pipeline_model_parallel_layout=layout if mesh.pp_size > 1 else None,
            # Rows differ in length. Megatron allows that between stages only with this dispatcher, also in models without experts.
            variable_seq_lengths=mesh.pp_size > 1,
            moe_token_dispatcher_type="alltoall",
            deallocate_pipeline_outputs=mesh.pp_size > 1,
            **recompute,
            **_common_fields(config, groups),
        )


def vision_transformer_config(config: Config, groups: Groups) -> TransformerConfig:
    """Megatron's configuration of the vision tower: the decoder's tp, never its pipeline, cp or sequence parallelism."""
    vision, tp_size = config.model.vision, groups.mesh.tp_size
    if vision.num_attention_heads % tp_size or vision.ffn_hidden_size % tp_size:
        raise ValueError(
            f"model.vision.num_attention_heads={vision.num_attention_heads} and ffn_hidden_size={vision.ffn_hidden_size} "
            f"must be divisible by tp_size={tp_size}; lower tp_size"
        )
    return TransformerConfig(
        num_layers=vision.built_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=gelu_tanh,
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common_fields(config, groups),
    )


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, SigLIP's activation."""
    return F.gelu(x, approximate="tanh")


def _common_fields(config: Config, groups: Groups) -> dict:
    dtype = _DTYPES[config.training.precision]
    return dict(
        tensor_model_parallel_size=groups.mesh.tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=platform.is_cpu(),
        # Megatron marks the sharded dimension of a weight only while it initialises it, so initialisation stays on and fills in NaN:
        # models/init.py or a checkpoint gives the values, and a parameter that both forgot is loud.
        init_method=_not_yet_initialized,
        output_layer_init_method=_not_yet_initialized,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cuda_graph_scope=[],
        # All of these need Transformer Engine, apex or a torch.compile of tens of seconds per process.
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _not_yet_initialized(weight: Tensor) -> Tensor:
    return torch.nn.init.constant_(weight, float("nan"))
