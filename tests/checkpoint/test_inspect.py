"""inspect says what a folder is, from headers alone, and finds every difference between two."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import hf_models
import pytest
import torch
from imported import import_folders
from safetensors.torch import load_file, save_file

from megatron_longvila.checkpoint.inspect import differences, inspect
from ranks import run_ranks

LLM_PARAMETERS = 146_752


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    hf_models.save_vila(root / "vila")
    hf_models.save_vila(root / "half", dtype=torch.bfloat16)
    hf_models.save_llava(root / "llava", "llama", tied=True, image_size=hf_models.ODD_GRID)
    run_ranks(import_folders, 1, [(root / name, root / f"{name}_checkpoint") for name in ("vila", "llava")])
    return root


def test_a_model_is_described(folder):
    lines = inspect(folder / "vila").lines()
    assert lines[0] == f"{folder / 'vila'}: model in VILA's layout"
    text = "\n".join(lines)
    parameters = sum(tensor.numel() for tensor in load_file(folder / "vila/llm/model.safetensors").values())
    assert parameters == LLM_PARAMETERS
    for words in (
        f"language model +{parameters:,} parameters in 39 tensors .float32.; qwen2, 3 layers of 64 and 96, 4 heads, 2 for keys and values",
        "projector +12,672 parameters in 6 tensors .float32.; mlp_downsample",
        "vision tower +20,256 parameters in 35 tensors .float32.; SigLIP, 3 layers of 32 .feature -2., 28 px, 4 x 4 patches",
        "not in the loss +15,040 parameters in 29 .*encoder.layers.2 .16., .*head .11., .*post_layernorm .2.",
        "RoPE +base 1,000,000, scaling none",
        "context length +512",
    ):
        assert re.search(words, text), (words, text)
    assert "MISSING" not in text


@pytest.mark.parametrize("name", ["vila", "llava"])
def test_a_checkpoint_is_what_it_was_imported_from(folder, name):
    source, checkpoint = inspect(folder / name), inspect(folder / f"{name}_checkpoint")
    assert checkpoint.kind == "Megatron checkpoint of step 0, weights alone"
    assert source.lines()[1:] == checkpoint.lines()[1:]
    assert differences(source, checkpoint) == []


def test_parts_alone_and_what_is_missing(folder):
    llm, tower = inspect(folder / "vila/llm"), inspect(folder / "vila/vision_tower")
    assert llm.kind == "language model alone (qwen2)" and tower.kind == "vision tower alone (SigLIP)"
    assert not llm.missing and not llm.unused and not tower.missing and len(tower.unused) == 29
    broken = folder / "broken"
    shutil.copytree(folder / "vila/llm", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    assert inspect(broken).missing == ("llm.model.norm.weight",)
    assert "MISSING         1 tensors: llm.model.norm.weight" in "\n".join(inspect(broken).lines())
    with pytest.raises(ValueError, match="v2l_projector"):
        inspect(folder / "vila/mm_projector")


def test_every_difference_is_named(folder):
    changed = folder / "changed"
    shutil.copytree(folder / "vila", changed)
    tensors = load_file(changed / "llm/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] += 0.25
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, changed / "llm/model.safetensors", metadata={"format": "pt"})
    settings = hf_models.read_json(changed / "llm/config.json") | {"rope_theta": 10_000.0, "use_cache": False}
    hf_models.write_json(changed / "llm/config.json", settings)
    (changed / "vision_tower/preprocessor_config.json").unlink()
    first, second = inspect(folder / "vila"), inspect(changed)
    found = differences(first, second)
    assert found == [
        "llm.rotary_base: 1000000.0 and 10000.0",
        "2 of 109 tensors have other values: llm.model.norm.weight by nan, llm.model.layers.1.self_attn.q_proj.weight by 0.25",
        "file llm/config.json: other content in rope_theta, use_cache",
        "file vision_tower/preprocessor_config.json: only the first has it",
    ]
    assert differences(second, second) == []  # a NaN equals itself
    assert not any("values" in line for line in differences(first, second, values=False))


def test_differences_of_types_and_shapes(folder):
    found = differences(inspect(folder / "vila"), inspect(folder / "half"))
    assert "109 tensors are float32 in the first and bfloat16 in the second" in found
    assert any(re.match("109 of 109 tensors have other values", line) for line in found)
    found = differences(inspect(folder / "vila"), inspect(folder / "llava"))
    assert "llm.architecture: qwen2 and llama" in found and "projector.type: mlp_downsample and mlp2x_gelu" in found
    assert any(re.search(r"position_embedding.weight: shape \(16, 32\) and \(25, 32\)", line) for line in found)
    first_only = next(line for line in found if line.startswith("only the first has "))
    assert "llm.lm_head (1), llm.model.layers.0 (3), llm.model.layers.1 (3)" in first_only  # Qwen2's biases of q, k and v
