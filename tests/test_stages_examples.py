"""Stage files pass the checks on the meshes that their headers name, hold the recipe's numbers, and fit each other along every chain."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import load_script
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.config import Config
from megatron_longvila.config_check import check
from megatron_longvila.config_io import parse
from megatron_longvila.training.chain import Planned, flatten, plan_chain, read_chain

EXAMPLES = Path(__file__).parents[1] / "examples"
STAGES = sorted((EXAMPLES / "stages").glob("*.yaml"))
CHAINS = sorted((EXAMPLES / "chains").glob("*.yaml"))
MESH = re.compile(r"#   (\S+) on (\d+) GPUs: tp (\d+), ulysses (\d+), ring (\d+), dp (\d+)(?:; (.*))?")
# What a comment must say about where a number comes from.
SOURCE = re.compile(r"\[(paper|script|[\w.]+\.(sh|py|json))\]|\b(as|of) stage\d+_\w+|\bours\b|transformers' AdamW")
# Context -> RoPE base: the ladder of the public scripts.
LADDER = {65_536: 15_300_000, 262_144: 207_112_184, 524_288: 1_062_356_830, 1_048_576: 3_580_165_449}


def models(pattern: str) -> list[Path]:
    """The presets of published models that a header's pattern stands for."""
    found = [path for path in sorted((EXAMPLES / "models").glob(f"{pattern}.yaml")) if path.stem != "tiny"]
    assert found, f"no model is called {pattern}"
    return found


@functools.cache
def configuration(stage: Path, model: Path) -> Config:
    return parse(["--config", str(model), "--config", str(stage)])


def with_flags(config: Config, flags: str) -> Config:
    """`config` with a header's flags (--PART.FIELD VALUE), without parsing files again."""
    words = flags.split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        part, field = re.fullmatch(r"--(\w+)\.(\w+)", flag).groups()
        config = replace(config, **{part: replace(getattr(config, part), **{field: yaml.safe_load(value)})})
    return config


