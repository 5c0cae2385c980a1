"""Total two-way name maps between Hugging Face weights in VILA's layout and the full (one-rank) state of LongVILA.

VILA's layout: `llm.` before the names of Qwen2ForCausalLM / LlamaForCausalLM, `vision_tower.` before SiglipVisionModel's (with or
without its inner `vision_model.`, which transformers dropped in 5.x), `mm_projector.` before the projector's. LongVILA's names are
those of models/init.py. The map is one list of rules, each from one or more source tensors to one target; nothing is matched by accident.

Source tensors that never reach the loss (the tower's last layers, post-norm and pooling head, derived buffers, vocabulary rows beyond
`vocab_size`) are *passengers*: kept under their names, never trained, written back unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_longvila.config import Config
from megatron_longvila.models.init import global_parameters, mark_parameters, shard_for_rank
from megatron_longvila.models.lora import is_adapter
from megatron_longvila.models.siglip import resize_position_table
from megatron_longvila.parallel.groups import Groups

State = dict[str, Tensor]

_VISION = "vision_tower.vision_model."
EXTRA_ROWS = "#rows_beyond_vocab_size"
_TABLE, _HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
_POSITIONS = "vision_tower.position_table"
# Of a whole SigLIP, whose text half stands beside the tower.
BESIDE_VISION = ("vision_tower.text_model.", "vision_tower.logit_scale", "vision_tower.logit_bias")
# Tensors that may be in a source without a target. The layer number is checked against the configuration in `_is_passenger`.
_PASSENGERS = (
    re.compile(r"vision_tower\.vision_model\.(post_layernorm|head)\..+"),
    re.compile(r"vision_tower\.vision_model\.embeddings\.position_ids"),
    re.compile(r"vision_tower\.(text_model\..+|logit_scale|logit_bias)"),
    re.compile(r"llm\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)
_VISION_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\..+")


@dataclass(frozen=True)
class Rule:
    """One target tensor and the source tensors it is made of.

    Attributes:
        shapes: of the sources.
        merge: sources -> target.
        split: target -> sources; the inverse of merge.
    """

    target: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    merge: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def rules(config: Config) -> list[Rule]:
    """Every tensor of the model `config` describes, exactly once; adapters are not among them (`adapter_rules`)."""
    return [*_vision_rules(config), *_projector_rules(config), *_llm_rules(config)]


def adapter_rules(config: Config) -> list[Rule]:
    """Every adapter matrix of the model `config` describes; the sources are PEFT's names for an adapter of the decoder alone."""
    llm, lora = config.model.llm, config.model.lora
    queries, groups = llm.num_attention_heads * llm.head_dim, llm.num_query_groups * llm.head_dim
    sizes = {
        "q": (llm.hidden_size, queries),
        "k": (llm.hidden_size, groups),
        "v": (llm.hidden_size, groups),
        "o": (queries, llm.hidden_size),
    }
    found = []
    for index in range(llm.num_layers if lora.rank else 0):
        for part, (inputs, outputs) in sizes.items():
            linear = "linear_proj" if part == "o" else "linear_qkv"
            target = f"language_model.decoder.layers.{index}.self_attention.{linear}.lora.{part}"
            source = f"base_model.model.model.layers.{index}.self_attn.{part}_proj.lora"
            if part in lora.targets:
                found.append(_copy(f"{target}.A", f"{source}_A.weight", lora.rank, inputs))
                found.append(_copy(f"{target}.B", f"{source}_B.weight", outputs, lora.rank))
    return found


@dataclass(frozen=True)
class ImportPlan:
    """Where every tensor of a source goes; names have the inner `vision_model.`.

    Attributes:
        rules: how the model is filled, each rule once.
        passengers: tensors that travel whole.
        extra_rows: vocabulary matrices with more rows than the model: the rows beyond travel too.
        repeats_table: the source has an `lm_head` although it is tied; it must equal the embedding.
    """

    rules: tuple[Rule, ...]
    passengers: tuple[str, ...]
    extra_rows: tuple[str, ...]
    repeats_table: bool


