"""What goes in comes out: every tensor byte for byte, every key of every configuration, every file, in every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import LINEAR_SCALING, ODD_GRID, VOCAB_SIZE, image_token, read_json, save_llava, save_llm, save_siglip, save_vila, write_json
from imported import export_folder, import_folder
from safetensors.torch import load_file, save_file

from ranks import run_ranks

bf16, fp16 = torch.bfloat16, torch.float16


def tied_with_head(root: Path) -> None:
    """A tied decoder that stores its output layer all the same."""
    save_vila(root, tied=True)
    path = root / "llm" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})


def spare_rows(root: Path) -> None:
    """Vocabulary rows beyond vocab_size, derived buffers, and keys that nobody knows, in every configuration."""
    save_vila(root, "llama")
    path = root / "llm" / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(3, 64)])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    save_file(tensors, path, {"format": "pt"})
    for part in ("", "llm", "vision_tower", "mm_projector"):
        write_json(root / part / "config.json", read_json(root / part / "config.json") | {"unknown_key": {"nested": [1, None, "ä"]}})


def parts(root: Path) -> None:
    save_llm(root / "llm", shard_size="40KB", dtype=bf16)
    save_siglip(root / "vision_tower", ODD_GRID, dtype=fp16)


def linear_llava(root: Path) -> None:
    """No activation between its two linears, and the second is the identity."""
    save_llava(root)
    tensors = load_file(root / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"] = torch.eye(64)
    tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(64)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    write_json(root / "config.json", read_json(root / "config.json") | {"projector_hidden_act": "linear"})


def root_tied_llava(root: Path) -> None:
    """Only the whole model's configuration says that the embedding is tied, as transformers writes what LlavaConfig was told alone."""
    save_llava(root, tied=True)
    raw = read_json(root / "config.json")
    raw["text_config"]["tie_word_embeddings"] = False
    write_json(root / "config.json", raw)


def nested_llava(root: Path) -> None:
    """The names that LLaVA's modules have in memory, which some versions of transformers wrote."""
    save_llava(root, "llama", dtype=fp16)
    names = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
    tensors = {}
    for name, tensor in load_file(root / "model.safetensors").items():
        old = next((old for old in names if name.startswith(old)), None)
        tensors[f"model.{name}" if old is None else names[old] + name.removeprefix(old)] = tensor
    save_file(tensors, root / "model.safetensors", {"format": "pt"})


def whole_siglip(root: Path) -> None:
    """A tower that comes with its text half, as the published SigLIP does."""
    save_llm(root / "llm", "llama", rope_parameters=LINEAR_SCALING)
    save_siglip(root / "vision_tower", inner_prefix=True)
    path = root / "vision_tower" / "model.safetensors"
    more = {"logit_scale": torch.randn(1), "logit_bias": torch.randn(1), "text_model.embeddings.token_embedding.weight": torch.randn(5, 4)}
    save_file(load_file(path) | more, path, {"format": "pt"})
    raw = read_json(root / "vision_tower" / "config.json")
    write_json(root / "vision_tower" / "config.json", {"model_type": "siglip", "text_config": {"hidden_size": 4}, "vision_config": raw})


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "vila_tied_bf16": ("vila", lambda root: save_vila(root, tied=True, dtype=bf16)),
    "vila_untied_fp16_odd": ("vila", lambda root: save_vila(root, dtype=fp16, image_size=ODD_GRID, projector="mlp_downsample_2x2_fix")),
    "vila_llama_fp32": ("vila", lambda root: save_vila(root, "llama", projector="mlp_downsample_3x3_fix", pooling_head=False)),
    "vila_linear_scaling": ("vila", lambda root: save_vila(root, rope_parameters=LINEAR_SCALING, projector="linear")),
    "vila_tied_with_head": ("vila", tied_with_head),
    "vila_spare_rows": ("vila", spare_rows),
    "llava_tied_bf16": ("llava", lambda root: save_llava(root, tied=True, dtype=bf16)),
    "llava_llama_odd": ("llava", lambda root: save_llava(root, "llama", image_size=ODD_GRID)),
    "llava_linear": ("llava", linear_llava),
    "llava_root_tied": ("llava", root_tied_llava),
    "llava_nested_fp16": ("llava", nested_llava),
    "parts_mixed": ("vila", parts),
    "parts_whole_siglip": ("vila", whole_siglip),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """case/source, case/checkpoint and case/out of all cases, and a case in the other formats."""
    root = tmp_path_factory.mktemp("converted")
    for name, (_, make) in CASES.items():
        make(root / name / "source")
    run_ranks(_convert, 1, root)
    return root


