"""SigLIP vision tower up to the hidden state that LongVILA uses: 26 of so400m's 27 layers, no post-norm, no pooling head.

Shapes: F frames, P patches of a frame, C = 3 channels, S side of a frame in pixels, D hidden size, N heads of this tp rank, H head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.models.layer_spec import block_spec
from megatron_longvila.models.norms import LayerNorm
from megatron_longvila.models.transformer_config import vision_transformer_config
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.transformer.spec_utils import ModuleSpec  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip


class FullAttention(torch.nn.Module):
    """Attention of every patch of a frame to every other, as a Megatron core attention. Rows of one frame follow one another."""

    def __init__(self, config, num_patches: int, softmax_scale: float | None = None, **_):
        """`_`: layer number, mask type, groups, ... of Megatron's constructor contract, which do not matter without a mask."""
        super().__init__()
        self.num_patches, self.scale = num_patches, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_) -> Tensor:
        """query, key, value: [F * P, 1, N, H]; returns [F * P, 1, N * H]. The mask is None."""
        q_FNPH, k_FNPH, v_FNPH = (x.view(-1, self.num_patches, *x.shape[2:]).transpose(1, 2) for x in (query, key, value))
        out_FNPH = F.scaled_dot_product_attention(q_FNPH, k_FNPH, v_FNPH, scale=self.scale)
        return out_FNPH.transpose(1, 2).reshape(query.shape[0], 1, -1)


class PatchEmbedding(torch.nn.Conv2d):
    """A convolution whose stride is its kernel, as the matrix product it is: cuDNN's convolution would round fp32 to TF32."""

    def forward(self, pixels_FCSS: Tensor) -> Tensor:
        """[F, 3, S, S] to [F, P, D], patches row by row; what is left over at the right and at the bottom is dropped."""
        size = self.kernel_size[0]
        grid = pixels_FCSS.shape[-1] // size
        whole = pixels_FCSS[..., : grid * size, : grid * size]
        cells = whole.unflatten(3, (grid, size)).unflatten(2, (grid, size))  # [F, 3, row, y, column, x]
        return F.linear(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class SiglipTower(MegatronModule):
    """Frames to patch features. Its heads are spread over tp; pipeline, cp and sequence parallelism do not concern it."""

    def __init__(self, config: Config, groups: Groups):
        """Raises ValueError for `dynamic` preprocessing, for an image smaller than a patch and for sizes tp does not divide."""
        super().__init__(vision_transformer_config(config, groups))
        vision = config.model.vision
        if vision.preprocess == "dynamic":
            raise ValueError(
                "model.vision.preprocess=dynamic (an image becomes 1 to 12 tiles and a thumbnail) is not supported: an image's number of "
                "tokens would depend on its shape; use resize (what LongVILA does with video frames) or pad"
            )
        if not 1 <= vision.built_layers <= vision.num_layers:
            raise ValueError(
                f"model.vision.select_layer={vision.select_layer} must name a hidden state after layer 1 of {vision.num_layers}, "
                f"counted from the end: -{vision.num_layers} to -1"
            )
        if vision.grid_size < 1:
            raise ValueError(f"model.vision.image_size={vision.image_size} must be at least patch_size={vision.patch_size}")
        self.tp_group = groups.tp
        kwargs = dict(device=platform.device(), dtype=self.config.params_dtype)
        self.patch_embedding = PatchEmbedding(3, vision.hidden_size, vision.patch_size, stride=vision.patch_size, **kwargs)
        self.position_table = torch.nn.Parameter(torch.empty(vision.grid_size**2, vision.hidden_size, **kwargs))
        for parameter in (*self.patch_embedding.parameters(), self.position_table):
            torch.nn.init.constant_(parameter, float("nan"))
        norm = ModuleSpec(module=LayerNorm, params={"kernels": get_kernels(config.model.kernels, platform.device())})
        attention = partial(FullAttention, num_patches=vision.grid_size**2)
        spec = block_spec(config.model.layers, vision.built_layers, norm, attention, AttnMaskType.no_mask, biased=True)
        self.encoder = TransformerBlock(self.config, spec, post_layer_norm=False, pg_collection=groups.pg)

    def forward(self, pixels_FCSS: Tensor) -> Tensor:
        """Features [F, P, D] in the parameters' dtype; F >= 1, because Megatron's attention cannot reshape an empty batch.

        Args:
            pixels_FCSS: [F, 3, S, S], any floating dtype, scaled to [-1, 1]. Pixels right of and below the last whole patch are not seen.
        """
        embedded_FPD = self.patch_embedding(pixels_FCSS.to(self.config.params_dtype)) + self.position_table
        # Megatron's [sequence, batch, hidden]: one sequence of all patches, as they lie in memory.
        hidden_T1D = embedded_FPD.flatten(0, 1).unsqueeze(1)
        return self.encoder(hidden_T1D, attention_mask=None).view_as(embedded_FPD)


def resize_position_table(table_PD: Tensor, num_patches: int) -> Tensor:
    """Position table for another number of patches: linear interpolation along the flattened index, first and last rows kept.

    This is VILA's rule for `vision_resolution` (not the usual two-dimensional one), with one correction: where a new position falls
    exactly on an old row, VILA's weights (the distances to the rows above and below, which are then the same row) are both zero and so
    is the result. Here the old row is taken, so the same number of patches gives the same table.

    Returns:
        [num_patches, D] in the table's dtype; interpolated in fp32.
    """
    old_patches = table_PD.shape[0]
    # Integers until the last division: a position that is exactly an old row must not miss it by rounding.
    numerators = torch.arange(num_patches, device=table_PD.device) * (old_patches - 1)
    steps = max(num_patches - 1, 1)
    below = numerators // steps
    above = (below + 1).clamp(max=old_patches - 1)
    weight_above = ((numerators % steps).float() / steps)[:, None]
    return (table_PD[below].float() * (1 - weight_above) + table_PD[above].float() * weight_above).to(table_PD.dtype)
