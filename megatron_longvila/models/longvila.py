"""LongVILA: image sharding, projector, reshard, merge at the placeholders, decoder. The only model file that knows cp.

Shapes: F frames of this cp rank, V visual tokens of this rank's frames, T rows of this cp rank, D decoder hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_longvila import platform
from megatron_longvila.attention.core_attention import SequenceParams
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.models.llm import LanguageModel
from megatron_longvila.models.projector import Projector
from megatron_longvila.models.siglip import SiglipTower
from megatron_longvila.models.transformer_config import transformer_config
from megatron_longvila.parallel.collectives import exchange_rows
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.parallel.plan import RankPlan
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.enums import ModelType  # isort: skip
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip


class LongVILA(MegatronModule):
    """One pipeline stage: stage 0 has the vision tower, the projector and the embedding, the last one the final norm and output layer."""

    def __init__(self, config: Config, groups: Groups):
        super().__init__(config=transformer_config(config, groups))
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = groups.is_first_stage, groups.is_last_stage
        self.cp_group = groups.cp
        self.kernels = get_kernels(config.model.kernels, platform.device())
        self.vision_config = config.model.vision
        self.lora = config.model.lora
        self.recompute_vision = config.training.recompute_vision
        if self.pre_process:
            self.vision_tower = SiglipTower(config, groups)
            self.projector = Projector(config, groups)
        self.language_model = LanguageModel(config, groups, self.config)
        self.share_embeddings_and_output_weights = self.language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous pipeline stage (called by Megatron's schedules)."""
        self.language_model.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Tied embedding, for Megatron's gradient all-reduce between the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode_frames(self, frames_FHWC: Tensor) -> Tensor:
        """Visual tokens of this rank's frames.

        Where tower or projector train, a rank without frames encodes one black frame and hands out none of its rows: every rank then
        builds the same graph, so that the backward of the exchange and all gradient hooks run everywhere (with exact zeros). Frozen
        parts below the lowest one that trains build no graph.

        Args:
            frames_FHWC: uint8 [F, S, S, 3], F >= 0.

        Returns:
            [F * tokens_per_frame, D].
        """
        num_frames = frames_FHWC.shape[0]
        size = self.vision_config.image_size
        if num_frames == 0:
            if not self._vision_has_backward:
                return torch.empty(0, self.config.hidden_size, dtype=self.config.params_dtype, device=frames_FHWC.device)
            frames_FHWC = frames_FHWC.new_zeros(1, size, size, 3)
        with torch.set_grad_enabled(self._vision_has_backward):
            chunks = frames_FHWC.split(self.vision_config.frames_per_micro_batch)
            visual_VD = torch.cat([self._encode(chunk).flatten(0, 1) for chunk in chunks])
        return visual_VD if num_frames else visual_VD[:0]

    @property
    def _vision_has_backward(self) -> bool:
        """Whether gradients will be asked of the tower or the projector; the same on all ranks of this stage."""
        return torch.is_grad_enabled() and (_trains(self.vision_tower) or _trains(self.projector))

    def _encode(self, frames_FHWC: Tensor) -> Tensor:
        # SigLIP's preprocessing: (x / 255 - 0.5) / 0.5, in fp32 as the image processor does it.
        pixels_FCHW = ((frames_FHWC.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).to(self.config.params_dtype)
        # Not Megatron's reentrant checkpoint: a parameter used by several micro-batches of frames must meet its gradient hook once.
        recompute = self.recompute_vision and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if recompute else lambda part, x: part(x)
        if _trains(self.vision_tower):
            return run(lambda pixels: self.projector(self.vision_tower(pixels)), pixels_FCHW)
        with torch.no_grad():  # nor is a frozen tower computed twice
            features_FPD = self.vision_tower(pixels_FCHW)
        return run(self.projector, features_FPD)

    def embed(self, frames_FHWC: Tensor, input_ids_T: Tensor, plan: RankPlan, visual_VD: Tensor | None = None) -> Tensor:
        """Decoder input of this cp rank: text embeddings, with the visual tokens that belong to its placeholders in their rows. [T, 1, D].

        The full sequence never exists: each visual token goes straight from its encoder to the owner of its position.
        """
        if not plan.row_frames and not self._vision_has_backward:
            return self.language_model.embedding(input_ids=input_ids_T[None], position_ids=None)
        if visual_VD is None:
            visual_VD = self.encode_frames(frames_FHWC)
        exchange, device = plan.exchange, visual_VD.device
        # The tower may still be at work: the host must not wait for it, or the decoder's first kernels would start late.
        send_index, recv_rows = (platform.upload(torch.from_numpy(rows), device) for rows in (exchange.send_index, exchange.recv_rows))
        sent_VD = self.kernels.take_rows(visual_VD, send_index)
        received_VD = exchange_rows(sent_VD, exchange.send_counts, exchange.recv_counts, self.cp_group)
        # Placeholders are negative: they look up row 0 and are overwritten, so that no embedding row sees their gradient.
        text_T1D = self.language_model.embedding(input_ids=input_ids_T.clamp(min=0)[None], position_ids=None)
        return self.kernels.place_rows(text_T1D.squeeze(1), received_VD.to(text_T1D.dtype), recv_rows).unsqueeze(1)

    def forward(
        self, frames_FHWC: Tensor, input_ids_T: Tensor, positions_T: Tensor, plan: RankPlan, visual_VD: Tensor | None = None
    ) -> Tensor:
        """Hidden states of this pipeline stage.

        Args:
            frames_FHWC: uint8 [F, S, S, 3], the frames of `plan.frames` (stage 0; ignored elsewhere).
            input_ids_T: int64 [T], PLACEHOLDER_ID where a visual token goes.
            positions_T: int64 [T], `plan.positions_T`.
            visual_VD: what `encode_frames` gave for `plan.frames` before; the frames are then not looked at.

        Returns:
            [T, 1, D], or [T / tp, 1, D] with sequence_parallel; on the last stage after the final norm.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embed(frames_FHWC, input_ids_T, plan, visual_VD)
            if self.config.sequence_parallel:
                decoder_input = scatter_to_sequence_parallel_region(decoder_input)
        return self.language_model(decoder_input, positions_T, SequenceParams(layout=plan.layout))


def _trains(part: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def build_model(config: Config, groups: Groups) -> LongVILA:
    """The part of the model that this rank's pipeline stage holds, on the current device, weights not yet initialised."""
    return LongVILA(config, groups)
