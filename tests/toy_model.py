"""A model with the parts and parallel layers of the real one and nothing else, for tests of optimizer and checkpoint.

Stage 0 has a vision tower and a projector; the four residual layers of the language model are spread over the stages and named by their
global number, as in the real model. Its data: step s, dp rank d -> one row of four vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_longvila import platform
from megatron_longvila.checkpoint.sharded import TrainingState
from megatron_longvila.config import Config
from megatron_longvila.mesh import Mesh
from megatron_longvila.parallel.groups import initialize_groups
from megatron_longvila.platform import mcore  # noqa: F401
from megatron_longvila.training.optimizer import apply_settings, build_optimizer, build_scheduler, freeze, step, wrap_ddp

from megatron.core.enums import ModelType  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

HIDDEN, LAYERS, TOTAL_STEPS, ROWS_PER_STEP = 16, 4, 10, 4


class ToyLayer(MegatronModule):
    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        options = dict(config=config, init_method=torch.nn.init.zeros_, bias=True)
        self.up = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, gather_output=False, **options)
        self.down = RowParallelLinear(2 * HIDDEN, HIDDEN, input_is_parallel=True, skip_bias_add=False, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)[0]))[0]


class ToyModel(MegatronModule):
    def __init__(self, config: TransformerConfig, groups):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = groups.is_first_stage, groups.is_last_stage
        self.share_embeddings_and_output_weights = False
        if self.pre_process:
            self.vision_tower = torch.nn.Linear(8, HIDDEN, dtype=config.params_dtype)
            self.projector = torch.nn.Linear(HIDDEN, HIDDEN, dtype=config.params_dtype)
        per_stage = LAYERS // groups.pp.size()
        mine = range(groups.pp.rank() * per_stage, (groups.pp.rank() + 1) * per_stage)
        self.language_model = torch.nn.ModuleDict({str(number): ToyLayer(config) for number in mine})

    def set_input_tensor(self, input_tensor) -> None:
        self.input_tensor = input_tensor[0]

    def forward(self, x_T1C: torch.Tensor) -> torch.Tensor:
        hidden = self.projector(self.vision_tower(x_T1C)) if self.pre_process else self.input_tensor
        for layer in self.language_model.values():
            hidden = layer(hidden)
        return hidden

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        from megatron.core.transformer.utils import sharded_state_dict_default

        for name, module in self.named_children():
            parts = module.items() if name == "language_model" else [("", module)]
            for number, part in parts:
                key = f"{name}.{number}." if number else f"{name}."
                state |= sharded_state_dict_default(part, key, sharded_offsets, metadata, tp_group=mcore_tp_group())
        return state


def mcore_tp_group():
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


class ToyLoader:
    """Counts rows; its state is the same on all ranks."""

    def __init__(self) -> None:
        self.consumed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


def fill_by_name(model: torch.nn.Module, tp_rank: int, tp_size: int) -> None:
    """The same full weights on every layout."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + len(name))
        dim = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if dim >= 0:
            shape[dim] *= tp_size
        full = 0.3 * torch.randn(shape, generator=generator)
        parameter.data.copy_(full.chunk(tp_size, dim)[tp_rank] if dim >= 0 else full)


@dataclass
class Toy:
    """A training run of the toy model."""

    config: Config
    groups: Any
    model: Any
    state: TrainingState

    def train_step(self) -> float:
        """One optimizer step; returns the loss of the global batch, the same on every rank and layout."""
        mesh, loader = self.groups.mesh, self.state.loader
        rows = range(loader.consumed + self.groups.dp.rank(), loader.consumed + ROWS_PER_STEP, mesh.dp_size)
        self.model.zero_grad_buffer()
        self.state.optimizer.zero_grad()

        def loss_function(row: int, hidden: torch.Tensor):
            target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1000 + row))
            loss = (hidden.float() - target).square().sum()
            return loss, torch.tensor(hidden.shape[0], dtype=torch.int32), {"loss": loss.detach()}

        def forward_step(iterator, model):
            row = next(iterator)
            x = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(row)).to(model.config.params_dtype)
            return model(x), partial(loss_function, row)

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(rows), model=self.model, num_microbatches=len(rows), seq_length=4,
            micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        total = torch.tensor(sum(output["loss"].item() for output in outputs) / mesh.tp_size, dtype=torch.float64)
        dist.all_reduce(total)
        step(self.state.optimizer)
        self.state.scheduler.step(1)
        loader.consumed += ROWS_PER_STEP
        return total.item()

    def resume(self, checkpoints) -> int:
        newest = checkpoints.newest()
        resumed = checkpoints.resume(self.state, newest) if newest else 0
        apply_settings(self.state.optimizer, self.state.scheduler, self.config)
        return resumed


def build_toy(config: Config, **sizes: int) -> Toy:
    """A toy on a mesh of all ranks; sizes are tp_size and pp_size, the rest is dp."""
    groups = initialize_groups(
        Mesh(dist.get_world_size(), **{"tp_size": 1, "pp_size": 1, "ulysses_size": 1, "ring_size": 1} | sizes), timeout_s=60
    )
    platform.seed(config.training.seed, groups.pp.rank())
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = ToyModel(
        TransformerConfig(
            num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=groups.mesh.tp_size,
            pipeline_model_parallel_size=groups.mesh.pp_size, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype is torch.bfloat16,
            calculate_per_token_loss=True, use_cpu_initialization=True, gradient_accumulation_fusion=False, cuda_graph_scope=[],
        ),
        groups,
    )  # fmt: skip
    fill_by_name(model, groups.tp.rank(), groups.tp.size())
    freeze(model, config.training.trainable)
    wrapped = wrap_ddp(model, config)
    optimizer = build_optimizer(wrapped, config)
    scheduler = build_scheduler(optimizer, config, TOTAL_STEPS)
    return Toy(config, groups, wrapped, TrainingState(model, optimizer, scheduler, ToyLoader()))
