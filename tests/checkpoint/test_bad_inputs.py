"""Each input that cannot be imported gets one clear error, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import read_json, save_llava, save_llm, save_siglip, save_vila, write_json
from imported import import_folder
from safetensors.torch import load_file, save_file

from megatron_longvila.checkpoint.hf import check_tied
from megatron_longvila.checkpoint.importing import ImportOptions, check_space, plan, run, written_aside
from ranks import run_ranks

TINY = "llm/model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_vila(root / "vila")
    save_llava(root / "llava")
    save_llm(root / "sharded", shard_size="40KB")
    save_siglip(root / "siglip")
    return root


@pytest.fixture
def copy(models, tmp_path) -> Callable[[str], Path]:
    """A copy of one of the models, to damage."""

    def make(name: str) -> Path:
        shutil.copytree(models / name, tmp_path / name)
        return tmp_path / name

    return make


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = read_json(path) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def into_processor(folder: Path) -> None:
    """Image settings where transformers 5 writes them."""
    path = folder / "preprocessor_config.json"
    write_json(folder / "processor_config.json", {"processor_class": "LlavaProcessor", "image_processor": read_json(path)})
    path.unlink()


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def refused(folder: Path, message: str, **options) -> None:
    output = folder.parent / "output"
    with pytest.raises(ValueError, match=message):
        plan(ImportOptions(folder, output, **options))
    assert not output.exists() and not list(folder.parent.glob(".output*"))


TENSORS = {
    "wrong shape": (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), r"llm.model.norm.weight has shape \(65,\).*\(64,\)"),
    "missing tensor": (lambda t: t.pop("model.norm.weight"), r"1 missing tensors: \['llm.model.norm.weight'\]; 0 unexpected"),
    "leftover": (lambda t: t.update({"model.layers.0.extra": torch.zeros(1)}), r"0 missing.*1 unexpected: \['llm.model.layers.0.extra'\]"),
    "short table": (lambda t: t.update({"lm_head.weight": torch.zeros(419, 64)}), r"lm_head.weight has shape \(419, 64\).*\(420, 64\)"),
    "mixed dtypes": (lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.zeros(32).half()}), "q_proj.bias.*in one dtype"),
    "quantised": (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "norm.weight has dtype torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(copy, case):
    change, message = TENSORS[case]
    folder = copy("vila")
    edit_tensors(folder / TINY, change)
    refused(folder, message)


CONFIGS = {
    "unknown architecture": ("vila", "llm/config.json", dict(model_type="mistral"), r"model_type='mistral'; the decoder must be one of"),
    "unknown tower": ("vila", "vision_tower/config.json", dict(model_type="clip_vision_model"), "must be SigLIP"),
    "unknown projector": ("vila", "mm_projector/config.json", dict(mm_projector_type="resampler"), "projector type 'resampler' is unknown"),
    "unknown root": ("vila", "config.json", dict(llm_cfg=None, model_type="phi"), "model_type='phi'.*known are VILA's layout"),
    "sliding window": ("vila", "llm/config.json", dict(use_sliding_window=True), "use_sliding_window': True"),
    "attention bias": ("llava", "config.json", dict(text_config={"model_type": "llama", "attention_bias": True}), "attention_bias': True"),
    "other activation": ("vila", "vision_tower/config.json", dict(hidden_act="quick_gelu"), "'hidden_act': 'quick_gelu'"),
    "several scales": ("vila", "config.json", dict(s2=True), "features of several scales"),
    "tiles": ("vila", "config.json", dict(image_aspect_ratio="anyres"), "image_aspect_ratio='anyres'; known are"),
    "first patch": ("vila", "config.json", dict(mm_vision_select_feature="patch"), "only cls_patch keeps all"),
    "other pixels": ("vila", "vision_tower/preprocessor_config.json", dict(image_mean=[0.48, 0.45, 0.40]), "image_mean.*with mean"),
    "rope type": ("vila", "llm/config.json", dict(rope_scaling={"rope_type": "longrope"}), "its type must be one of default, linear"),
    "rope setting": ("vila", "llm/config.json", dict(rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 1.0}), "'mscale'.*not supp"),
    "two ropes": ("vila", "llm/config.json", dict(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "two values for rope"),
    "no heads": ("vila", "llm/config.json", dict(num_attention_heads=0), "'num_attention_heads': 0.; sizes must be positive"),
    "no number": ("vila", "vision_tower/config.json", dict(patch_size="14"), "'patch_size': '14'.; sizes must be positive"),
    "uneven heads": ("vila", "llm/config.json", dict(num_key_value_heads=3), "4 heads, which 3 heads for keys and values do not divide"),
    "rope text": ("vila", "llm/config.json", dict(rope_scaling="linear"), "rope_scaling='linear'.*must be an object or null"),
    "rope factor": ("vila", "llm/config.json", dict(rope_scaling={"type": "linear"}), "it needs a factor"),
    "rope base": ("vila", "llm/config.json", dict(rope_theta=-1), "rope_theta=-1.0; it must be a positive number"),
    "feature layer": ("vila", "config.json", dict(mm_vision_select_layer=-4), "from layer -4; it must be a number from -3 to -1"),
    "raw pixels": ("vila", "vision_tower/preprocessor_config.json", dict(do_rescale=False), "'do_rescale': False.; our frames"),
    "llava text": ("llava", "config.json", dict(text_config=["qwen2"]), "a text_config or a vision_config that is no object"),
    "gone path": ("vila", "config.json", dict(mm_projector_cfg=7), "mm_projector_cfg=7; it must be an object or a path"),
    "llava strategy": ("llava", "config.json", dict(vision_feature_select_strategy="default"), "drops the first patch"),
    "llava layers": ("llava", "config.json", dict(vision_feature_layer=[-2, -1]), r"vision_feature_layer=\[-2, -1\]; it must be one"),
    "llava activation": ("llava", "config.json", dict(projector_hidden_act="relu"), "projector_hidden_act='relu'"),
    "llava bias": ("llava", "config.json", dict(multimodal_projector_bias=False), "our projectors have biases"),
    "llava two linears": ("llava", "config.json", dict(projector_hidden_act="linear"), "the second is not the identity"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_do_not_fit(copy, case):
    model, file, changes, message = CONFIGS[case]
    folder = copy(model)
    edit(folder / file, **changes)
    refused(folder, message)


def test_other_pixels_inside_a_processor(copy):
    folder = copy("llava")
    edit(folder / "preprocessor_config.json", image_mean=[0.48, 0.45, 0.40])
    into_processor(folder)
    refused(folder, r"processor_config.json has .'image_mean': \[0.48, 0.45, 0.4\].*with mean")


@pytest.mark.parametrize(
    ("size", "message"), [(4, "is cut short or no safetensors"), (3000, "cut short"), (100_000, "cut short or damaged")]
)
def test_truncated_file(copy, size, message):
    folder = copy("vila")
    truncate(folder / TINY, size)
    refused(folder, f"{TINY} .*{message}")


@pytest.mark.parametrize("offsets", [[0], 4, None, ["a", "b"]])
def test_header_without_sense(copy, offsets):
    folder = copy("vila")
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (folder / TINY).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, f"{TINY} has a header that cannot be read")


def test_file_that_is_no_safetensors(copy):
    folder = copy("vila")
    (folder / TINY).write_text("<html>404</html>" * 10)
    refused(folder, "cut short or no safetensors file")


def parts(copy, name: str = "sharded") -> tuple[Path, dict]:
    return copy(name), {"vision_tower": copy("siglip")}


def test_missing_shard(copy):
    folder, options = parts(copy)
    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    refused(folder, f"lacks .'{missing.name}'., which model.safetensors.index.json names", **options)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, f"lacks .'{missing.name}'., part of", **options)


def test_index_and_files_that_differ(copy):
    folder, options = parts(copy)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": index["weight_map"] | {"ghost": "a.safetensors"}})
    )
    refused(folder, r"lacks \['a.safetensors'\]", **options)
    ghost = {"ghost": next(iter(index["weight_map"].values()))}
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | ghost}))
    refused(folder, r"1 tensors are not where it says: \['ghost'\]", **options)
    files = list(index["weight_map"].values())
    name = next(name for name, file in index["weight_map"].items() if files.count(file) > 1)
    path.write_text(json.dumps(index | {"weight_map": {n: f for n, f in index["weight_map"].items() if n != name}}))
    refused(folder, f"1 are not in it: ..{name}", **options)
    path.write_text(json.dumps({"weight_map": {"a": 7}}))
    refused(folder, r"lacks \['7'\]", **options)
    path.write_text("{}")
    refused(folder, "has no weight_map", **options)


def test_shards_without_an_index_are_enough(copy, models):
    folder, options = parts(copy)
    (folder / "model.safetensors.index.json").unlink()
    job = plan(ImportOptions(folder, folder.parent / "output", **options))
    assert sum(name.startswith("language_model.") for name in job.infos) == 3 * 7 + 3


def test_a_tensor_in_two_files(copy):
    folder, options = parts(copy)
    (folder / "model.safetensors.index.json").unlink()
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    edit_tensors(second, lambda tensors: tensors.update(load_file(first)))
    refused(folder, "is in .* and in .*; remove one", **options)


def pickled(folder: Path, content=None) -> Path:
    """The same weights as a pickle."""
    tensors = load_file(folder / TINY)
    (folder / TINY).unlink()
    torch.save(tensors if content is None else content, folder / "llm" / "pytorch_model.bin")
    return folder / "llm" / "pytorch_model.bin"


def test_pickles_only_when_allowed(copy, models):
    folder = copy("vila")
    pickled(folder)
    refused(folder, "pytorch_model.bin, a pickle: .*give --allow-pickle")
    job, safe = (plan(ImportOptions(path, folder.parent / "output", allow_pickle=True)) for path in (folder, models / "vila"))
    name = "llm.model.layers.1.mlp.up_proj.weight"
    assert job.infos == safe.infos and torch.equal(job.source.read(name), safe.source.read(name))


class Evil:
    """What a pickle can do when it is loaded without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_cannot_run_code(copy):
    folder = copy("vila")
    path = pickled(folder, {"model.norm.weight": Evil(folder / "ran")})
    refused(folder, "pytorch_model.bin cannot be loaded as weights alone", allow_pickle=True)
    assert not (folder / "ran").exists()
    truncate(path, 200)
    refused(folder, "pytorch_model.bin cannot be loaded", allow_pickle=True)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    refused(folder, "something else than a mapping of names to tensors", allow_pickle=True)


