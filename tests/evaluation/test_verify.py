"""verify passes the same model in another form, and fails for every way in which conversions go wrong."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hf_models
import pytest
import torch
from imported import import_folders
from safetensors.torch import load_file, save_file

from ranks import run_ranks

State = dict[str, torch.Tensor]
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"


def change_tensors(part: str, change: Callable[[State], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / part / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def change_settings(part: str, **settings) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / part / "config.json"
        hf_models.write_json(path, hf_models.read_json(path) | settings)

    return apply


def negate_row(name: str, row: int) -> Callable[[State], None]:
    return lambda state: state[name][row].neg_()


def swap(*names: str) -> Callable[[State], None]:
    def apply(state: State) -> None:
        first, second = (state[name].clone() for name in names)
        state[names[0]], state[names[1]] = second, first

    return apply


def swap_rows(name: str, *rows: int) -> Callable[[State], None]:
    def apply(state: State) -> None:
        state[name][list(rows)] = state[name][list(rows[::-1])]

    return apply


def permute_for_interleaved_rotation(state: State) -> None:
    """Rows in the order of the other rotary convention: pairs side by side instead of half against half."""
    name = f"{ATTENTION}.q_proj.weight"
    state[name] = state[name].unflatten(0, (4, 2, 8)).transpose(1, 2).flatten(0, 2).contiguous()


# What is done to a VILA folder, and the first part in which it must show.
CORRUPTIONS = {
    "query_row": (change_tensors("llm", negate_row(f"{ATTENTION}.q_proj.weight", 5)), "text logits"),
    "key_row": (change_tensors("llm", negate_row(f"{ATTENTION}.k_proj.weight", 30)), "text logits"),
    "query_bias": (change_tensors("llm", negate_row(f"{ATTENTION}.q_proj.bias", 40)), "text logits"),
    "rotary_convention": (change_tensors("llm", permute_for_interleaved_rotation), "text logits"),
    "gate_and_up": (change_tensors("llm", swap(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight")), "text logits"),
    "norms": (
        change_tensors("llm", swap(*(f"model.layers.2.{kind}_layernorm.weight" for kind in ("input", "post_attention")))),
        "text logits",
    ),
    "embedding_row_of_no_text": (
        change_tensors("llm", swap_rows("model.embed_tokens.weight", 201, 202)),
        "embedding rows",
    ),
    "last_vocabulary_row": (change_tensors("llm", negate_row("lm_head.weight", hf_models.VOCAB_SIZE - 1)), "text logits"),
    "rope_base": (change_settings("llm", rope_theta=10_000.0), "rotary angles"),
    "rope_base_nearly_right": (change_settings("llm", rope_theta=1_000_010.0), "rotary angles"),
    "rope_scaling": (change_settings("llm", rope_scaling={"rope_type": "linear", "factor": 4.0}), "rotary angles"),
    "vision_query_row": (
        change_tensors("vision_tower", negate_row("vision_model.encoder.layers.0.self_attn.q_proj.weight", 3)),
        "vision features",
    ),
    "vision_position": (
        change_tensors("vision_tower", negate_row("vision_model.embeddings.position_embedding.weight", 15)),
        "vision features",
    ),
    "vision_layer": (change_settings(".", mm_vision_select_layer=-1), "vision features"),
    "projector_bias": (change_tensors("mm_projector", negate_row("layers.4.bias", 63)), "projector output"),
    "not_a_number": (change_tensors("llm", lambda state: state["model.norm.weight"][0].fill_(float("nan"))), "text logits"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """source: a VILA folder; checkpoint: what was imported from it; half: source in bf16; fp16: another in that type."""
    root = tmp_path_factory.mktemp("verify")
    hf_models.save_vila(root / "source")
    hf_models.save_vila(root / "half", dtype=torch.bfloat16)
    hf_models.save_vila(root / "fp16", "llama", tied=True, dtype=torch.float16)
    names = {"source": "checkpoint", "half": "half_checkpoint", "fp16": "fp16_checkpoint"}
    run_ranks(import_folders, 1, [(root / source, root / checkpoint) for source, checkpoint in names.items()])
    return root


def verify_all(rank: int, pairs: list[tuple[Path, Path]], allow_pickle: bool = False) -> list:
    """Reports, or the messages of what was refused."""
    from megatron_longvila.evaluation.verify import verify

    found = []
    for a, b in pairs:
        try:
            found.append(verify(a, b, allow_pickle=allow_pickle))
        except ValueError as error:
            found.append(str(error))
    return found


def test_an_imported_model_is_the_same(folder):
    (report,) = run_ranks(verify_all, 1, [(folder / "source", folder / "checkpoint")])[0]
    assert report.passed, "\n".join(report.lines())
    assert report.dtype == "float32" and not report.not_compared
    parts = {"rotary angles", "embedding rows", "text logits", "vision features", "projector output", "multimodal logits"}
    assert {one.part for one in report.comparisons} == parts
    assert {one.input for one in report.comparisons} == {"text", "far positions", "every id", "image", "video"}
    assert all(one.worst_absolute <= 1e-4 and 0 < one.limit <= 1e-4 for one in report.comparisons)
    assert report.lines()[-1] == "the same model"


def test_an_imported_model_of_another_type_is_the_same_to_the_limits_of_fp32(folder):
    """Both sides compute in fp32 with the same bf16 or fp16 weights, so nothing is forgiven for the type."""
    for report in run_ranks(verify_all, 1, [(folder / name, folder / f"{name}_checkpoint") for name in ("half", "fp16")])[0]:
        assert report.passed and report.dtype == "float32", "\n".join(report.lines())
        assert all(one.worst_absolute <= 1e-4 and one.limit <= 2e-4 for one in report.comparisons)


def test_every_corruption_fails_where_it_is(folder):
    """The parts before the corrupted one pass; and none of the differences is near its limit. Where a part alone shows it, only that part
    is run."""
    pairs = []
    for name, (corrupt, part) in CORRUPTIONS.items():
        broken = folder / name
        shutil.copytree(folder / "source", broken)
        corrupt(broken)
        alone = {"text logits": "llm", "rotary angles": "llm", "vision features": "vision_tower"}.get(part, ".")
        pairs.append((broken if name == "vision_layer" else broken / alone, folder / "checkpoint"))
    for (name, (_, part)), report in zip(CORRUPTIONS.items(), run_ranks(verify_all, 1, pairs)[0], strict=True):
        text = f"{name}\n" + "\n".join(report.lines())
        failed = [one for one in report.comparisons if not one.passed]
        assert not report.passed and report.lines()[-1] == "NOT the same model", text
        assert failed[0].part == part, text
        assert not any(1 < one.worst_absolute / one.limit < 5 for one in failed if one.part == part), text


def test_weights_rounded_to_another_type_pass_and_corrupted_ones_do_not(folder):
    swapped = folder / "half_swapped"
    shutil.copytree(folder / "half", swapped)
    change_tensors("llm", swap(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"))(swapped)
    pairs = [(folder / "half", folder / "checkpoint"), (folder / "checkpoint", folder / "half"), (folder / "checkpoint", swapped)]
    *same, other = run_ranks(verify_all, 1, pairs)[0]
    for report in same:
        assert report.passed and report.dtype == "bfloat16", "\n".join(report.lines())
        assert max(one.worst_absolute for one in report.comparisons) > 1e-3  # more than fp32 would be allowed
    assert not other.passed


def test_pickled_weights_only_where_they_are_allowed(folder):
    pickled = folder / "pickled"
    shutil.copytree(folder / "source", pickled)
    for part, name in (("llm", "pytorch_model.bin"), ("vision_tower", "pytorch_model.bin"), ("mm_projector", "model.bin")):
        torch.save(load_file(pickled / part / "model.safetensors"), pickled / part / name)
        (pickled / part / "model.safetensors").unlink()
    torch.save({"learning_rate": 0.1}, pickled / "llm" / "training_args.bin")  # the Trainer leaves one, and it holds no weights
    pairs = [(folder / "checkpoint", pickled)]
    assert run_ranks(verify_all, 1, pairs, True)[0][0].passed
    assert "safetensors" in run_ranks(verify_all, 1, pairs)[0][0]
    path = pickled / "mm_projector" / "model.bin"
    path.write_bytes(path.read_bytes()[:300])
    assert "mm_projector/model.bin cannot be loaded as weights alone" in run_ranks(verify_all, 1, pairs, True)[0][0]


def test_folders_that_an_import_understands_are_understood_here(folder):
    """Older folders: a path that is gone, a part that the root describes alone."""
    older = folder / "older"
    shutil.copytree(folder / "source", older)
    (older / "mm_projector" / "config.json").unlink()
    settings = hf_models.read_json(older / "config.json")
    del settings["vision_tower_cfg"]
    hf_models.write_json(older / "config.json", settings | {"llm_cfg": "/gone/llm"})
    (report,) = run_ranks(verify_all, 1, [(older, folder / "checkpoint")])[0]
    assert report.passed and not report.not_compared, "\n".join(report.lines())


def test_of_mixed_types_the_finer_side_is_rounded(folder):
    """A decoder in fp32 beside a tower in bf16, and all in bf16: the difference is the decoder's rounding."""
    mixed = folder / "mixed"
    shutil.copytree(folder / "half", mixed)
    shutil.copytree(folder / "source" / "llm", mixed / "llm", dirs_exist_ok=True)
    pairs = [(folder / "half", mixed), (mixed, folder / "half")]
    for report in run_ranks(verify_all, 1, pairs)[0]:
        assert report.passed and report.dtype == "bfloat16", "\n".join(report.lines())


