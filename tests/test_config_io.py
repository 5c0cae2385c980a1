"""Command line and YAML to Config: precedence, refusals, round trip, presets."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from small_disk import small_disk

from megatron_longvila.config import Config, RopeScaling
from megatron_longvila.config_check import check
from megatron_longvila.config_io import from_dict, load, parse, save, to_dict

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "examples" / "models").glob("*.yaml"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optimizer: {lr: 1e-4, min_lr: 1e-6}\ndata: {train: [a, b]}\n")
    second.write_text("optimizer: {lr: 3e-4}\nmodel: {llm: {rope_scaling: {type: linear, factor: 2}}}\n")
    return str(first), str(second)


def test_later_files_win_and_flags_win_over_all(files):
    first, second = files
    config = parse(["--config", first, "--config", second])
    assert (config.optimizer.lr, config.optimizer.min_lr, config.data.train) == (3e-4, 1e-6, ["a", "b"])
    assert config.model.llm.rope_scaling == RopeScaling(type="linear", factor=2.0)
    assert parse(["--config", second, f"--config={first}"]).optimizer.lr == 1e-4
    # A flag wins also when it stands before the file.
    assert parse(["--optimizer.lr", "5e-4", "--config", first]).optimizer.lr == 5e-4
    assert parse(["--config", first, "--optimizer.lr=5e-4", "--config", second]).optimizer.lr == 5e-4


def test_values_are_typed():
    config = parse(["--parallel.ulysses_size", "4", "--parallel.pipeline_layers", "[1,3]", "--training.trainable", "[projector]"])
    assert config.parallel.ulysses_size == 4 and config.parallel.ring_size == "auto"
    assert config.parallel.pipeline_layers == [1, 3] and config.training.trainable == ["projector"]
    assert parse([]) == Config()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--parallel.ulyses_size", "4"], ["unrecognized", "nearest fields", "parallel.ulysses_size"]),
        (["--parallel.tp", "4"], ["unrecognized", "parallel.tp_size"]),
        (["--output_di", "x"], ["unrecognized", "output_dir"]),
        (["--training.precision", "fp8"], ["training.precision", "fp8", "bf16"]),
        (["--parallel.tp_size", "two"], ["parallel.tp_size", "two", "int"]),
        (["--parallel.ulysses_size", "most"], ["parallel.ulysses_size", "most"]),
        (["--data.train", "folder"], ["data.train", "folder", "'[a, b]'"]),
        (["--training.trainable", "[head]"], ["training.trainable", "head"]),
        (["--model.llm.rope_scaling", "{type: linear}"], ["rope_scaling", "factor"]),
        (["--config", "absent.yaml"], ["absent.yaml", "does not exist"]),
        (["--config"], ["--config", "expected one argument"]),
        (["stray"], ["stray"]),
    ],
)
def test_mistakes_are_refused_by_name(argv, words):
    with pytest.raises(ValueError) as error:
        parse(argv)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {llm: {hiden_size: 3}}", ["model", "llm.hiden_size", "nearest fields: model.llm.hidden_size"]),
        ("optimzer: {lr: 1}", ["optimzer.lr", "nearest fields: optimizer.lr"]),
        ("optimizer: {lr: fast}", ["optimizer.lr", "fast"]),
        ("optimizer: {lr: 1.0}\ntraining:\n  # steps: 3\n", ["bad.yaml, training must be a mapping of fields and holds nothing"]),
        ("model: {llm: 3}", ["bad.yaml, model, llm must be a mapping of fields and holds '3'"]),
        ("training: [steps]", ["bad.yaml, training must be a mapping of fields and holds a list"]),
        ("- 1", ["bad.yaml must be a mapping of fields and holds a list"]),
        ("# nothing", ["bad.yaml is empty"]),
        ("training: {steps: 3", ["bad.yaml cannot be read", "line 1"]),
        ("training:\n  steps: 3\ndata: {}\ntraining: {seed: 1}", ["bad.yaml: training stands twice, in lines 1 and 4"]),
        ("training: {steps: 3, steps: 4}", ["bad.yaml: steps stands twice"]),
        ("training:\n  precision:\n", ["bad.yaml, training, precision has no value"]),
        ("data: {train: null}", ["bad.yaml, data, train has no value"]),
        ("output_dir: ~", ["bad.yaml, output_dir has no value"]),
        ("? [a]\n: b", ["unhashable key"]),
        ("model: &a {llm: *a}", ["bad.yaml: what begins in line 1 holds itself"]),
        ("model: none.yaml", ["bad.yaml, model must be a mapping of fields and holds 'none.yaml'"]),
    ],
)
def test_unknown_keys_in_files_are_refused(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    for read in (lambda: load(tmp_path / "bad.yaml"), lambda: parse(["--config", str(tmp_path / "bad.yaml")])):
        with pytest.raises(ValueError) as error:
            read()
        for word in words:
            assert word in str(error.value)


def test_a_section_may_be_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: parts/model.yaml")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("llm: llm.yaml")
    (tmp_path / "parts" / "llm.yaml").write_text("hidden_size: 96")
    assert parse(["--config", str(tmp_path / "run.yaml")]).model.llm.hidden_size == 96
    (tmp_path / "parts" / "llm.yaml").write_text("hidden_size: 96\nhidden_size: 32")
    with pytest.raises(ValueError, match="llm.yaml: hidden_size stands twice"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_fields_in_place_of_a_file_may_be_longer_than_a_file_name():
    assert parse(["--config", f"{{output_dir: {'x' * 300}}}"]).output_dir == "x" * 300


def test_a_field_that_may_have_no_value(tmp_path):
    (tmp_path / "none.yaml").write_text("model: {llm: {rope_scaling: null}}")
    assert load(tmp_path / "none.yaml") == Config()


def test_unknown_keys_in_dictionaries_are_refused():
    with pytest.raises(ValueError, match="nearest fields: data.video.num_frames"):
        from_dict({"data": {"video": {"num_frame": 3}}})


def test_saved_configuration_reads_back_equal(tmp_path, files):
    config = parse(["--config", files[0], "--config", files[1], "--parallel.cp_size", "4", "--optimizer.eps", "1e-12"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


def test_a_saved_configuration_outlives_a_full_disk(tmp_path):
    """A run that finds no room in the end must be there to be resumed."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        save(Config(), disk / "config.yaml")
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as stream:
            while stream.write(b"x" * 4096):
                pass
        with pytest.raises(OSError, match="No space left"):
            save(Config(output_dir="x" * 8192), disk / "config.yaml")
        assert load(disk / "config.yaml") == Config() and not list(disk.glob(".config.yaml.*"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_legal(path):
    config = load(path)
    assert check(config, world_size=1)
    stem = path.stem.rsplit("_", 1)
    if stem[0] != "tiny":
        size = int(stem[1])
        assert config.model.vision.image_size == size
        assert config.model.tokens_per_frame == {384: 196, 448: 256}[size]
        assert f"{config.model.tokens_per_frame} visual tokens" in path.read_text()
        assert config.model.llm.num_attention_heads * config.model.llm.head_dim == config.model.llm.hidden_size


def test_preset_names():
    assert {path.stem for path in PRESETS} == {"tiny"} | {
        f"{llm}_siglip_{size}" for llm in ("qwen2_1.5b", "qwen2_7b", "llama3_8b") for size in (384, 448)
    }


def test_tiny_is_legal_on_the_meshes_of_the_tests():
    for world_size, flags in [
        (2, ["--parallel.tp_size", "2"]),
        (4, ["--parallel.pp_size", "4"]),
        (4, ["--parallel.ulysses_size", "4"]),
        (8, ["--parallel.tp_size", "2", "--parallel.pp_size", "2", "--parallel.ulysses_size", "2"]),
        (8, ["--parallel.ulysses_size", "2", "--parallel.ring_size", "4"]),
    ]:
        assert check(parse(["--config", str(ROOT / "examples/models/tiny.yaml"), *flags]), world_size).dp_size == 1