def test_folders_that_are_no_model(copy, models, tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    folder = copy("vila")
    shutil.rmtree(folder / "mm_projector")
    refused(folder, "has no mm_projector/, which VILA's layout needs")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is no JSON file")
    refused(models / "sharded", "a language model alone; give the SigLIP")
    refused(models / "llava", "is a whole model", vision_tower=models / "siglip")
    (models / "siglip").joinpath("again").mkdir(exist_ok=True)
    refused(models / "siglip", "siglip_vision_model")


def test_a_stale_path_is_noted_and_a_hub_name_refused(copy):
    folder = copy("vila")
    edit(folder / "config.json", llm_cfg="/gone/llm")
    assert "'/gone/llm' does not exist" in plan(ImportOptions(folder, folder.parent / "output")).source.notes[0]
    (folder / "llm").rename(folder.parent / "elsewhere")
    refused(folder, "llm_cfg='/gone/llm', and neither that folder nor")
    edit(folder / "config.json", llm_cfg=str(folder.parent / "elsewhere"))
    assert not plan(ImportOptions(folder, folder.parent / "output")).source.notes


def test_nan_weights_are_imported_and_named(copy):
    folder = copy("vila")
    edit_tensors(
        folder / TINY, lambda t: (t["model.layers.2.mlp.up_proj.weight"][3].fill_(float("nan")), t["lm_head.weight"][0].fill_(-torch.inf))
    )
    (notes,) = run_ranks(_notes_of_import, 1, folder, folder.parent / "output")
    bad = ["llm.model.layers.2.mlp.up_proj.weight", "llm.lm_head.weight"]
    assert notes == [f"2 tensors have NaN or infinite elements, and were imported as they are: {bad}"]


def _notes_of_import(rank: int, folder: Path, output: Path) -> list[str]:
    return run(plan(ImportOptions(folder, output)))


def test_a_model_without_a_tokenizer_is_noted(copy):
    folder = copy("vila")
    for path in folder.glob("llm/tokenizer*"):
        path.unlink()
    (folder / "llm" / "chat_template.jinja").unlink(missing_ok=True)
    (notes,) = run_ranks(_notes_of_import, 1, folder, folder.parent / "output")
    assert "no chat template of chatml or llama3; config.yaml has data.template=plain" in notes[0]
    assert "tokenizer cannot be read" in notes[1] and len(notes) == 2


def test_a_repeated_head_is_compared_bit_by_bit():
    table = torch.tensor([[float("nan"), 0.0]])
    check_tied(table.clone(), table)
    for other in (table.half(), table[:, :1], torch.tensor([[float("nan"), -0.0]])):
        with pytest.raises(ValueError, match="they are not tied"):
            check_tied(other, table)


def test_a_head_that_is_not_tied_after_all(copy):
    folder = copy("vila")
    edit(folder / "llm" / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from .*embed_tokens.weight"):
        run(plan(ImportOptions(folder, folder.parent / "output")))
    assert not (folder.parent / "output").exists()


def test_finished_outputs_and_strange_folders_stay(copy, tmp_path):
    folder, output = copy("vila"), tmp_path / "output"
    run_ranks(lambda rank: import_folder(folder, output), 1)
    with pytest.raises(ValueError, match="is finished already; give --overwrite"):
        plan(ImportOptions(folder, output))
    before = (output / "complete.json").stat().st_ino
    run_ranks(lambda rank: import_folder(folder, output, overwrite=True), 1)
    assert (output / "complete.json").stat().st_ino != before and not list(tmp_path.glob(".output*"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no conversion's output"):
        plan(ImportOptions(folder, tmp_path / "home", overwrite=True))
    with pytest.raises(ValueError, match="is or contains the input"):
        plan(ImportOptions(folder, tmp_path, overwrite=True))


def test_nothing_half_written_is_left(tmp_path):
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        with written_aside(output) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_old_output_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    output, rename = tmp_path / "output", os.rename
    output.mkdir()
    (output / "old").write_text("x")

    def fail_for_the_new_one(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="no"), written_aside(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["output"] and (output / "old").exists()


def test_full_disk_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"has [\d.]+ GiB free, out needs 1034240.00"):
        check_space(tmp_path / "out", 1000 << 40)


def test_images_in_tiles_are_noted(copy):
    folder = copy("vila")
    edit(folder / "config.json", image_aspect_ratio="dynamic")
    source = plan(ImportOptions(folder, folder.parent / "output")).source
    assert "cuts images (not video frames) into tiles" in source.notes[0] and source.model.vision.preprocess == "resize"


def test_encoders_that_change_visual_tokens_are_noted(copy):
    """NVILA's means over eight frames would be lost without a word."""
    folder = copy("vila")
    pooled = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]], "start_tokens": None, "end_tokens": "\n"}
    basic = {"_target_": "llava.model.encoders.BasicImageEncoder", "start_tokens": None, "end_tokens": "\n"}
    edit(folder / "config.json", video_encoder=json.dumps(pooled), image_encoder=basic)
    (note,) = plan(ImportOptions(folder, folder.parent / "output")).source.notes
    assert "video_encoder=" in note and "TSPVideoEncoder" in note and "as BasicVideoEncoder has it" in note
    edit(folder / "config.json", video_encoder=None, image_encoder=json.dumps(basic | {"end_tokens": None}))
    (note,) = plan(ImportOptions(folder, folder.parent / "output")).source.notes
    assert "image_encoder=" in note
    edit(folder / "config.json", image_encoder="BasicImageEncoder")
    refused(folder, "image_encoder='BasicImageEncoder', which is no JSON")


def test_another_way_to_resize_is_noted(copy):
    """Bilinear: the pixels of noise shrunk to a third, from -1 to 1, differ by up to 0.1 from bicubic ones."""
    folder = copy("llava")
    path = folder / "preprocessor_config.json"
    assert plan(ImportOptions(folder, folder.parent / "output")).source.notes == ()
    edit(path, resample=2)
    (note,) = plan(ImportOptions(folder, folder.parent / "output")).source.notes
    assert "has resample=2; here images and frames are resized with 3 (PIL's bicubic)" in note
