"""Projectors from patch features to visual tokens in the decoder's hidden size.

Shapes: F frames, P patches of a frame (a square grid, row by row), V visual tokens of a frame, C feature size, D decoder hidden size.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import get_kernels
from megatron_longvila.models.linears import BiasedColumnParallelLinear, BiasedRowParallelLinear
from megatron_longvila.models.norms import LayerNorm
from megatron_longvila.models.transformer_config import vision_transformer_config
from megatron_longvila.parallel.groups import Groups
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core.transformer.module import MegatronModule  # isort: skip

_NORM_EPSILON = 1e-5


def merge_patches(features_FPC: Tensor, side: int) -> Tensor:
    """Space to channel: `side` x `side` neighbouring patches become one token, their channels one after the other, row by row.

    A grid that does not divide gets zero rows at the bottom and zero columns at the right first: the zeros are part of the edge tokens.

    Returns:
        [F, ceil(sqrt(P) / side) ** 2, side * side * C].
    """
    num_frames, num_patches, channels = features_FPC.shape
    grid = math.isqrt(num_patches)
    assert grid * grid == num_patches, f"{num_patches} patches are no square grid"
    tokens = -(-grid // side)
    missing = tokens * side - grid
    padded = F.pad(features_FPC.view(num_frames, grid, grid, channels), (0, 0, 0, missing, 0, missing))
    blocks = padded.view(num_frames, tokens, side, tokens, side, channels).transpose(2, 3)
    return blocks.reshape(num_frames, tokens * tokens, side * side * channels)


class Projector(MegatronModule):
    """The projector `model.projector.type` names. Weights are spread over tp; norms and the last bias are whole on every tp rank.

    | type | what it does |
    | --- | --- |
    | mlp_downsample, mlp_downsample_2x2_fix | 2 x 2 merge, norm, C*4 -> D, GELU, D -> D |
    | mlp_downsample_3x3_fix | 3 x 3 merge, norm, C*9 -> C*3, GELU, norm, C*3 -> D, GELU, D -> D |
    | linear | C -> D |
    | mlp2x_gelu | C -> D, GELU, D -> D |

    GELU is the exact one, linears have biases, the norm's epsilon is 1e-5.
    """

    def __init__(self, config: Config, groups: Groups):
        """Raises ValueError for sizes that tp does not divide."""
        super().__init__(vision_transformer_config(config, groups))
        self.tp_group = groups.tp
        kernels = get_kernels(config.model.kernels, platform.device())
        self.downsample = config.model.projector.downsample
        channels, hidden = config.model.vision.hidden_size * self.downsample**2, config.model.llm.hidden_size
        if self.downsample > 1:
            self.norm = LayerNorm(self.config, channels, eps=_NORM_EPSILON, kernels=kernels)
        if self.downsample == 3:
            # The second norm needs whole vectors: this linear is split by column and gathered.
            middle = channels // 3
            self.linear_in = self._column(channels, middle, gather_output=True)
            self.middle_norm = LayerNorm(self.config, middle, eps=_NORM_EPSILON, kernels=kernels)
            channels = middle
        if config.model.projector.type == "linear":
            self.linear_out = self._column(channels, hidden, gather_output=True)
        else:
            self.linear_fc1 = self._column(channels, hidden, gather_output=False)
            self.linear_fc2 = BiasedRowParallelLinear(
                hidden,
                hidden,
                config=self.config,
                init_method=self.config.init_method,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=groups.tp,
            )

    def _column(self, inputs: int, outputs: int, gather_output: bool) -> BiasedColumnParallelLinear:
        tp_size = self.tp_group.size()
        if outputs % tp_size:
            raise ValueError(f"projector width {outputs} must be divisible by tp_size={tp_size}; lower tp_size")
        kwargs = dict(config=self.config, init_method=self.config.init_method, tp_group=self.tp_group)
        return BiasedColumnParallelLinear(inputs, outputs, bias=True, gather_output=gather_output, **kwargs)

    def forward(self, features_FPC: Tensor) -> Tensor:
        """[F, P, C] to [F, V, D], F >= 0; V is P without a merge, else ceil(sqrt(P) / side) ** 2."""
        x = features_FPC
        if self.downsample > 1:
            x = self.norm(merge_patches(x, self.downsample))
        if self.downsample == 3:
            x = self.middle_norm(F.gelu(self.linear_in(x)[0]))
        if hasattr(self, "linear_out"):
            return self.linear_out(x)[0]
        return self.linear_fc2(F.gelu(self.linear_fc1(x)[0]))[0]