def test_two_checkpoints_and_parts_without_a_projector(folder):
    shutil.copytree(folder / "source" / "llm", folder / "parts" / "llm")
    shutil.copytree(folder / "source" / "vision_tower", folder / "parts" / "vision_tower")
    pairs = [(folder / "checkpoint", folder / "checkpoint"), (folder / "parts", folder / "checkpoint")]
    same, parts = run_ranks(verify_all, 1, pairs)[0]
    assert same.passed and all(one.worst_absolute == 0 for one in same.comparisons) and not same.not_compared
    assert parts.passed and parts.not_compared == ("projector output", "multimodal logits")


def test_what_does_not_reach_the_feature_may_be_missing(folder):
    """As in exports of a checkpoint that was never imported; the layer that gives the feature may not."""
    dropped, broken = folder / "dropped", folder / "layer_missing"
    for path, layers in ((dropped, "2"), (broken, "12")):
        shutil.copytree(folder / "source", path)
        gone = re.compile(rf"vision_model\.(head|post_layernorm|encoder\.layers\.[{layers}])\..*")

        def drop(state: State, gone=gone) -> None:
            for name in [name for name in state if gone.match(name)]:
                del state[name]

        change_tensors("vision_tower", drop)(path)
    same, message = run_ranks(verify_all, 1, [(dropped, folder / "checkpoint"), (broken, folder / "checkpoint")])[0]
    assert same.passed and not same.not_compared
    assert "encoder.layers.1.mlp.fc1.bias" in message and "encoder.layers.2" not in message