def _convert(rank: int, root: Path) -> None:
    for name, (form, _) in CASES.items():
        import_folder(root / name / "source", root / name / "checkpoint")
        export_folder(root / name / "checkpoint", root / name / "out", form)
    export_folder(root / "vila_tied_bf16" / "checkpoint", root / "sharded", "vila", shard_bytes=20_000)
    for form in ("vila", "llm"):
        export_folder(root / "llava_llama_odd" / "checkpoint", root / f"llava_as_{form}", form)
    export_folder(root / "vila_linear_scaling" / "checkpoint", root / "vila_as_llava", "llava")
    import_folder(root / "vila_as_llava", root / "vila_as_llava_checkpoint")
    export_folder(root / "vila_spare_rows" / "checkpoint", root / "flat", "vila", vision_names="flat")
    _train_from_scratch(root)


def _train_from_scratch(root: Path) -> None:
    """A checkpoint that was never imported, out and in again."""
    from tiny_model import build, make_config

    from megatron_longvila.checkpoint.sharded import save_weights

    config = make_config(root / "vila_tied_bf16" / "source" / "llm")
    model, groups = build(config, 1)
    save_weights(root / "scratch", model, config, groups)
    export_folder(root / "scratch", root / "scratch_out", "vila")
    import_folder(root / "scratch_out", root / "scratch_again")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor below a folder under its folder's and its own name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            key = f"{path.parent.relative_to(folder)}/{name}"
            assert key not in found
            found[key] = tensor
    return found


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def settings_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "safetensors" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_every_file_comes_back(converted, case):
    source, out = converted / case / "source", converted / case / "out"
    before, after = tensors_of(source), tensors_of(out)
    if case.startswith("parts"):  # the export is a whole model: what it has more is the new projector and what describes it
        new = {name for name in after if name.startswith("mm_projector/")}
        assert len(new) == 6 and all(torch.isfinite(after[name]).all() for name in new)
        after = {name: tensor for name, tensor in after.items() if name not in new}
    assert_same_tensors(before, after)
    files, exported = settings_of(source), settings_of(out)
    assert files.items() <= exported.items()
    assert set(exported) - set(files) <= ({"config.json", "mm_projector/config.json"} if case.startswith("parts") else set())


@pytest.mark.parametrize("case", ["vila_tied_bf16", "vila_spare_rows", "parts_mixed", "llava_nested_fp16"])
def test_a_checkpoint_holds_no_tensor_twice(converted, case):
    """Passengers and model together are the source, but for rows that pad the vocabulary and what a tied head repeats."""
    from megatron_longvila.checkpoint.streaming import DistributedTensors

    folder = converted / case / "checkpoint"
    model = DistributedTensors(folder, ["vision_tower.", "language_model."]).infos
    passengers = load_file(folder / "passengers.safetensors")
    sources = tensors_of(converted / case / "source")
    width = model["language_model.embedding.word_embeddings.weight"].shape[1]
    padding = sum(width * (512 - VOCAB_SIZE) for name in model if name.endswith(("word_embeddings.weight", "output_layer.weight")))
    projector = sum(tensor.numel() for name, tensor in sources.items() if "projector" in name)
    elements = sum(torch.Size(info.shape).numel() for info in model.values()) + sum(t.numel() for t in passengers.values())
    assert elements - padding + projector == sum(tensor.numel() for tensor in sources.values())


def test_shards_have_an_index_and_the_size_asked_for(converted):
    folder = converted / "sharded" / "llm"
    index = read_json(folder / "model.safetensors.index.json")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {path.name for path in files}
    for path in files:
        found = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(found)
        assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    assert_same_tensors(tensors_of(converted / "sharded"), tensors_of(converted / "vila_tied_bf16" / "source"))


