"""The door to megatron-core: importing this module checks its version, imports it quietly, enters the CPU shim and applies the fixes.

Every module that needs megatron imports this one first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import re
import warnings
from typing import Any

import torch

from megatron_longvila.platform import cpu

VERSION = "0.16.1"  # the last release for Python 3.11; the fixes below were read and tested against exactly this source


def check_version() -> None:
    """Raises ImportError unless exactly the megatron-core the fixes were written for, and what it needs at run time, is installed."""
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"megatron-core is not installed; run: pip install megatron-core=={VERSION}") from None
    if found != VERSION:
        raise ImportError(f"megatron-core {found} is installed, {VERSION} is needed; run: pip install megatron-core=={VERSION}")
    # megatron-core does not declare these two. Without psutil a checkpoint writer dies in a forked child and the save waits for ever.
    for package in ("psutil", "einops"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"megatron-core {VERSION} needs {package}, which is not installed; run: pip install {package}")


check_version()
cpu.activate()
with warnings.catch_warnings():
    # Torch fallbacks are what we chose; see select_adam for the optimizer.
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is|absl\.logging is) not installed")
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer as _optimizer
    import megatron.core.optimizer.clip_grads as _clip_grads
    import megatron.core.optimizer.distrib_optimizer as _distrib_optimizer
    import megatron.core.optimizer.optimizer as _optimizer_base
    import megatron.core.pipeline_parallel  # noqa: F401
    import megatron.core.tensor_parallel.random as _random
    from megatron.core.utils import local_multi_tensor_applier

from megatron_longvila.platform import mcore_fixes  # noqa: E402  (megatron must have been imported quietly)


def _rename_collectives() -> None:
    """Megatron looks up two collectives of torch by names that torch 2.13 deprecates with a warning; it gets the same ones by new names."""
    users = "distributed.param_and_grad_buffer", "tensor_parallel.layers", "tensor_parallel.mappings", "tensor_parallel.utils", "utils"
    for namespace in (vars(importlib.import_module(f"megatron.core.{user}")) for user in users):
        for held, name in (("dist_all_gather_func", "all_gather_single"), ("dist_reduce_scatter_func", "reduce_scatter_single")):
            if held in namespace and hasattr(torch.distributed, name):
                namespace[held] = getattr(torch.distributed, name)


def _l2_norm(chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    """The norm of all tensors of the first list, [1], on their device; its other arguments are for apex, whose signature this is."""
    return torch.stack(torch._foreach_norm(tensor_lists[0])).norm().reshape(1), None


def _scale(chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """The first list times `scale`, written to the second, which may be the same."""
    source, target = tensor_lists
    if target is not source:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, scale)


def _use_torch_for_norms() -> None:
    """Norm and scale of the gradients by torch's own operations on lists.

    Megatron takes Transformer Engine's or apex's where they can be imported, which fails in a run on the CPUs of such a machine; what it
    takes without them lets the host wait for the norm of every single tensor.
    """
    for module in (_clip_grads, _optimizer_base):
        module.multi_tensor_applier = local_multi_tensor_applier
        module.multi_tensor_scale_impl = _scale
    _clip_grads.l2_norm_impl = _l2_norm


cpu.use_cpu_rng(_random)
_rename_collectives()
_use_torch_for_norms()
# In fp32 megatron's optimizer steps on views of the parameters, whose .grad it sets itself: torch takes reading it for a mistake.
warnings.filterwarnings("ignore", message=re.escape(cpu.NON_LEAF_GRAD), module=r"megatron\.core\.optimizer\b|torch\.optim\b")
# Megatron reads checkpoints by a name that torch 2.13 deprecates.
warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning, module=r"megatron\.core\.dist_checkpointing\b")
mcore_fixes.apply()
logging.getLogger("megatron.core").setLevel(logging.WARNING)

_ADAM = {
    "torch": ("torch.optim", "AdamW", "torch itself"),
    "te": ("transformer_engine.pytorch.optimizers", "FusedAdam", "pip install 'megatron-longvila[te]' on a machine with CUDA"),
    "apex": ("apex.optimizers", "FusedAdam", "build NVIDIA apex from its source repository; the index package named apex is another one"),
}


def select_adam(backend: str) -> None:
    """Make megatron build its optimizer with `torch`, `te` or `apex` Adam, whatever else can be imported.

    megatron-core itself takes Transformer Engine's, then apex's, then torch's, by importability: the same command would then train with
    another optimizer (and another checkpoint layout of `step`) on another machine. Raises ValueError if the backend is not installed.
    """
    if backend not in _ADAM:
        raise ValueError(f"optimizer.backend={backend!r} is not one of {sorted(_ADAM)}")
    module_name, class_name, remedy = _ADAM[backend]
    try:
        adam = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"optimizer.backend={backend!r} needs {module_name}.{class_name} ({error}); {remedy}, or use --optimizer.backend torch"
        ) from None
    _optimizer.Adam = adam
    _optimizer.USING_PYTORCH_OPTIMIZER = backend == "torch"
    _distrib_optimizer.Adam = adam
    _distrib_optimizer.HAVE_APEX_OR_TE = backend != "torch"
    _distrib_optimizer.USING_TE_OPTIMIZER = backend == "te"
    _distrib_optimizer.USING_APEX_OPTIMIZER = backend == "apex"


def seed_tracker(seed: int) -> None:
    """Reset megatron's named random streams to `seed` (its own offsets per tp rank). Needs parallel state."""
    _random.model_parallel_cuda_manual_seed(seed)


def tracker_states() -> dict[str, Any]:
    """States of megatron's named random streams."""
    return {name: state.clone() for name, state in _random.get_cuda_rng_tracker().get_states().items()}


def set_tracker_states(states: dict[str, Any]) -> None:
    """Restore `tracker_states`."""
    _random.get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states.items()})
