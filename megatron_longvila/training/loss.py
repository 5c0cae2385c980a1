"""From hidden states of the last pipeline stage to the sum of token losses: labelled rows only, in chunks, vocabulary-parallel.

Nothing here divides: Megatron's `calculate_per_token_loss` takes the sum and the number of labelled tokens of every rank and divides once
by the tokens of the whole global batch (dp x cp x accumulation).

Shapes: T rows of this cp rank, L labelled rows among them (at least one, see `select_rows`), D hidden, V padded vocabulary.
The `model` of every function is the language model of the last stage: it has `output_layer` (a column-parallel linear of V rows),
`share_embeddings_and_output_weights` and `shared_embedding_or_output_weight()`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_longvila import platform
from megatron_longvila.config import Config
from megatron_longvila.kernels.choice import Kernels, get_kernels
from megatron_longvila.parallel.plan import IGNORE_INDEX
from megatron_longvila.platform import mcore  # noqa: F401  (fixes before the first Megatron import)

from megatron.core import parallel_state  # isort: skip
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, vocab_parallel_cross_entropy  # isort: skip


def select_rows(labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that have a label, their labels and their weights.

    A rank whose rows all lack a label still computes row 0 with weight 0: its loss stays connected to its hidden states, every
    gradient hook fires and all ranks run the same collectives.

    Returns:
        (rows_L int64, labels_L int64, weight_L fp32): weight 1 for a labelled row; the stand-in row has label 0 and weight 0.
    """
    rows_L = torch.nonzero(labels_T != IGNORE_INDEX).flatten()
    if rows_L.numel():
        return rows_L, labels_T[rows_L], torch.ones(rows_L.numel(), dtype=torch.float32, device=labels_T.device)
    return rows_L.new_zeros(1), labels_T.new_zeros(1), torch.zeros(1, dtype=torch.float32, device=labels_T.device)


