"""Megatron's parallel linears with the bias inside the matrix product, where one tensor-parallel rank holds the whole weight.

Megatron adds biases in a pass of their own over the result. With several tp ranks Megatron's own forward runs: it sums input gradients
beside the weight's product, and a row-parallel bias belongs behind the sum over ranks.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import tensor_parallel  # isort: skip


class BiasedColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """[..., in] -> [..., out / tp]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(result, bias that the caller has to add: none with one tp rank, whatever `skip_bias_add` says)."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return F.linear(input_, self.weight, self.bias), None


class BiasedRowParallelLinear(tensor_parallel.RowParallelLinear):
    """[..., in / tp] -> [..., out]."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(result, bias that the caller has to add: none with one tp rank, whatever `skip_bias_add` says)."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return F.linear(input_, self.weight, self.bias), None
