"""The transformer layer of both towers: Megatron's, with our attention, norms and activation, on its linears or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_longvila.config import LoraConfig
from megatron_longvila.kernels.choice import Kernels
from megatron_longvila.models.linears import BiasedColumnParallelLinear, BiasedRowParallelLinear
from megatron_longvila.models.lora import adapt
from megatron_longvila.models.self_attention import FusedSelfAttention
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # isort: skip
from megatron.core.models.gpt import gpt_layer_specs  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # isort: skip


class SwiGLU(torch.nn.Module):
    """silu(gate) * value of [..., 2F] -> [..., F] in one pass, where Megatron's MLP takes three and keeps the product's factors.

    Megatron's `use_te_activation_func` is the switch for an activation that takes gate and value together, whoever wrote it.
    """

    def __init__(self, config, kernels: Kernels):
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.swiglu(x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save; Megatron's MLP asks each of its parts."""
        return {}


def local_layer(norm: type | ModuleSpec, core_attention: Callable, mask: AttnMaskType, biased: bool) -> ModuleSpec:
    """Pre-norm layer on Megatron's own linears, or on those that add their biases themselves.

    Sharded names equal Transformer Engine's, so that checkpoints fit both kinds.
    """
    column, row = (BiasedColumnParallelLinear, BiasedRowParallelLinear) if biased else (ColumnParallelLinear, RowParallelLinear)
    attention = SelfAttentionSubmodules(linear_qkv=column, core_attention=core_attention, linear_proj=row)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def te_layer(core_attention: Callable, mask: AttnMaskType) -> ModuleSpec:
    """The same layer on Transformer Engine's linears, each norm fused into the linear that follows it.

    Raises:
        ValueError: Transformer Engine is not installed.
    """
    if not gpt_layer_specs.HAVE_TE:
        raise ValueError(
            "model.layers=te needs Transformer Engine, which this Python cannot import; "
            "install it on a CUDA machine (pip install 'megatron-longvila[te]') or set model.layers=local"
        )
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    attention = spec.submodules.self_attention
    attention.params = {"attn_mask_type": mask}
    attention.submodules.core_attention = core_attention
    return spec


def block_spec(
    layers: str,
    num_layers: int,
    norm: type | ModuleSpec,
    core_attention: Callable,
    mask: AttnMaskType,
    lora: LoraConfig | None = None,
    kernels: Kernels | None = None,
    fuse_attention: bool = False,
    biased: bool = False,
) -> TransformerBlockSubmodules:
    """`num_layers` equal layers and their final norm.

    Args:
        layers: `local` or `te`.
        norm: class of the norms (final norm included) of `local` layers, and of the final norm of `te` layers.
        core_attention: called with the keyword arguments Megatron gives a core attention class.
        lora: adapters beside the attention's linears.
        kernels: what runs between the MLP's linears; None: the function that Megatron's configuration names.
        fuse_attention: take these kernels also between the attention's projection and its all-to-all.
        biased: all linears of `local` layers have biases, which they add themselves.
    """
    layer = te_layer(core_attention, mask) if layers == "te" else local_layer(norm, core_attention, mask, biased)
    if lora is not None:
        adapt(layer.submodules.self_attention.submodules, lora)
    if kernels is not None:
        layer.submodules.mlp.submodules.activation_func = ModuleSpec(module=SwiGLU, params={"kernels": kernels})
    if fuse_attention:
        layer.submodules.self_attention.module = FusedSelfAttention
        layer.submodules.self_attention.params["kernels"] = kernels
    # Megatron picks its own norm class, which refuses sequence parallelism, unless the whole block is spelled out.
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