def stage(name: str) -> Config:
    return configuration(EXAMPLES / "stages" / f"{name}.yaml", EXAMPLES / "models" / "qwen2_7b_siglip_384.yaml")


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_passes_the_checks_on_the_meshes_of_its_header(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    meshes = [MESH.fullmatch(line) for line in lines]
    assert all(meshes), f"not a mesh: {lines[meshes.index(None)]}"
    checked = set()
    for match in meshes:
        pattern, world_size, *sizes, flags = match.groups()
        for model in models(pattern):
            words = f"--parallel.gpus_per_host 8 {flags or ''}"  # hosts of 8, as torchrun would tell
            mesh = check(with_flags(configuration(path, model), words), int(world_size))
            assert [str(size) for size in (mesh.tp_size, mesh.ulysses_size, mesh.ring_size, mesh.dp_size)] == sizes
            checked.add((model.stem, int(world_size)))
    # One node and 32 nodes of 8, for each language model with the 384 px tower at least.
    assert checked >= {(model.stem, world_size) for model in models("*_384") for world_size in (8, 256)}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_is_a_difference_from_a_base(path):
    """It names no size of the model, so that it fits every base."""
    model = yaml.safe_load(path.read_text()).get("model", {})
    assert set(model) <= {"llm", "lora"} and set(model.get("llm", {})) <= {"max_position_embeddings", "rotary_base"}


def settings(path: Path) -> dict[str, tuple[Any, str]]:
    """Dotted name -> value and comments (its own, and those directly above) of every setting of a stage file."""
    found: dict[str, tuple[Any, str]] = {}
    parents, above = [], ""
    for line in path.read_text().splitlines():
        code, _, comment = line.partition("#")
        if not code.strip():
            above = f"{above} {comment}" if comment else ""
            continue
        key, value = code.split(":", 1)
        parents[(len(key) - len(key.lstrip())) // 2 :] = [key.strip()]
        if value.strip():
            found[".".join(parents)] = yaml.safe_load(value), f"{above} {comment}"
        above = ""
    return found


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_number_has_a_source(path):
    """A citation that README.md explains or that names a script, another stage file with the same value, or "ours"."""
    found = settings(path)
    assert {name: value for name, (value, _) in found.items()} == flatten(yaml.safe_load(path.read_text()))
    parts = ("data.", "model.", "optimizer.", "training.", "checkpoint.")
    numbers = {name: one for name, one in found.items() if name.startswith(parts) and name != "data.train"}
    assert not [name for name, (_, comment) in numbers.items() if not SOURCE.search(comment)]
    readme = (EXAMPLES / "stages" / "README.md").read_text()
    for name, (value, comment) in numbers.items():
        for cited in re.findall(r"\[([\w.]+)\](?!:)", comment):
            assert f"`[{cited}]`" in readme or re.fullmatch(r"[45]_\w+\.sh", cited), f"{name}: nothing is called [{cited}]"
        for other in re.findall(r"\b(?:as|of) (stage\d+_\w+)", comment):
            assert settings(EXAMPLES / "stages" / f"{other}.yaml")[name][0] == value, f"{name} is not the one of {other}"


def test_a_number_without_a_source_is_seen(tmp_path):
    lines = ["data:", "  # [paper]", "  context_length: 8 # long", "  video:", "    fps: 2.0 # twice a second", "optimizer:", "  lr: 1.0"]
    (tmp_path / "stage.yaml").write_text("\n".join(lines))
    found = settings(tmp_path / "stage.yaml")
    assert {name: value for name, (value, _) in found.items()} == {"data.context_length": 8, "data.video.fps": 2.0, "optimizer.lr": 1.0}
    assert [name for name, (_, comment) in found.items() if SOURCE.search(comment)] == ["data.context_length"]


def test_context_extension_is_the_public_ladder():
    steps = {"64k": (40, 4), "256k": (80, 16), "512k": (80, 16), "1m": (50, 4)}
    for name, context_length in zip(steps, LADDER, strict=True):
        config = stage(f"stage4_{name}")
        llm, lora, optimizer = config.model.llm, config.model.lora, config.optimizer
        assert (llm.max_position_embeddings, llm.rotary_base) == (context_length, LADDER[context_length])
        assert llm.rope_scaling is None and config.data.context_length == context_length
        assert (lora.rank, lora.alpha, lora.targets) == (8, 16, ["q", "k", "v", "o"])
        assert config.training.trainable == ["lora", "llm_norms"]
        assert (config.training.steps, config.data.global_batch_size) == steps[name]
        assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps, optimizer.weight_decay) == (2e-5, "constant", 2, 0)
        switch = re.search(r"# trainable: (\[.*\])", (EXAMPLES / "stages" / f"stage4_{name}.yaml").read_text())
        assert yaml.safe_load(switch[1]) == ["lora", "llm_norms", "llm_embeddings"]
    seen = sum(stage(f"stage4_{name}").data.context_length * rows * count for name, (count, rows) in steps.items())
    assert round(seen / 1e9, 1) == 1.2  # billion tokens, where the paper has 17


@pytest.mark.parametrize(
    ("frames", "before", "lr", "batch"),
    [(256, "64k", 2e-5, 128), (512, "256k", 5e-5, 64), (1024, "256k", 5e-5, 32), (2048, "512k", 5e-5, 32)],
)
def test_long_sft_follows_the_public_scripts(frames, before, lr, batch):
    config, extension = stage(f"stage5_{frames}_frames"), stage(f"stage4_{before}")
    assert config.data.video.num_frames == frames and config.data.video.fps == 2.0
    assert config.training.trainable == ["vision", "projector", "llm"] and config.training.epochs == 6
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_fraction) == (lr, "cosine", 0.03)
    assert config.data.global_batch_size == batch
    # One video fits a row, and two do not.
    assert frames * 197 < config.data.context_length < 2 * frames * 197
    assert config.model.llm.rotary_base == extension.model.llm.rotary_base
    assert config.training.recompute == "full" and config.training.recompute_vision


def test_the_first_three_stages():
    expected = {
        "stage1_alignment": (1e-3, ["projector"]),
        "stage2_pretraining": (5e-5, ["projector", "llm"]),
        "stage3_short_sft": (2e-5, ["vision", "projector", "llm"]),
    }
    base = parse(["--config", str(EXAMPLES / "models" / "qwen2_7b_siglip_384.yaml")])
    for name, (lr, trainable) in expected.items():
        config = stage(name)
        assert (config.optimizer.lr, config.training.trainable) == (lr, trainable)
        assert config.optimizer.warmup_fraction == 0.03 and config.training.epochs == 1
        assert config.model == base.model
        assert (
            config.model.llm == configuration(EXAMPLES / "models" / "qwen2_7b_siglip_384.yaml", EXAMPLES / "models" / "tiny.yaml").model.llm
        )


def chain_stages(path: Path) -> dict[str, tuple[str, ...]]:
    """Command line of each stage of a chain file, by the name of its stage file, in order."""
    stages = read_chain(path).stages
    return {Path(stage.argv[stage.argv.index("--config", 2) + 1]).stem: stage.argv for stage in stages}


def header_mesh(name: str, model: str, num_gpus: int) -> tuple[list[int], str]:
    """(tp, ulysses, ring, dp) and the flags that the header of a stage file names first for a model."""
    for line in (EXAMPLES / "stages" / f"{name}.yaml").read_text().splitlines():
        match = MESH.fullmatch(line)
        if match and int(match[2]) == num_gpus and fnmatch(model, match[1]):
            return [int(size) for size in match.groups()[2:6]], match[7] or ""
    raise AssertionError(f"{name} names no mesh of {num_gpus} GPUs for {model}")


