"""Imported models give transformers' logits on every mesh: text, an image and a 7-frame video, and rotary positions far apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hf_models
import pytest
import torch
from imported import import_folders

from ranks import run_ranks

ODD = hf_models.ODD_GRID  # 5 x 5 patches, which every merge pads, and pixels are left over; the even grid is 4 x 4
YARN = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


def save_parts(root: Path, **options) -> None:
    """A language model and a tower, the start of stage 1."""
    hf_models.save_llm(root / "llm", **options)
    hf_models.save_siglip(root / "vision_tower", ODD)


# How each folder is written. Those of parts have no projector, and are compared on text.
FOLDERS = {
    "vila_qwen2": partial(hf_models.save_vila),
    "vila_qwen2_tied_odd": partial(hf_models.save_vila, tied=True, image_size=ODD),
    "vila_linear_scaling": partial(hf_models.save_vila, projector="linear", rope_parameters=hf_models.LINEAR_SCALING, pooling_head=False),
    "vila_llama_3x3_odd": partial(hf_models.save_vila, architecture="llama", projector="mlp_downsample_3x3_fix", image_size=ODD),
    "vila_llama_tied_mlp2x": partial(hf_models.save_vila, architecture="llama", projector="mlp2x_gelu", tied=True),
    "llava_qwen2": partial(hf_models.save_llava),
    "llava_llama_tied_odd": partial(hf_models.save_llava, architecture="llama", tied=True, image_size=ODD),
    "parts_llama": partial(save_parts, architecture="llama"),
    "parts_qwen2_yarn": partial(save_parts, rope_parameters=YARN),
    "parts_llama_dynamic": partial(save_parts, architecture="llama", rope_parameters=DYNAMIC, old_rope=True),
}
MESHES = {"one": (1, 1, 1, 1), "tp2": (2, 1, 1, 1), "cp4": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, save in FOLDERS.items():
        save(root / name)
    run_ranks(import_folders, 1, [(root / name, root / f"{name}_checkpoint") for name in FOLDERS])
    return root


def our_logits(rank: int, root: Path, mesh_name: str, all_inputs: dict) -> dict[tuple[str, str], torch.Tensor]:
    """Rank 0's logits of every folder and input."""
    from dataclasses import replace

    from megatron_longvila import config_io
    from megatron_longvila.config import CheckpointConfig, ParallelConfig
    from megatron_longvila.evaluation.logits import row_logits
    from megatron_longvila.evaluation.model import load_model
    from megatron_longvila.mesh import Mesh
    from megatron_longvila.parallel.groups import destroy_groups, initialize_groups

    tp, pp, ulysses, ring = MESHES[mesh_name]
    groups = initialize_groups(Mesh(tp * pp * ulysses * ring, tp, pp, ulysses, ring), timeout_s=60)
    found = {}
    for name in FOLDERS:
        checkpoint = root / f"{name}_checkpoint"
        config = replace(
            config_io.load(checkpoint / "config.yaml"),
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(load=str(checkpoint)),
        )
        model = load_model(config, groups)
        inputs = all_inputs[name]
        rows = {
            "text": row_logits(model, config, groups, inputs.text_ids),
            "far": row_logits(model, config, groups, inputs.far_ids, positions_L=inputs.far_positions),
        }
        if not name.startswith("parts"):
            image, video = inputs.frames_FSS3[:1], inputs.frames_FSS3
            rows["image"] = row_logits(model, config, groups, inputs.image_ids, frames_FHWC=image)
            rows["video"] = row_logits(model, config, groups, inputs.video_ids, frames_FHWC=video)
        found |= {(name, key): logits for key, logits in rows.items()}
    destroy_groups()
    return found if rank == 0 else {}


@pytest.fixture(scope="module")
def expected(models) -> tuple[dict, dict[tuple[str, str], torch.Tensor]]:
    """(inputs of each folder, transformers' logits of each folder and input)."""
    from megatron_longvila.evaluation.hf_reference import HuggingFaceModel
    from megatron_longvila.evaluation.verify import make_inputs

    all_inputs, found = {}, {}
    for name in FOLDERS:
        is_whole = not name.startswith("parts")
        model = HuggingFaceModel(models / name if is_whole else models / name / "llm")
        inputs = all_inputs[name] = make_inputs(model.sizes)
        rows = {
            "text": model.text_logits(inputs.text_ids, inputs.text_positions),
            "far": model.text_logits(inputs.far_ids, inputs.far_positions),
        }
        if is_whole:
            rows["image"] = model.multimodal_logits(inputs.frames_FSS3[:1], inputs.image_ids)
            rows["video"] = model.multimodal_logits(inputs.frames_FSS3, inputs.video_ids)
        found |= {(name, key): logits for key, logits in rows.items()}
    return all_inputs, found


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_equal_transformers(models, expected, mesh):
    tp, pp, ulysses, ring = MESHES[mesh]
    all_inputs, theirs = expected
    ours = run_ranks(our_logits, tp * pp * ulysses * ring, models, mesh, all_inputs)[0]
    assert ours.keys() == theirs.keys()
    worst = {key: (ours[key] - theirs[key]).abs().max().item() for key in theirs}
    assert all(error <= 1e-4 for error in worst.values()), worst
    assert all(theirs[key].std() > 0.3 for key in theirs)  # the logits say something
