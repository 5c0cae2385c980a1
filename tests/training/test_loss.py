"""The loss of labelled rows equals a plain cross entropy over the real vocabulary, whatever the chunks, tp and sequence parallelism."""

import pytest
import torch

from megatron_longvila.config import Config, LLMConfig, ModelConfig, TrainingConfig
from megatron_longvila.parallel.plan import IGNORE_INDEX
from ranks import run_ranks

ROWS, HIDDEN, VOCAB = 24, 16, 90  # 90 pads to 128: with tp 4 the last rank holds 96..127, padding only


class OutputLayer(torch.nn.Module):
    """What `token_loss` needs of the last stage's language model."""

    def __init__(self, tp_size: int, sequence_parallel: bool, tied: bool):
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=tp_size, use_cpu_initialization=True,
            sequence_parallel=sequence_parallel, perform_initialization=False, gradient_accumulation_fusion=False, cuda_graph_scope=[],
        )  # fmt: skip
        self.output_layer = ColumnParallelLinear(
            HIDDEN, 128, config=config, init_method=None, bias=False, skip_weight_param_allocation=tied
        )
        self.share_embeddings_and_output_weights = tied
        self.embedding = torch.nn.Parameter(torch.empty(128 // tp_size, HIDDEN)) if tied else None

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.embedding if self.share_embeddings_and_output_weights else self.output_layer.weight


def make_config(chunk_rows: int, kernels: str = "reference") -> Config:
    model = ModelConfig(llm=LLMConfig(vocab_size=VOCAB), kernels=kernels)
    return Config(model=model, training=TrainingConfig(loss_chunk_rows=chunk_rows, precision="fp32"))


def make_data(labelled: bool):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, 1, HIDDEN, generator=generator)
    weight = torch.randn(128, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[::3] = IGNORE_INDEX
    labels[1] = VOCAB - 1
    return hidden, weight, labels if labelled else torch.full_like(labels, IGNORE_INDEX)


def reference(labelled: bool):
    """(loss sum, gradient of hidden, gradient of weight, predicted ids) in fp64 over the real columns only."""
    hidden, weight, labels = make_data(labelled)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden.squeeze(1) @ weight[:VOCAB].T
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, logits.argmax(-1)[labels != IGNORE_INDEX]


def _compare(rank: int, tp_size: int, sequence_parallel: bool, tied: bool, kernels: str) -> None:
    from megatron.core import parallel_state

    from megatron_longvila.training.loss import predict, token_loss

    parallel_state.initialize_model_parallel(tp_size, create_gloo_process_groups=False)
    model = OutputLayer(tp_size, sequence_parallel, tied)
    for labelled in (True, False):
        want_loss, want_hidden, want_weight, want_ids = reference(labelled)
        for chunk_rows in (5, 4096):
            hidden, weight, labels = make_data(labelled)
            if sequence_parallel:
                hidden, want = hidden.chunk(tp_size)[rank], want_hidden.chunk(tp_size)[rank]
            else:
                want = want_hidden
            hidden = hidden.clone().requires_grad_()
            shared = model.shared_embedding_or_output_weight()
            shared.data, shared.grad = weight.chunk(tp_size)[rank].clone(), None
            fired = []
            # DDP hangs its hook here; keep the node alive, or the hook is lost
            accumulator = shared.expand_as(shared).grad_fn.next_functions[0][0]
            accumulator.register_hook(lambda *_, fired=fired: fired.append(1))
            loss_sum, count, log = token_loss(model, hidden, labels, make_config(chunk_rows, kernels))
            loss_sum.backward()
            assert count.dtype == torch.int32 and int(count) == int((labels != IGNORE_INDEX).sum()) == int(log["count"])
            assert fired == [1]
            close(loss_sum.detach(), want_loss)
            close(log["loss_sum"], want_loss)
            close(hidden.grad, want)
            close(shared.grad, want_weight.chunk(tp_size)[rank])
            assert torch.equal(predict(model, hidden.detach(), labels, make_config(chunk_rows)), want_ids)
    if not labelled:
        assert not hidden.grad.any() and not shared.grad.any()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 against fp64: sums of 90 logits of 16 products each stay within 200 roundings of the largest value."""
    assert got.shape == want.shape
    bound = 200 * torch.finfo(torch.float32).eps * max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("tp_size,sequence_parallel,tied", [(1, False, False), (2, True, True), (4, False, True), (4, True, False)])
def test_loss_equals_cross_entropy(tp_size: int, sequence_parallel: bool, tied: bool) -> None:
    run_ranks(_compare, tp_size, tp_size, sequence_parallel, tied, "reference")


@pytest.mark.parametrize("tp_size,sequence_parallel,tied", [(1, False, False), (4, True, True)])
def test_loss_on_triton_kernels(tp_size: int, sequence_parallel: bool, tied: bool) -> None:
    run_ranks(_compare, tp_size, tp_size, sequence_parallel, tied, "triton")


def _wrong_rows(rank: int) -> None:
    from megatron.core import parallel_state

    from megatron_longvila.training.loss import token_loss

    parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
    hidden, _, labels = make_data(True)
    with pytest.raises(ValueError, match="23 rows but there are labels for 24"):
        token_loss(OutputLayer(1, False, False), hidden[:-1], labels, make_config(8))


def test_hidden_and_labels_must_match() -> None:
    run_ranks(_wrong_rows, 1)
