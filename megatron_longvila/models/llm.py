"""Qwen2 and Llama decoders: Megatron's GPTModel with our norm, rotary angles and 2D attention.

Shapes: T rows of this cp rank (tp rank for hidden states under sequence parallelism), D hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_longvila import platform
from megatron_longvila.attention.backends import Backend, get_backend
from megatron_longvila.attention.core_attention import CoreAttention, SequenceParams
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import Kernels, get_kernels
from megatron_longvila.mesh import pipeline_layers
from megatron_longvila.models.layer_spec import block_spec
from megatron_longvila.models.norms import RMSNorm
from megatron_longvila.models.rope import inverse_frequencies, rotary_angles, rotary_table
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


def layer_spec(config: Config, groups: Groups, backend: Backend, kernels: Kernels) -> TransformerBlockSubmodules:
    """Layers of this rank's pipeline stage."""
    norm = ModuleSpec(module=RMSNorm, params={"kernels": kernels})
    stages = pipeline_layers(config.model.llm.num_layers, groups.mesh.pp_size, config.parallel.pipeline_layers)
    ring = dict(transport=ring_transport(config, groups), crosses_hosts=rings_cross_hosts(config, groups))
    core_attention = partial(CoreAttention, groups=groups, backend=backend, kernels=kernels, **ring)
    return block_spec(
        config.model.layers,
        stages[groups.pp.rank()],
        norm,
        core_attention,
        AttnMaskType.causal,
        config.model.lora,
        kernels if kernels.name == "triton" else None,
        fuses_attention(config, groups, kernels),
    )


def fuses_attention(config: Config, groups: Groups, kernels: Kernels) -> bool:
    """Whether one kernel does bias, rotary and packing. Not where tp ranks share a key/value head, which Megatron then cuts out itself."""
    return kernels.name == "triton" and config.model.llm.num_query_groups >= groups.mesh.tp_size


def ring_transport(config: Config, groups: Groups) -> str:
    """`parallel.ring_transport` with `auto` resolved: all_gather while every ring group stays on one host, p2p otherwise."""
    if config.parallel.ring_transport != "auto":
        return config.parallel.ring_transport
    return "p2p" if rings_cross_hosts(config, groups) else "all_gather"


def rings_cross_hosts(config: Config, groups: Groups) -> bool:
    """Whether any ring group has ranks on several hosts.

    `parallel.gpus_per_host` may still be `auto` here: it then means that all ranks are on one host.
    """
    parallel, mesh = config.parallel, groups.mesh
    hosted = mesh.world_size if parallel.gpus_per_host == "auto" else min(parallel.gpus_per_host, mesh.world_size)
    # cp groups start at multiples of their span: a ring stays on one host if the host size is a multiple of that span.
    return hosted % (mesh.tp_size * mesh.cp_size) != 0


class LanguageModel(GPTModel):
    """One pipeline stage of the decoder: stage 0 has `embedding`, the last stage the final norm and `output_layer`."""

    def __init__(self, config: Config, groups: Groups, megatron_config: TransformerConfig):
        """`megatron_config` is `transformer_config(config, groups)`, shared with the enclosing model as Megatron's schedules expect."""
        llm = config.model.llm
        kernels = get_kernels(config.model.kernels, platform.device())
        spec = layer_spec(config, groups, get_backend(config.model.attention_backend), kernels)
        super().__init__(
            megatron_config,
            spec,
            vocab_size=llm.padded_vocab_size,
            max_sequence_length=llm.max_position_embeddings,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=llm.tie_embeddings,
            # Angles come from explicit positions in forward. Megatron's own rotary module counts rows from 0 and assumes its cp layout.
            position_embedding_type="none",
            # The caller scatters, after it has put the visual tokens in their rows.
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups.pg,
        )
        # Not a buffer: a model turned into bf16 would round its buffers, and the frequencies with them.
        self.inv_freq = inverse_frequencies(llm).to(platform.device())
        self.rotary = rotary_table if fuses_attention(config, groups, kernels) else rotary_angles
        self.dynamic_rope = llm if llm.rope_scaling is not None and llm.rope_scaling.type == "dynamic" else None

    def forward(self, decoder_input: Tensor | None, positions_T: Tensor, seq_params: SequenceParams) -> Tensor:
        """Hidden states of this stage; logits are the loss's business.

        Args:
            decoder_input: [T, 1, D] on the first stage, [T / tp, 1, D] with sequence_parallel; None on the others, whose input Megatron's
                schedules hand to `set_input_tensor`.
            positions_T: int64 [T], all rows of this cp rank also with sequence_parallel (queries are gathered over tp before the rotation).
            seq_params: the layout of the row over cp.

        Returns:
            The shape of decoder_input; on the last stage after the final norm.
        """
        inv_freq = self.inv_freq
        if self.dynamic_rope is not None:
            # Without padding, which depends on the mesh; one length for the row, as transformers takes one for a batch.
            length = seq_params.layout.longest_sample or max(seq_params.layout.sample_lengths)
            inv_freq = platform.upload(inverse_frequencies(self.dynamic_rope, length), inv_freq.device)
        return self.decoder(
            hidden_states=self._with_gradient(decoder_input),
            attention_mask=None,
            rotary_pos_emb=self.rotary(positions_T, inv_freq),
            packed_seq_params=seq_params,
        )

    def _with_gradient(self, decoder_input: Tensor | None) -> Tensor | None:
        """Megatron's full recompute is a reentrant checkpoint: where no input requires a gradient, neither does its output, and the weights
        inside silently get none. That is so in the first layer when everything below it is frozen, as with adapters."""
        recomputed = self.config.recompute_granularity == "full" and torch.is_grad_enabled()
        if not recomputed or decoder_input is None or decoder_input.requires_grad:
            return decoder_input
        if not any(parameter.requires_grad for parameter in self.decoder.parameters()):
            return decoder_input
        return decoder_input.detach().requires_grad_()