def test_image_settings_inside_a_processor_are_read(folder):
    """Where transformers 5 writes them beside a processor; another mean there is another model."""
    from megatron_longvila.evaluation.hf_reference import HuggingFaceModel

    tower = folder / "with_processor"
    shutil.copytree(folder / "source" / "vision_tower", tower)
    settings = hf_models.read_json(tower / "preprocessor_config.json") | {"image_mean": [0.0] * 3}
    (tower / "preprocessor_config.json").unlink()
    hf_models.write_json(tower / "processor_config.json", {"processor_class": "SiglipProcessor", "image_processor": settings})
    model = HuggingFaceModel(tower)
    side = model.sizes["image_size"]
    assert not model.normalize(torch.zeros(1, side, side, 3, dtype=torch.uint8)).any()


def test_parts_alone_are_compared_as_far_as_they_go(folder):
    pairs = [(folder / "source" / "llm", folder / "checkpoint"), (folder / "checkpoint", folder / "source" / "vision_tower")]
    language, vision = run_ranks(verify_all, 1, pairs)[0]
    assert language.passed and {one.part for one in language.comparisons} == {"rotary angles", "embedding rows", "text logits"}
    assert set(language.not_compared) == {"vision features", "projector output", "multimodal logits"}
    assert vision.passed and {one.part for one in vision.comparisons} == {"vision features"}
    assert set(vision.not_compared) == {"rotary angles", "embedding rows", "text logits", "projector output", "multimodal logits"}


def test_what_cannot_be_compared_is_refused(folder):
    missing, unknown, senseless, other = (folder / name for name in ("missing_tensor", "unknown_tensor", "senseless", "other_size"))
    for path in (missing, unknown, senseless):
        shutil.copytree(folder / "source", path)
    change_settings("llm", num_attention_heads=0)(senseless)
    change_tensors("llm", lambda state: state.pop("model.norm.weight"))(missing)
    change_tensors("mm_projector", lambda state: state.update(extra=torch.zeros(1)))(unknown)
    hf_models.save_vila(other, projector="linear")
    cases = {
        (folder / "source", missing): "missing .'model.norm.weight'",
        (folder / "source", unknown): "unexpected .'extra'",
        (folder / "source", other): "not the same model: tokens_per_frame 4 and 16",
        (folder / "source", folder / "nothing"): "holds neither config.yaml .* nor config.json",
        (folder / "source" / "llm", folder / "source" / "vision_tower"): "no part in common",
        (folder / "source" / "mm_projector", folder / "source"): "model_type='v2l_projector'",
        (folder / "source", senseless): "cannot be loaded with transformers",
    }
    for (pair, message), text in zip(cases.items(), run_ranks(verify_all, 1, list(cases))[0], strict=True):
        assert isinstance(text, str) and re.search(message, text), (pair, text)


def test_without_transformers_verify_says_what_to_install(folder, monkeypatch):
    from megatron_longvila.evaluation.verify import verify

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-longvila\[hf\]'"):
        verify(folder / "source", folder / "checkpoint")