@pytest.fixture(scope="module")
def place_of_datasets(tmp_path_factory) -> Path:
    """What a chain needs to be on disk: datasets and a checkpoint of which nothing but their mark is read, and a tokenizer."""
    place = tmp_path_factory.mktemp("place_of_datasets")
    folders = {folder for path in STAGES for folder in yaml.safe_load(path.read_text())["data"]["train"]}
    write_dataset_marks(place / folder for folder in folders)
    write_sentencepiece(place / "tokenizer.model")
    (place / "start").mkdir()
    (place / "start" / "complete.json").write_text("{}")
    return place


def write_dataset_marks(folders: Iterable[Path]) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps({"hash": folder.name}))


def plan(path: Path, flags: list[str], num_gpus: int) -> list[Planned]:
    """The plan that tools/run_stages.py makes of a chain in the current folder before it starts anything."""
    chain = read_chain(path, ["--data.tokenizer", "tokenizer.model", *flags])
    return plan_chain(chain, Path("out"), Path("start"), num_ranks=num_gpus, ranks_per_host=8)


@pytest.mark.parametrize("num_gpus", [8, 256])
@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_fits_together(path, num_gpus, place_of_datasets, monkeypatch):
    """On the meshes that the headers of its stage files name, with their flags; the comments of the chain file name these."""
    monkeypatch.chdir(place_of_datasets)
    model = Path(yaml.safe_load(path.read_text())["base"][0]).stem
    meshes = {name: header_mesh(name, model, num_gpus) for name in chain_stages(path)}
    flags = {}
    for stage, (_, named) in zip(read_chain(path).stages, meshes.values(), strict=True):
        words = named.split()
        flags |= {f"--stages.{stage.name}.{flag.removeprefix('--')}": value for flag, value in zip(words[::2], words[1::2], strict=True)}
    if num_gpus == 256:
        comments = " ".join(re.findall(r"^#   (.*)", path.read_text(), re.MULTILINE)).split()
        assert flags and comments == [word for pair in flags.items() for word in pair]
        with pytest.raises(ValueError, match="stage extension_64k: data.global_batch_size=4 "):
            plan(path, [], num_gpus)
    else:
        assert not flags
    planned = plan(path, [word for pair in flags.items() for word in pair], num_gpus)
    before = None
    for one, (name, (sizes, _)) in zip(planned, meshes.items(), strict=True):
        parallel, llm = one.config.parallel, one.config.model.llm
        assert [parallel.tp_size, parallel.ulysses_size, parallel.ring_size] == sizes[:3], name
        assert num_gpus == math.prod(sizes)
        assert one.merges == name.startswith("stage4"), name  # what the next stage begins with has no adapters
        if before is not None:
            if not name.startswith("stage4"):  # only context extension changes what positions mean
                assert (llm.rotary_base, llm.rope_scaling) == (before.rotary_base, before.rope_scaling), name
            assert llm.max_position_embeddings >= before.max_position_embeddings, name
        before = llm


@pytest.mark.parametrize(("name", "num_gpus"), [("quickstart", 4), ("needle_1m", 1), ("needle_1m", 2), ("needle_1m", 4)])
def test_a_small_chain_fits_together(name, num_gpus, tmp_path, monkeypatch):
    """With the command line that its own program gives tools/run_stages.py."""
    path = EXAMPLES / name / "chain.yaml"
    if name == "quickstart":
        words = load_script(EXAMPLES / name / "quickstart.py").chain_command(tmp_path, path)
    else:
        program, commands = load_script(EXAMPLES / name / "run.py"), []
        monkeypatch.setattr(program, "run", commands.append)
        program.train(tmp_path, num_gpus, [])
        words = [str(word) for word in commands[0]]
    at = words.index("--num_ranks")
    assert words[at + 1] == str(num_gpus)
    chain = read_chain(path, words[at + 2 :])
    folders = {word for value in words[at + 2 :] if value.startswith("[") for word in value.strip("[]").split(",")}
    write_dataset_marks(map(Path, folders))
    write_sentencepiece(tmp_path / "data" / "tokenizer.model")
    planned = plan_chain(chain, tmp_path / "out", None, num_ranks=num_gpus, ranks_per_host=num_gpus)
    assert [one.merges for one in planned] == ["context_extension" in one.stage.name for one in planned]
    assert max(one.config.parallel.cp_size for one in planned) == num_gpus


def test_the_orders_of_table_1_are_there():
    orders = {
        "order_1_2_3_4_5": ["1", "2", "3", "4", "5"],
        "order_1_2_4_35": ["1", "2", "4", "35"],
        "order_4_1_2_3_5": ["4", "1", "2", "3", "5"],
        "order_4_1_2_35": ["4", "1", "2", "35"],
    }
    found = {path.stem: [re.match(r"stage(\d+)", name)[1] for name in chain_stages(path)] for path in CHAINS}
    assert {name: found[name] for name in orders} == orders