def test_llava_becomes_vila_and_a_bare_decoder(converted):
    import transformers

    source = tensors_of(converted / "llava_llama_odd" / "source")
    vila, llm = tensors_of(converted / "llava_as_vila"), tensors_of(converted / "llava_as_llm")
    decoder = {name.removeprefix("./language_model."): tensor for name, tensor in source.items() if "language_model" in name}
    assert_same_tensors({name.removeprefix("llm/"): t for name, t in vila.items() if name.startswith("llm/")}, decoder)
    assert_same_tensors({name.removeprefix("./"): tensor for name, tensor in llm.items()}, decoder)
    # Older readers of VILA's layout know the inner spelling alone.
    assert all(name.startswith("vision_tower/vision_model.") for name in vila if name.startswith("vision_tower/"))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(converted / "llava_as_llm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.config.rope_parameters["rope_type"] == "llama3"
    # Nor do they know rope_parameters, without which they would take a base of 10,000 and no scaling.
    for raw in (read_json(converted / "llava_as_llm" / "config.json"), read_json(converted / "llava_as_vila" / "llm" / "config.json")):
        rope = raw["rope_parameters"]
        assert raw["rope_theta"] == rope["rope_theta"] and {"rope_theta": raw["rope_theta"]} | raw["rope_scaling"] == rope
    assert (converted / "llava_as_llm" / "tokenizer.json").exists() and not (
        converted / "llava_as_llm" / "preprocessor_config.json"
    ).exists()
    assert (converted / "llava_as_vila" / "vision_tower" / "preprocessor_config.json").exists()


def test_vila_without_a_merge_becomes_llava_and_comes_back(converted):
    import transformers

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.streaming import DistributedTensors

    folders = converted / "vila_linear_scaling" / "checkpoint", converted / "vila_as_llava_checkpoint"
    before, after = (DistributedTensors(folder, ["vision_tower.", "projector.", "language_model."]) for folder in folders)
    assert_same_tensors({name: before.read(name) for name in before.infos}, {name: after.read(name) for name in after.infos})
    before, after = (config_io.load(folder / "config.yaml").model for folder in folders)
    assert before == after
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(converted / "vila_as_llava", output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and model.config.image_token_id == image_token(folders[0] / "source/llm")
    )


def test_image_settings_inside_a_processor_come_along(converted, tmp_path):
    """transformers 5 writes no preprocessor_config.json for LLaVA; VILA's code reads one."""
    import shutil

    from megatron_longvila.checkpoint import export_settings
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan

    job = plan(ExportOptions(converted / "llava_llama_odd" / "checkpoint", tmp_path / "out", "vila"))
    shutil.copytree(job.options.input / "source", tmp_path / "in" / "source")
    path = tmp_path / "in" / "source" / "preprocessor_config.json"
    settings = read_json(path)
    path.unlink()
    write_json(path.with_name("processor_config.json"), {"processor_class": "LlavaProcessor", "image_processor": settings})
    (tmp_path / "out").mkdir()
    export_settings.write(replace(job, options=replace(job.options, input=tmp_path / "in")), tmp_path / "out")
    assert read_json(tmp_path / "out" / "vision_tower" / "preprocessor_config.json") == settings


def test_flat_vision_names_on_request(converted):
    names = {name.removeprefix("vision_tower/") for name in tensors_of(converted / "flat") if name.startswith("vision_tower/")}
    assert names and not any(name.startswith("vision_model.") for name in names)


def test_tokens_say_which_tokenizer_came_along(converted):
    from megatron_longvila import config_io
    from megatron_longvila.data.text import load_tokenizer

    for case, place in (("vila_tied_bf16", "source/llm"), ("llava_tied_bf16", "source")):
        folder = converted / case / "checkpoint"
        data = config_io.load(folder / "config.yaml").data
        assert data.template == "chatml" and Path(data.tokenizer) == folder / place
        tokens = read_json(folder / "tokens.json")
        assert tokens["tokenizer_sha256"] == load_tokenizer(data.tokenizer).hash and tokens["template"] == "chatml"


def test_only_keys_that_training_changed_differ(converted, tmp_path):
    """A longer context, another rotary base and another dtype: those keys change, in the spelling that was there, and no other."""
    from megatron_longvila.checkpoint import export_settings
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan

    for case, root_key in (("vila_tied_bf16", "llm_cfg"), ("llava_tied_bf16", "text_config")):
        form = case.split("_")[0]
        job = plan(ExportOptions(converted / case / "checkpoint", tmp_path / case, form))
        llm = replace(job.config.model.llm, rotary_base=5e6, max_position_embeddings=1024)
        model = replace(job.config.model, llm=llm, vision=replace(job.config.model.vision, preprocess="pad"))
        job = replace(job, config=replace(job.config, model=model), imported=job.imported | {"dtypes": {}})
        (tmp_path / case).mkdir()
        notes = export_settings.write(job, tmp_path / case)
        before, after = (read_json(folder / "config.json") for folder in (converted / case / "source", tmp_path / case))
        other = {key for key in after if before.get(key) != after[key]} - {root_key, "vision_tower_cfg", "vision_config"}
        assert other == ({"image_aspect_ratio"} if form == "vila" else set())  # LLaVA cannot say it, and the user is told
        assert any("model.vision.preprocess=pad" in note for note in notes) == (form == "llava")
        changed = {key for key in after[root_key] if before[root_key].get(key) != after[root_key][key]}
        rope = {"rope_theta"} if form == "vila" else {"rope_parameters"}
        assert changed == rope | {"max_position_embeddings"}
        if form == "vila":
            assert read_json(tmp_path / case / "llm" / "config.json") | {"_name_or_path": "/somewhere/else/llm"} == after["llm_cfg"]


def test_dropped_passengers_are_named(converted, tmp_path):
    from megatron_longvila.checkpoint import importing
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan, run

    options = importing.ImportOptions(converted / "vila_spare_rows" / "source", tmp_path / "in", drop_passengers=True)
    (notes,) = run_ranks(lambda rank: importing.run(importing.plan(options)), 1)
    assert "left out 32 tensors" in notes[-1] and not (tmp_path / "in" / "passengers.safetensors").exists()
    notes = run(plan(ExportOptions(converted / "vila_spare_rows" / "checkpoint", tmp_path / "out", "vila", drop_passengers=True)))
    assert "encoder.layers.2.mlp.fc1.bias" in notes[-1] and "initialises the tower's missing layers at random" in notes[-1]
    before, after = tensors_of(converted / "vila_spare_rows" / "source"), tensors_of(tmp_path / "out")
    assert after["llm/lm_head.weight"].shape[0] == VOCAB_SIZE and len(before) - len(after) == 16 + 2 + 11 + 1


def test_a_model_that_was_never_imported(converted):
    import transformers

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.streaming import DistributedTensors

    out = converted / "scratch_out"
    before, after = (DistributedTensors(converted / name, [""]) for name in ("scratch", "scratch_again"))
    assert_same_tensors({name: before.read(name) for name in before.infos}, {name: after.read(name) for name in after.infos})
    models = [config_io.load(converted / name / "config.yaml").model for name in ("scratch", "scratch_again")]
    assert models[0].llm == models[1].llm and models[0].vision == models[1].vision and models[0].projector == models[1].projector
    decoder, report = transformers.AutoModelForCausalLM.from_pretrained(out / "llm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and decoder.dtype == torch.float32
    assert (out / "llm" / "tokenizer.json").exists() and read_json(out / "vision_tower" / "preprocessor_config.json")["size"]["height"] == 4
    # The tower's last layer was never built: transformers makes one up, and says so.
    _, report = transformers.SiglipVisionModel.from_pretrained(out / "vision_tower", output_loading_info=True)
    assert all("layers.2." in name or "post_layernorm" in name for name in report["missing_keys"]) and not report["unexpected_keys"]


def test_a_checkpoint_that_is_not_its_configuration_is_not_exported(converted, tmp_path):
    import shutil

    from megatron_longvila import config_io
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan
    from megatron_longvila.checkpoint.sharded import mark_complete

    folder = tmp_path / "checkpoint"
    shutil.copytree(converted / "vila_llama_fp32" / "checkpoint", folder)
    config = config_io.load(folder / "config.yaml")
    llm = replace(config.model.llm, num_layers=4, tie_embeddings=True)
    config_io.save(replace(config, model=replace(config.model, llm=llm)), folder / "config.yaml")
    with pytest.raises(ValueError, match="config.yaml has .* bytes instead of"):
        plan(ExportOptions(folder, tmp_path / "out", "vila"))
    (folder / "complete.json").unlink()
    mark_complete(folder)
    with pytest.raises(
        ValueError, match=r"6 tensors missing: .*layers.3.*; 1 unknown: .'language_model.output_layer.weight'.; 0 of another"
    ):
        plan(ExportOptions(folder, tmp_path / "out", "vila"))


def test_an_image_needs_a_row_of_the_embedding(converted, tmp_path):
    with pytest.raises(ValueError, match="an id below 420 .*; found 10000: say which with --image_token_id"):
        export_folder(converted / "vila_linear_scaling" / "checkpoint", tmp_path / "out", "llava", image_token_id=10_000)
    with pytest.raises(ValueError, match="an id below 420 .*; found 420"):
        export_folder(converted / "llava_llama_odd" / "checkpoint", tmp_path / "out", "llava", image_token_id=420)
    assert not list(tmp_path.iterdir())


def test_the_processor_says_the_id_that_the_model_knows(converted, tmp_path):
    from megatron_longvila.checkpoint.exporting import ExportOptions, plan, run

    checkpoint = converted / "vila_linear_scaling" / "checkpoint"
    for token, text in ((381, "<|im_end|>"), (5, "<image>")):
        notes = run(plan(ExportOptions(checkpoint, tmp_path / str(token), "llava", image_token_id=token)))
        assert read_json(tmp_path / str(token) / "processor_config.json")["image_token"] == text
        assert read_json(tmp_path / str(token) / "config.json")["image_token_index"] == token
        assert any("no special token with an image's id 5" in note for note in notes) == (token == 5)