def token_losses(model, hidden_T1D: Tensor, labels_T: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cross entropy of each labelled row of this rank, in row order.

    Args:
        hidden_T1D: hidden states after the final norm; with sequence_parallel the [T / tp, 1, D] slice of this tp rank.
        labels_T: int64 labels of all T rows, already shifted; -100 is no label.

    Returns:
        (loss_L, weight_L), both fp32 and equal on all tp ranks; weight_L is 1, or [0.] when no row has a label.
    """
    rows_L, labels_L, weight_L = select_rows(labels_T)
    hidden_L1D = _labelled_hidden(hidden_T1D, rows_L, labels_T.shape[0])
    chunk_rows = config.training.loss_chunk_rows
    if rows_L.numel() <= chunk_rows:
        return _chunk_losses(model, hidden_L1D, labels_L, config), weight_L
    # More than one chunk: the logits of a chunk (chunk_rows x V / tp in fp32) are dropped after its forward and made again in
    # backward. Non-reentrant, so that the weight's gradient hook fires once and not once per chunk.
    losses = [
        checkpoint(_chunk_losses, model, hidden_c1D, labels_c, config, use_reentrant=False, preserve_rng_state=False)
        for hidden_c1D, labels_c in zip(hidden_L1D.split(chunk_rows), labels_L.split(chunk_rows), strict=True)
    ]
    return torch.cat(losses), weight_L


def token_loss(model, hidden_T1D: Tensor, labels_T: Tensor, config: Config) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses of this rank, in the form Megatron's schedules expect from a loss function.

    Returns:
        (loss_sum fp32 scalar with gradient, count int32 scalar, {"loss_sum": fp64 scalar, "count": fp64 scalar} without gradient).
    """
    loss_L, weight_L = token_losses(model, hidden_T1D, labels_T, config)
    loss_sum = (loss_L * weight_L).sum()
    count = weight_L.sum().to(torch.int32)
    # fp64: a batch of 2**24 labelled tokens would no longer count exactly in fp32
    return loss_sum, count, {"loss_sum": loss_sum.detach().double(), "count": count.double()}


@torch.no_grad()
def predict(model, hidden_T1D: Tensor, labels_T: Tensor, config: Config) -> Tensor:
    """The most likely token id at each labelled row of this rank (int64 [L], empty without labels); ties go to the lowest id."""
    if not bool((labels_T != IGNORE_INDEX).any()):
        return labels_T.new_zeros(0)
    rows_L, _, _ = select_rows(labels_T)
    hidden_L1D = _labelled_hidden(hidden_T1D, rows_L, labels_T.shape[0])
    tp_group = parallel_state.get_tensor_model_parallel_group()
    predicted = []
    for hidden_c1D in hidden_L1D.split(config.training.loss_chunk_rows):
        logits_cV = _logits(model, hidden_c1D, config).squeeze(1).float()
        best_c, column_c = logits_cV.max(dim=-1)
        top_c = best_c.clone()
        torch.distributed.all_reduce(top_c, op=torch.distributed.ReduceOp.MAX, group=tp_group)
        id_c = torch.where(best_c == top_c, column_c + tp_group.rank() * logits_cV.shape[-1], config.model.llm.padded_vocab_size)
        torch.distributed.all_reduce(id_c, op=torch.distributed.ReduceOp.MIN, group=tp_group)
        predicted.append(id_c)
    return torch.cat(predicted)


def _labelled_hidden(hidden_T1D: Tensor, rows_L: Tensor, total_rows: int) -> Tensor:
    """Hidden states [L, 1, D] of the labelled rows, on every tp rank."""
    if hidden_T1D.shape[0] != total_rows:
        # Sequence parallel. The gradient that comes back is the whole one on every tp rank (the output layer sums it), so backward
        # keeps the own slice and does not sum again: tensor_parallel_output_grad=False.
        hidden_T1D = gather_from_sequence_parallel_region(hidden_T1D, tensor_parallel_output_grad=False)
    if hidden_T1D.shape[0] != total_rows:
        raise ValueError(f"hidden states have {hidden_T1D.shape[0]} rows but there are labels for {total_rows}")
    return hidden_T1D.index_select(0, rows_L)


def _logits(model, hidden_L1D: Tensor, config: Config) -> Tensor:
    """Logits [L, 1, V / tp] of this tp rank's columns; columns that only pad the vocabulary are -inf."""
    layer = model.output_layer
    # The rows are already gathered, so the layer must not gather them again: it runs without sequence parallelism, and then it is
    # the layer that has to sum the gradient of its input over tp.
    layer.sequence_parallel = False
    layer.allreduce_dgrad = layer.tp_group.size() > 1
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits_L1V, _ = layer(hidden_L1D, weight=weight)
    columns = logits_L1V.shape[-1]
    real = min(max(config.model.llm.vocab_size - layer.tp_group.rank() * columns, 0), columns)
    logits_L1V[..., real:].fill_(float("-inf"))
    return logits_L1V


def _chunk_losses(model, hidden_L1D: Tensor, labels_L: Tensor, config: Config) -> Tensor:
    """fp32 losses [L] of one chunk."""
    logits_L1V = _logits(model, hidden_L1D, config)
    return cross_entropy(logits_L1V.squeeze(1), labels_L, get_kernels(config.model.kernels, platform.device()))


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, kernels: Kernels) -> Tensor:
    """fp32 losses [L] from this tp rank's logits [L, V / tp], differentiable: Megatron's function, or ours where Triton kernels run."""
    if kernels.name == "triton":
        return _CrossEntropy.apply(logits_LV, labels_L, parallel_state.get_tensor_model_parallel_group(), kernels)
    return vocab_parallel_cross_entropy(logits_LV.float().unsqueeze(1), labels_L.unsqueeze(1)).squeeze(1)


class _CrossEntropy(torch.autograd.Function):
    """Losses [L] in fp32 from this tp rank's logits [L, V / tp] in their own dtype; two all-reduces, of L and of 2L values.

    Megatron's function does the same through an fp32 copy of the logits and several passes over it.
    """

    @staticmethod
    def forward(ctx, logits_LV: Tensor, labels_L: Tensor, group: torch.distributed.ProcessGroup, kernels: Kernels) -> Tensor:
        ctx.kernels, ctx.first_column = kernels, group.rank() * logits_LV.shape[1]
        lse_L, target_L = kernels.lse_and_target(logits_LV, labels_L, ctx.first_column)
        if group.size() > 1:
            largest_L = lse_L.clone()
            torch.distributed.all_reduce(largest_L, op=torch.distributed.ReduceOp.MAX, group=group)
            sums_2L = torch.stack((torch.exp(lse_L - largest_L), target_L))
            torch.distributed.all_reduce(sums_2L, group=group)
            lse_L, target_L = largest_L + sums_2L[0].log(), sums_2L[1]
        ctx.save_for_backward(logits_LV, labels_L, lse_L)
        return lse_L - target_L

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_L: Tensor):
        logits_LV, labels_L, lse_L = ctx.saved_tensors
        return ctx.kernels.cross_entropy_gradient(logits_LV, labels_L, ctx.first_column, lse_L, grad_L), None, None, None
