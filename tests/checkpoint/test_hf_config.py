"""Configurations of transformers' own classes are read as transformers means them, and written so that it reads the same."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hf_models import transformers

from megatron_longvila.checkpoint.hf_config import read_llm, read_rope, read_vision, update_llm, update_vision, write_llm, write_vision
from megatron_longvila.config import LLMConfig, RopeScaling, VisionConfig

CLASSES = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}
SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    RopeScaling("yarn", 4.0, original_max_position_embeddings=128, beta_fast=20.0, beta_slow=2.0),
    RopeScaling("yarn", 4.0, original_max_position_embeddings=128, attention_factor=1.25),
]


def test_absent_keys_have_transformers_defaults():
    for architecture, made in CLASSES.items():
        full = made().to_dict()
        assert read_llm({"model_type": architecture, "max_position_embeddings": 4096}, "x") == read_llm(
            full | {"max_position_embeddings": 4096}, "x"
        )
    assert read_vision({"model_type": "siglip_vision_model"}, "x") == read_vision(transformers.SiglipVisionConfig().to_dict(), "x")


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.type if scaling else "none")
@pytest.mark.parametrize("architecture", CLASSES)
def test_what_is_written_transformers_reads_and_we_read_back(architecture, scaling):
    import torch

    from megatron_longvila.models.rope import inverse_frequencies

    llm = LLMConfig(architecture, 64, 96, 3, 4, 2, 16, 420, 512, 50_000.0, scaling, 1e-5, True)
    raw = write_llm(llm)
    assert read_llm(raw, "x") == llm and update_llm(raw, llm) == raw
    config = CLASSES[architecture](**raw)
    new = config.to_dict()
    assert "rope_parameters" in new and replace(read_llm(new, "x"), rope_scaling=None) == replace(llm, rope_scaling=None)
    module = {"qwen2": transformers.Qwen2Model, "llama": transformers.LlamaModel}[architecture](config)
    assert torch.equal(module.rotary_emb.inv_freq, inverse_frequencies(llm))


def test_dynamic_scaling_starts_at_transformers_maximum():
    raw = {"model_type": "llama", "max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    llm = read_llm(raw, "x")
    assert llm.rope_scaling == RopeScaling("dynamic", 2.0, original_max_position_embeddings=2048) and llm.max_position_embeddings == 4096
    assert update_llm(raw, llm) == raw
    assert read_llm(write_llm(llm), "x") == llm
    assert update_llm(raw, replace(llm, rotary_base=7.0)) == raw | {
        "rope_theta": 7.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_only_what_changed_is_written_in_the_spelling_that_was_there(spelling):
    raw = {"model_type": "qwen2", "surprise": [1], "num_hidden_layers": 3}
    raw |= (
        {"rope_theta": 5.0, "rope_scaling": None} if spelling == "old" else {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    )
    llm = read_llm(raw, "x")
    assert llm.rotary_base == 5.0 and update_llm(raw, llm) == raw
    changed = replace(llm, rotary_base=9.0, rope_scaling=RopeScaling("linear", 2.0))
    rope = {"rope_type": "linear", "factor": 2.0}
    wanted = {"rope_theta": 9.0, "rope_scaling": rope} if spelling == "old" else {"rope_parameters": {"rope_theta": 9.0} | rope}
    assert update_llm(raw, changed) == raw | wanted


def test_a_trained_length_that_only_the_maximum_said_is_kept():
    raw = {"model_type": "qwen2", "max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    llm = read_llm(raw, "x")
    assert llm.rope_scaling.original_max_position_embeddings == 512 and update_llm(raw, llm) == raw
    longer = replace(llm, max_position_embeddings=2048)
    assert read_llm(update_llm(raw, longer), "x") == longer


def test_both_spellings_say_what_changed():
    """A configuration with another inside keeps the keys that are not written: none of them may say what was."""
    rope = {"rope_type": "linear", "factor": 2.0}
    raw = {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 5.0}}
    for scaling in (RopeScaling("linear", 4.0), None):
        changed = replace(read_llm(raw, "x"), rotary_base=9.0, rope_scaling=scaling)
        assert read_llm(raw | update_llm(raw, changed), "x") == changed


def test_a_part_of_the_head_that_turns_is_refused():
    for value in (None, 1.0):
        read_llm({"model_type": "llama", "partial_rotary_factor": value}, "x")
    with pytest.raises(ValueError, match="'partial_rotary_factor': 0.5.*its outputs would be others"):
        read_llm({"model_type": "llama", "partial_rotary_factor": 0.5}, "x")


def test_contradicting_spellings_are_refused():
    rope = {"rope_type": "linear", "factor": 2.0}
    assert read_rope({"rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 3.0}}, "x") == (3.0, RopeScaling("linear", 2.0))
    with pytest.raises(ValueError, match="which are not the same"):
        read_rope({"rope_scaling": rope, "rope_parameters": rope | {"factor": 4.0}}, "x")


def test_towers_alone_and_in_a_whole_siglip():
    vision = VisionConfig(56, 7, 32, 48, 3, 4)
    raw = write_vision(vision)
    assert read_vision(raw, "x") == vision and update_vision(raw, vision) == raw
    assert read_vision(transformers.SiglipVisionConfig(**raw).to_dict(), "x") == vision
    whole = {
        "model_type": "siglip",
        "text_config": {"hidden_size": 1},
        "vision_config": {key: raw[key] for key in raw if key != "model_type"},
    }
    assert read_vision(whole, "x") == vision and update_vision(whole, vision) == whole
    larger = update_vision(whole, replace(vision, image_size=70))
    assert larger["vision_config"]["image_size"] == 70 and larger["text_config"] == whole["text_config"]
    assert asdict(read_vision(larger, "x", select_layer=-1))["select_layer"] == -1
