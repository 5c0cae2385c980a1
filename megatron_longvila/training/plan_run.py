"""What a run will be, before any GPU is asked for: mesh, batch arithmetic, and bytes of weights, gradients and optimizer on each GPU.

Plain numbers from the configuration; imports no torch. Activations are not counted: they depend on recompute, rows and kernels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_longvila.config import Config
from megatron_longvila.mesh import Mesh, pipeline_layers

GIB = 2**30
GRADIENT_BYTES = 4  # Megatron's DDP sums gradients in fp32
MOMENT_BYTES = 8  # Adam's two, fp32


@dataclass(frozen=True)
class StageBytes:
    """One pipeline stage on one GPU.

    Attributes:
        parameters, trained: numbers of values on a tp rank.
        weights, gradients, optimizer: bytes; the optimizer's are spread over the dp x cp ranks.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three, in bytes."""
        return self.weights + self.gradients + self.optimizer


def count_stage(config: Config, mesh: Mesh, stage: int) -> Counter[str]:
    """Values of one tp rank of a pipeline stage by what trains together: vision, projector, llm, llm_norms, llm_embeddings, lora.

    `llm` is the decoder without its norms and embeddings. A tied output layer on another stage than the embedding is a copy and counts.
    """
    llm, tp_size = config.model.llm, mesh.tp_size
    hidden, query, group = llm.hidden_size, llm.num_attention_heads * llm.head_dim, llm.num_query_groups * llm.head_dim
    num_layers = pipeline_layers(llm.num_layers, mesh.pp_size, config.parallel.pipeline_layers)[stage]
    first, last = stage == 0, stage == mesh.pp_size - 1
    qkv = query + 2 * group
    layer = (qkv * hidden + hidden * query + 3 * hidden * llm.ffn_hidden_size) // tp_size
    layer += qkv // tp_size if llm.architecture == "qwen2" else 0
    tables = int(first) + int(last and not (llm.tie_embeddings and first))
    counts = Counter(
        llm=num_layers * layer,
        llm_norms=num_layers * 2 * hidden + (hidden if last else 0),
        llm_embeddings=tables * llm.padded_vocab_size * hidden // tp_size,
        lora=num_layers * _adapters(config, tp_size),
    )
    if first:
        counts |= Counter(vision=_tower(config, tp_size), projector=_projector(config, tp_size))
    return counts


def stage_bytes(config: Config, mesh: Mesh, stage: int) -> StageBytes:
    """Bytes of a GPU that holds `stage`; DDP's padding of its buffers is left out (below a percent of a real model)."""
    counts = count_stage(config, mesh, stage)
    trainable = set(config.training.trainable)
    if "llm" in trainable:
        trainable |= {"llm_norms", "llm_embeddings"}
    parameters, trained = sum(counts.values()), sum(count for part, count in counts.items() if part in trainable)
    bf16 = config.training.precision == "bf16"
    shards = mesh.dp_size * mesh.cp_size
    # In bf16 the optimizer keeps an fp32 copy of its share of the weights; in fp32 it works on the weights themselves.
    optimizer = -(-trained // shards) * (MOMENT_BYTES + (4 if bf16 else 0))
    return StageBytes(parameters, trained, parameters * (2 if bf16 else 4), trained * GRADIENT_BYTES, optimizer)


def describe_run(config: Config, mesh: Mesh, *, num_nodes: int) -> str:
    """Lines for a person: the mesh on its nodes, one step's rows and tokens, and memory by pipeline stage."""
    data = config.data
    accumulation = data.global_batch_size // mesh.dp_size
    frame_tokens = config.model.tokens_per_frame
    lines = [
        f"mesh   {mesh.world_size} ranks = {num_nodes} nodes x {mesh.world_size // num_nodes}: tp {mesh.tp_size} x ulysses "
        f"{mesh.ulysses_size} x ring {mesh.ring_size} x dp {mesh.dp_size} x pp {mesh.pp_size}",
        f"batch  {data.global_batch_size} rows a step = dp {mesh.dp_size} x {accumulation} micro-batches of one row; up to "
        f"{data.context_length:,} tokens a row, {-(-data.context_length // mesh.cp_size):,} on each of cp {mesh.cp_size} ranks, "
        f"{data.global_batch_size * data.context_length:,} a step",
        f"video  up to {data.video.num_frames} frames of {frame_tokens} visual tokens (and a newline) in a sample; at most "
        f"{-(-data.video.num_frames // mesh.cp_size)} of its frames on a rank",
        f"saves  {_saves(config)}",
        f"{'memory of a GPU':16}{'values':>16}{'trained':>16}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'sum':>12}",
    ]
    for stage in range(mesh.pp_size):
        found = stage_bytes(config, mesh, stage)
        sizes = (found.weights, found.gradients, found.optimizer, found.total)
        lines.append(
            f"  {f'pp stage {stage}':14}{found.parameters:16,}{found.trained:16,}" + "".join(f"{_gib(size):>12}" for size in sizes)
        )
    lines.append(f"  ({config.training.precision}; optimizer spread over dp x cp = {mesh.dp_size * mesh.cp_size}; activations come on top)")
    return "\n".join(lines)


def _saves(config: Config) -> str:
    """When a checkpoint is written."""
    checkpoint = config.checkpoint
    ends = "at the end and on a signal" if checkpoint.save_at_end else "on a signal"
    if not checkpoint.save_interval:
        return f"only {ends} (checkpoint.save_interval=0): a rank that is lost loses the whole run so far"
    return f"every {checkpoint.save_interval} steps, {ends}; the last {checkpoint.keep_last} are kept"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _adapters(config: Config, tp_size: int) -> int:
    """Adapters of one decoder layer: A whole and B split before attention, the reverse after it."""
    llm, lora = config.model.llm, config.model.lora
    query, group = llm.num_attention_heads * llm.head_dim, llm.num_query_groups * llm.head_dim
    rows = {"q": query, "k": group, "v": group}
    inside = sum(llm.hidden_size + rows[target] // tp_size for target in lora.targets if target in rows)
    outside = query // tp_size + llm.hidden_size if "o" in lora.targets else 0
    return lora.rank * (inside + outside)


def _tower(config: Config, tp_size: int) -> int:
    vision = config.model.vision
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    split = (3 * hidden + ffn) * (hidden + 1) + hidden * hidden + ffn * hidden  # into attention and MLP with bias, out of them
    whole = 6 * hidden  # two norms, and the biases of what comes out
    ends = (3 * vision.patch_size**2 + 1) * hidden + vision.grid_size**2 * hidden
    return vision.built_layers * (split // tp_size + whole) + ends


def _projector(config: Config, tp_size: int) -> int:
    projector, hidden = config.model.projector, config.model.llm.hidden_size
    channels = config.model.vision.hidden_size * projector.downsample**2
    count = 2 * channels if projector.downsample > 1 else 0
    if projector.downsample == 3:
        middle = channels // 3
        count += (channels + 1) * middle // tp_size + 2 * middle
        channels = middle
    count += (channels + 1) * hidden // tp_size
    return count + (0 if projector.type == "linear" else hidden * hidden // tp_size + hidden)
