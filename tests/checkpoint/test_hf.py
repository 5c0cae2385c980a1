"""The name maps are total: every tensor one rule, bit-equal both ways, and every leftover is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_modules import hf_modules
from megatron_longvila.checkpoint.hf import from_megatron, full_shapes, merge_qkv, rules, split_qkv, to_megatron
from megatron_longvila.config import PROJECTORS, Config, ProjectorConfig
from oracle import tiny_config


def make_config(architecture: str = "qwen2", tied: bool = False, projector: str = "mlp_downsample") -> Config:
    config = tiny_config(architecture, tied)
    return replace(config, model=replace(config.model, projector=ProjectorConfig(projector)))


def hf_state(config: Config, *, inner_prefix: bool = True, head: bool = True) -> dict[str, torch.Tensor]:
    """Random weights under VILA's names, from transformers' own modules (the projector's from a plain Sequential)."""
    tower, language_model = hf_modules(config, pooling_head=head)
    prefix = "vision_tower.vision_model." if inner_prefix else "vision_tower."
    state = {prefix + name.removeprefix("vision_model."): p for name, p in tower.named_parameters()}
    state |= {f"llm.{name}": p for name, p in language_model.named_parameters()}
    state |= {f"mm_projector.{name}": p for name, p in projector(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in state.items()}


def projector(config: Config) -> torch.nn.Module:
    """A module with the numbering of VILA's projector: merges and activations take a place but have no weights."""
    from torch.nn import GELU, Identity, LayerNorm, Linear, Sequential

    c, d = config.model.vision.hidden_size, config.model.llm.hidden_size
    two_by_two = [Identity(), LayerNorm(4 * c), Linear(4 * c, d), GELU(), Linear(d, d)]
    layers = {
        "linear": lambda: Linear(c, d),
        "mlp2x_gelu": lambda: Sequential(Linear(c, d), GELU(), Linear(d, d)),
        "mlp_downsample": lambda: Sequential(*two_by_two),
        "mlp_downsample_2x2_fix": lambda: Sequential(*two_by_two),
        "mlp_downsample_3x3_fix": lambda: Sequential(
            Identity(), LayerNorm(9 * c), Linear(9 * c, 3 * c), GELU(), LayerNorm(3 * c), Linear(3 * c, d), GELU(), Linear(d, d)
        ),
    }[config.model.projector.type]()
    return torch.nn.ModuleDict({"layers": layers})


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("projector_type", PROJECTORS)
@pytest.mark.parametrize("architecture, tied", [("qwen2", False), ("qwen2", True), ("llama", False)])
@pytest.mark.parametrize("inner_prefix", [True, False])
def test_round_trip_is_bit_equal(architecture, tied, projector_type, inner_prefix):
    config = make_config(architecture, tied, projector_type)
    source = hf_state(config, inner_prefix=inner_prefix)
    state, passengers = to_megatron(source, config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == full_shapes(config)
    # The last layer, the post norm and the pooling head of the published tower do not reach the loss.
    assert all(any(part in name for part in ("encoder.layers.2.", ".post_layernorm.", ".head.")) for name in passengers)
    assert len(passengers) == 16 + 2 + sum(".head." in name for name in source)
    assert same(from_megatron(state, passengers, config, inner_prefix=inner_prefix), source)
    exported = from_megatron({name: tensor + 1 for name, tensor in state.items()}, passengers, config)
    reference = from_megatron(state, passengers, config)
    assert same(exported, {name: tensor + (name not in passengers) for name, tensor in reference.items()})


def test_every_name_has_exactly_one_rule():
    for kind in PROJECTORS:
        for architecture, tied in (("qwen2", False), ("qwen2", True), ("llama", False)):
            found = rules(make_config(architecture, tied, kind))
            sources = [source for rule in found for source in rule.sources]
            assert len(set(sources)) == len(sources)
            assert len({rule.target for rule in found}) == len(found)


def test_query_key_value_rows_are_grouped():
    """Two key/value heads with two query heads each, head dim 1: q0 q1 k0 v0, q2 q3 k1 v1."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    merged = merge_qkv(q, k, v, num_groups=2)
    assert merged.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [part.tolist() for part in split_qkv(merged, num_groups=2, head_dim=1)] == [q.tolist(), k.tolist(), v.tolist()]


def test_vocabulary_is_padded_with_zeros_and_cut_again():
    config = make_config()
    source = hf_state(config)
    state, passengers = to_megatron(source, config)
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        assert state[name].shape[0] == 128 and state[name][:120].any() and not state[name][120:].any()
    state["language_model.output_layer.weight"][120:] = 5.0  # whatever training left there
    assert same(from_megatron(state, passengers, config), source)


def test_vocabulary_rows_beyond_the_configuration_are_passengers():
    config = make_config()
    source = hf_state(config)
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        source[name] = torch.cat([source[name], torch.randn(8, 64)])
    state, passengers = to_megatron(source, config)
    assert state["language_model.output_layer.weight"].shape[0] == 128
    assert sum("llm." in name for name in passengers) == 2
    assert same(from_megatron(state, passengers, config), source)


def test_tied_head_may_be_there_if_it_is_equal():
    config = make_config(tied=True)
    source = hf_state(config)
    assert "llm.lm_head.weight" not in source
    with_head = source | {"llm.lm_head.weight": source["llm.model.embed_tokens.weight"].clone()}
    state, passengers = to_megatron(with_head, config)
    assert same(from_megatron(state, passengers, config), source)
    with_head["llm.lm_head.weight"] += 1
    with pytest.raises(ValueError, match="llm.lm_head.weight differs .* set tie_word_embeddings to false in config.json"):
        to_megatron(with_head, config)


def test_derived_buffers_are_passengers():
    config = make_config("llama")
    source = hf_state(config, head=False)
    source["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    source["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    state, passengers = to_megatron(source, config)
    assert {"llm.model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids"} <= set(passengers)
    assert same(from_megatron(state, passengers, config), source)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("llm.model.norm.weight"), r"1 missing tensors: \['llm.model.norm.weight'\]; 0 unexpected"),
        (lambda s: s.update({"llm.model.layers.4.mlp.up_proj.weight": torch.zeros(96, 64)}), r"1 unexpected: \['llm.model.layers.4.mlp.up"),
        (lambda s: s.update({"vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias": torch.zeros(48)}), "1 unexpected"),
        (lambda s: s.update({"mm_projector.layers.2.bias": torch.zeros(65)}), r"mm_projector.layers.2.bias has shape \(65,\)"),
        (lambda s: s.update({"vision_tower.embeddings.patch_embedding.bias": torch.zeros(32)}), "is in the source twice"),
        (lambda s: s.update({"llm.model.embed_tokens.weight": torch.zeros(119, 64)}), r"embed_tokens.weight has shape \(119, 64\)"),
        (lambda s: s.update({"llm.model.layers.0.self_attn.q_norm.weight": torch.zeros(16)}), r"unexpected: \['llm.*q_norm"),
    ],
)  # fmt: skip
def test_wrong_sources_are_refused_by_name(change, message):
    config = make_config()
    source = hf_state(config)
    change(source)
    with pytest.raises(ValueError, match=message):
        to_megatron(source, config)


def test_wrong_states_are_refused_on_export():
    config = make_config()
    state, passengers = to_megatron(hf_state(config), config)
    with pytest.raises(ValueError, match=r"1 missing tensors: \['projector.norm.bias'\]; 1 unexpected: \['projector.norm.other'\]"):
        from_megatron(
            {name.replace("norm.bias", "norm.other") if "projector" in name else name: t for name, t in state.items()}, {}, config
        )
    with pytest.raises(ValueError, match="passenger llm.model.norm.weight is also a tensor of the model"):
        from_megatron(state, passengers | {"llm.model.norm.weight": torch.zeros(64)}, config)


def test_position_table_of_another_resolution():
    config = make_config()
    source = hf_state(config)
    name = "vision_tower.vision_model.embeddings.position_embedding.weight"
    source[name] = torch.randn(25, 32)
    with pytest.raises(ValueError, match=r"position_embedding.weight has shape \(25, 32\).*config.json of an import"):
        to_megatron(source, config)
    state, _ = to_megatron(source, config, resize_positions=True)
    assert state["vision_tower.position_table"].shape == (16, 32)
    assert torch.equal(state["vision_tower.position_table"][[0, -1]], source[name][[0, -1]])


def test_load_refuses_incomplete_and_unknown_states():
    from types import SimpleNamespace

    from megatron_longvila.checkpoint.hf import load_full_state

    config = make_config()
    state, _ = to_megatron(hf_state(config), config)
    model = torch.nn.ModuleDict({"projector": torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(128)})})
    groups = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    load_full_state(model, state, config, groups)
    assert torch.equal(model["projector"]["norm"].weight, state["projector.norm.weight"])
    with pytest.raises(ValueError, match=r"0 missing tensors: \[\]; 1 unexpected: \['surprise'\]"):
        load_full_state(model, state | {"surprise": torch.zeros(1)}, config, groups)
    del state["projector.norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing tensors: \['projector.norm.bias'\]"):
        load_full_state(model, state, config, groups)
    with pytest.raises(ValueError, match=r"projector.norm.weight has shape \(7,\), the model expects \(128,\)"):
        load_full_state(model, state | {"projector.norm.bias": torch.zeros(128), "projector.norm.weight": torch.zeros(7)}, config, groups)