def plan_import(shapes: Mapping[str, tuple[int, ...]], config: Config, *, resize_positions: bool = False) -> ImportPlan:
    """Give every tensor of a source its place, from names (as `inner_names` spells them) and shapes alone.

    Raises:
        ValueError: a source tensor has no rule and is no passenger, a target is not filled, or a shape is wrong.
    """
    found, remaining, missing, extra_rows = rules(config), set(shapes), [], []
    repeats_table = config.model.llm.tie_embeddings and {_HEAD, _TABLE} <= remaining
    if repeats_table:
        remaining.remove(_HEAD)
    for rule in found:
        for name, wanted in zip(rule.sources, rule.shapes, strict=True):
            if name not in remaining:
                missing.append(name)
                continue
            remaining.remove(name)
            shape = tuple(shapes[name])
            if name in (_TABLE, _HEAD) and shape[0] > wanted[0]:
                extra_rows.append(name)
                shape = (wanted[0], *shape[1:])
            if not (resize_positions and rule.target == _POSITIONS):
                _check_shape(name, shape, wanted)
    passengers = sorted(name for name in remaining if _is_passenger(name, config))
    _refuse(missing, remaining.difference(passengers))
    return ImportPlan(tuple(found), tuple(passengers), tuple(extra_rows), repeats_table)


def fill(rule: Rule, sources: Sequence[Tensor]) -> Tensor:
    """The target of a rule, made of its sources, which `plan_import` has passed."""
    tensors = list(sources)
    if rule.sources[0] in (_TABLE, _HEAD):
        tensors[0] = tensors[0][: rule.shapes[0][0]]
    elif rule.target == _POSITIONS and tuple(tensors[0].shape) != rule.shapes[0]:
        tensors[0] = resize_position_table(tensors[0], rule.shapes[0][0])
    return rule.merge(*tensors)


def check_tied(head: Tensor, table: Tensor) -> None:
    """Raises ValueError if an `lm_head` that should repeat the embedding does not, to the last bit: a NaN repeats itself."""
    if head.dtype != table.dtype or head.shape != table.shape or not torch.equal(head.view(torch.uint8), table.view(torch.uint8)):
        raise ValueError(f"{_HEAD} differs from {_TABLE}: they are not tied; set tie_word_embeddings to false in config.json to keep both")


def to_megatron(hf_state: State, config: Config, *, resize_positions: bool = False) -> tuple[State, State]:
    """Weights in VILA's layout to LongVILA's full state.

    Args:
        resize_positions: let a position table of another resolution be interpolated (models/siglip.py) instead of refused.

    Returns:
        (state, passengers). A tied `llm.lm_head.weight` that equals the embedding is accepted and is in neither.

    Raises:
        ValueError: as `plan_import`, or a name occurs in both spellings.
    """
    sources = {name: hf_state[spelled] for name, spelled in inner_names(hf_state).items()}
    plan = plan_import({name: tuple(tensor.shape) for name, tensor in sources.items()}, config, resize_positions=resize_positions)
    if plan.repeats_table:
        check_tied(sources[_HEAD], sources[_TABLE])
    state = {rule.target: fill(rule, [sources[name] for name in rule.sources]) for rule in plan.rules}
    passengers = {name: sources[name] for name in plan.passengers}
    rows = config.model.llm.vocab_size
    return state, passengers | {name + EXTRA_ROWS: sources[name][rows:].clone() for name in plan.extra_rows}


def from_megatron(state: State, passengers: State, config: Config, *, inner_prefix: bool = True) -> State:
    """LongVILA's full state, adapters merged, and the passengers back to VILA's layout: the inverse of `to_megatron`, bit for bit.

    Args:
        inner_prefix: write `vision_tower.vision_model.`, which every reader understands, instead of transformers 5's flat names.

    Raises:
        ValueError: a tensor of the model is missing, unknown or of the wrong shape.
    """
    remaining, hf_state, missing = dict(state), {}, []
    shapes = full_shapes(config)
    for rule in rules(config):
        if rule.target not in remaining:
            missing.append(rule.target)
            continue
        tensor = remaining.pop(rule.target)
        _check_shape(rule.target, tuple(tensor.shape), shapes[rule.target])
        hf_state.update(split(rule, tensor, passengers))
    if any(map(is_adapter, remaining)):
        raise ValueError("the state has adapters, which the layout does not know; merge them first with tools/merge_lora.py")
    _refuse(missing, remaining)
    for name, tensor in passengers.items():
        if name.endswith(EXTRA_ROWS):
            continue
        if name in hf_state:
            raise ValueError(f"passenger {name} is also a tensor of the model; drop the passenger")
        hf_state[name] = tensor
    return hf_state if inner_prefix else {flat_name(name): tensor for name, tensor in hf_state.items()}


