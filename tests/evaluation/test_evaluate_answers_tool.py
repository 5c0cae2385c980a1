"""The command line of tools/evaluate_answers.py: what it takes from the checkpoint, what the flags change, what it refuses."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import load_script

from megatron_longvila import config_io
from megatron_longvila.config import ParallelConfig
from megatron_longvila.config_io import save

TOOL = Path(__file__).parents[2] / "tools" / "evaluate_answers.py"


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A checkpoint's configuration, trained with ulysses 2 x ring 2 and recompute, and an empty dataset."""
    trained = config_io.parse(["--config", str(TOOL.parents[1] / "examples/models/tiny.yaml")])
    trained = replace(
        trained,
        parallel=ParallelConfig(ulysses_size=2, ring_size=2, cp_size=4),
        data=replace(trained.data, tokenizer=str(tmp_path / "tokenizer.model"), global_batch_size=6),
        training=replace(trained.training, recompute="full", evaluation_rows=3),
    )
    (tmp_path / "step").mkdir()
    save(trained, tmp_path / "step" / "config.yaml")
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "dataset.json").touch()
    return tmp_path


def arguments(run_dir: Path, *flags: str) -> list[str]:
    return ["--checkpoint", f"{run_dir}/step", "--data", f"{run_dir}/heldout", "--output", f"{run_dir}/answers.json", *flags]


def test_the_mesh_is_that_of_this_job(tool, run_dir):
    found, config = tool.configure(arguments(run_dir, "--blank_frames"), world_size=2)
    assert found.blank_frames and found.output == run_dir / "answers.json"
    assert (config.parallel.cp_size, config.parallel.tp_size) == (1, 1)  # two data-parallel ranks
    assert config.data.evaluation == [f"{run_dir}/heldout"] and config.data.global_batch_size == 2
    assert (config.training.recompute, config.training.evaluation_rows) == ("none", 0)
    assert config.checkpoint.load == f"{run_dir}/step" and config.model.llm.hidden_size == 64


def test_unusable_samples_of_one_id_in_two_folders_are_two(tool):
    folders = SimpleNamespace(path=Path("a")), SimpleNamespace(path=Path("b"))
    index = SimpleNamespace(locate=lambda number: (folders[number // 10], SimpleNamespace(id=str(number % 10))))
    found = tool.list_unusable(index, {13: "too long", 3: "no words"})
    assert [(one["data"], one["sample_id"], one["reason"]) for one in found] == [("a", "3", "no words"), ("b", "3", "too long")]


def test_flags_change_any_field(tool, run_dir):
    flags = ("--parallel.ulysses_size", "2", "--parallel.pp_size", "2", "--data.video.num_frames", "3", "--training.evaluation_rows", "5")
    _, config = tool.configure(arguments(run_dir, *flags), world_size=4)
    assert (config.parallel.ulysses_size, config.parallel.pp_size, config.parallel.ring_size) == (2, 2, 1)
    assert config.data.video.num_frames == 3 and config.training.evaluation_rows == 5


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("step/config.yaml", (), "holds no config.yaml"),
        ("heldout/dataset.json", (), "holds no dataset.json; write it with tools/preprocess_video.py"),
        ("tokenizer.model", (), "say where it is now with --data.tokenizer"),
        (None, ("--parallel.tp", "2"), "nearest fields: parallel.tp_size"),
        (None, ("--parallel.ring_size", "3"), "world_size=2 must be divisible by"),
    ],
)
def test_what_does_not_fit_is_refused(tool, run_dir, missing, flags, message):
    if missing:
        (run_dir / missing).unlink()
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.configure(arguments(run_dir, *flags), world_size=2)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("heldout", r"heldout is a folder; give the JSON file to write, like .*/heldout/answers.json"),
        ("tokenizer.model/answers.json", "nothing can be written below .*/tokenizer.model"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_asked(tool, run_dir, output, message):
    with pytest.raises(ValueError, match=message):
        tool.configure([*arguments(run_dir), "--output", str(run_dir / output)], world_size=1)


def test_a_refusal_is_one_line_and_help_imports_no_torch(run_dir):
    (run_dir / "tokenizer.model").unlink()
    environment = {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run([sys.executable, TOOL, *arguments(run_dir)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: data.tokenizer=") and done.stderr.count("\n") == 1
    code = "import runpy, sys\nsys.argv = ['tool', '--help']\ntry:\n    runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, TOOL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "--blank_frames" in done.stdout, done.stderr