def split(rule: Rule, tensor: Tensor, passengers: Mapping[str, Tensor]) -> State:
    """The sources of a rule, made of its target and of the vocabulary rows that travelled."""
    parts = dict(zip(rule.sources, (part.contiguous() for part in rule.split(tensor)), strict=True))
    for name in parts.keys() & {_TABLE, _HEAD}:
        if name + EXTRA_ROWS in passengers:
            parts[name] = torch.cat([parts[name], passengers[name + EXTRA_ROWS]])
    return parts


def inner_names(names: Iterable[str]) -> dict[str, str]:
    """Name with the inner `vision_model.` -> the name that was given.

    Raises:
        ValueError: a name occurs in both spellings.
    """
    found: dict[str, str] = {}
    for name in names:
        inner = name
        if name.startswith("vision_tower.") and not name.startswith((_VISION, *BESIDE_VISION)):
            inner = _VISION + name.removeprefix("vision_tower.")
        if inner in found:
            raise ValueError(f"{inner} is in the source twice, with and without its inner vision_model.; remove one")
        found[inner] = name
    return found


def flat_name(name: str) -> str:
    """The name without the inner `vision_model.`."""
    return "vision_tower." + name.removeprefix(_VISION) if name.startswith(_VISION) else name


def full_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Global name -> full shape of every parameter of the model, adapters too, whatever the mesh. A tied output layer is not in it."""
    return {
        rule.target: tuple(rule.merge(*(torch.empty(shape, device="meta") for shape in rule.shapes)).shape)
        for rule in (*rules(config), *adapter_rules(config))
    }


@torch.no_grad()
def load_full_state(model: torch.nn.Module, state: State, config: Config, groups: Groups) -> None:
    """Copy this rank's slices of a full state into `model` (not wrapped in DDP), in the parameters' dtype and device.

    Raises:
        ValueError: a parameter of this rank is not in `state`, `state` has a name that no pipeline stage has, or a shape is wrong.
    """
    mark_parameters(model)
    parameters = dict(global_parameters(model))
    _refuse([name for name in parameters if name not in state], state.keys() - full_shapes(config).keys())
    for name, parameter in parameters.items():
        parameter.copy_(shard_for_rank(name, state[name], parameter, groups.tp.rank(), groups.tp.size()))


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Rows of q, k and v (weights [rows, D] or biases [rows]) to Megatron's order: per key/value head its query heads, then k, then v."""
    parts = [x.unflatten(0, (num_groups, -1)) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `merge_qkv`."""
    grouped = qkv.unflatten(0, (num_groups, -1))
    sizes = (grouped.shape[1] - 2 * head_dim, head_dim, head_dim)
    return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))


def _copy(target: str, source: str, *shape: int) -> Rule:
    return Rule(target, (source,), (shape,), lambda x: x, lambda x: (x,))


def _affine(target: str, source: str, *shape: int) -> Iterator[Rule]:
    """Weight of `shape` and bias of a linear, convolution or norm."""
    yield _copy(f"{target}.weight", f"{source}.weight", *shape)
    yield _copy(f"{target}.bias", f"{source}.bias", shape[0])


def _qkv(target: str, source: str, kind: str, head_dim: int, heads: tuple[int, int], inputs: tuple[int, ...]) -> Rule:
    num_heads, num_groups = heads
    shapes = tuple((count * head_dim, *inputs) for count in (num_heads, num_groups, num_groups))
    sources = tuple(f"{source}.{part}_proj.{kind}" for part in "qkv")
    merge, split = partial(merge_qkv, num_groups=num_groups), partial(split_qkv, num_groups=num_groups, head_dim=head_dim)
    return Rule(f"{target}.{kind}", sources, shapes, merge, split)


def _padded_rows(target: str, source: str, rows: int, padded_rows: int, hidden: int) -> Rule:
    """A vocabulary matrix: zero rows are added up to the padded size, and cut again."""
    pad = partial(torch.nn.functional.pad, pad=(0, 0, 0, padded_rows - rows))
    return Rule(target, (source,), ((rows, hidden),), pad, lambda x: (x[:rows],))


def _vision_rules(config: Config) -> Iterator[Rule]:
    vision = config.model.vision
    hidden, ffn, heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    embeddings = f"{_VISION}embeddings"
    yield from _affine("vision_tower.patch_embedding", f"{embeddings}.patch_embedding", hidden, 3, vision.patch_size, vision.patch_size)
    yield _copy(_POSITIONS, f"{embeddings}.position_embedding.weight", vision.grid_size**2, hidden)
    for index in range(vision.built_layers):
        target, source = f"vision_tower.encoder.layers.{index}", f"{_VISION}encoder.layers.{index}"
        for kind, inputs in (("weight", (hidden,)), ("bias", ())):
            qkv_target = f"{target}.self_attention.linear_qkv"
            yield _qkv(qkv_target, f"{source}.self_attn", kind, hidden // heads, (heads, heads), inputs)
        yield from _affine(f"{target}.self_attention.linear_proj", f"{source}.self_attn.out_proj", hidden, hidden)
        yield from _affine(f"{target}.input_layernorm", f"{source}.layer_norm1", hidden)
        yield from _affine(f"{target}.pre_mlp_layernorm", f"{source}.layer_norm2", hidden)
        yield from _affine(f"{target}.mlp.linear_fc1", f"{source}.mlp.fc1", ffn, hidden)
        yield from _affine(f"{target}.mlp.linear_fc2", f"{source}.mlp.fc2", hidden, ffn)


def _projector_rules(config: Config) -> Iterator[Rule]:
    """VILA numbers the modules of a Sequential; merges and activations count but have no weights."""
    kind, side = config.model.projector.type, config.model.projector.downsample
    channels, hidden = config.model.vision.hidden_size * side**2, config.model.llm.hidden_size
    layers = "mm_projector.layers"
    if kind == "linear":
        yield from _affine("projector.linear_out", layers, hidden, channels)
        return
    first, second = {1: (0, 2), 2: (2, 4), 3: (5, 7)}[side]
    if side > 1:
        yield from _affine("projector.norm", f"{layers}.1", channels)
    if side == 3:
        middle = channels // 3
        yield from _affine("projector.linear_in", f"{layers}.2", middle, channels)
        yield from _affine("projector.middle_norm", f"{layers}.4", middle)
        channels = middle
    yield from _affine("projector.linear_fc1", f"{layers}.{first}", hidden, channels)
    yield from _affine("projector.linear_fc2", f"{layers}.{second}", hidden, hidden)


def _llm_rules(config: Config) -> Iterator[Rule]:
    llm = config.model.llm
    hidden, ffn, dim, heads = llm.hidden_size, llm.ffn_hidden_size, llm.head_dim, (llm.num_attention_heads, llm.num_query_groups)
    table = (llm.vocab_size, llm.padded_vocab_size, hidden)
    yield _padded_rows("language_model.embedding.word_embeddings.weight", _TABLE, *table)
    for index in range(llm.num_layers):
        target, source = f"language_model.decoder.layers.{index}", f"llm.model.layers.{index}"
        yield _copy(f"{target}.input_layernorm.weight", f"{source}.input_layernorm.weight", hidden)
        yield _qkv(f"{target}.self_attention.linear_qkv", f"{source}.self_attn", "weight", dim, heads, (hidden,))
        if llm.architecture == "qwen2":
            yield _qkv(f"{target}.self_attention.linear_qkv", f"{source}.self_attn", "bias", dim, heads, ())
        yield _copy(f"{target}.self_attention.linear_proj.weight", f"{source}.self_attn.o_proj.weight", hidden, heads[0] * dim)
        yield _copy(f"{target}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight", hidden)
        gate_up = (f"{source}.mlp.gate_proj.weight", f"{source}.mlp.up_proj.weight")
        yield Rule(f"{target}.mlp.linear_fc1.weight", gate_up, ((ffn, hidden),) * 2, lambda *x: torch.cat(x), lambda x: x.chunk(2))
        yield _copy(f"{target}.mlp.linear_fc2.weight", f"{source}.mlp.down_proj.weight", hidden, ffn)
    yield _copy("language_model.decoder.final_layernorm.weight", "llm.model.norm.weight", hidden)
    if not llm.tie_embeddings:
        yield _padded_rows("language_model.output_layer.weight", _HEAD, *table)


def _is_passenger(name: str, config: Config) -> bool:
    layer = _VISION_LAYER.fullmatch(name)
    if layer:
        return config.model.vision.built_layers <= int(layer[1]) < config.model.vision.num_layers
    return any(pattern.fullmatch(name) for pattern in _PASSENGERS)


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape == tuple(wanted):
        return
    raise ValueError(
        f"{name} has shape {shape}, the configuration asks for {tuple(wanted)}; correct the model's sizes there (config.json of an import, "
        "the section model of config.yaml)"
    )


def _refuse(missing, unexpected) -> None:
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} missing tensors: {sorted(missing)}; {len(unexpected)} unexpected: {sorted(unexpected)}; "
            "the configuration (config.json of an import, the section model of config.yaml) must describe exactly these weights"
        )
