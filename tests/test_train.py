"""The training entry point up to the moment torch is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_longvila.config import ParallelConfig
from megatron_longvila.config_io import load, parse, save
from megatron_longvila.pulse import record_path, write_record
from megatron_longvila.train import check_alone, configure, continue_mesh, host_name, log_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Flags of a run whose inputs exist."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "dataset.json").touch()
    (tmp_path / "words.model").touch()
    tiny = ["--config", str(ROOT / "examples/models/tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    return [*tiny, "--data.train", f"[{tmp_path / 'rows'}]", "--data.tokenizer", str(tmp_path / "words.model")]


def axes(parallel: ParallelConfig) -> tuple:
    return parallel.cp_size, parallel.ulysses_size, parallel.ring_size


def test_configure_resolves_the_mesh(inputs):
    """One host takes as much ulysses as there are key/value heads, two ranks per host as stay on it."""
    assert axes(configure([*inputs, "--parallel.cp_size", "8"], world_size=8, gpus_per_host=8).parallel) == (8, 4, 2)
    assert axes(configure([*inputs, "--parallel.cp_size", "8"], world_size=8, gpus_per_host=2).parallel) == (8, 2, 4)
    with pytest.raises(ValueError, match="data.train"):
        configure(["--config", str(ROOT / "examples/models/tiny.yaml")], world_size=1, gpus_per_host=1)


def test_a_resume_keeps_the_mesh_unless_told_otherwise(inputs, tmp_path):
    first = configure([*inputs, "--parallel.cp_size", "8"], world_size=8, gpus_per_host=2)
    (tmp_path / "run").mkdir()
    save(first, tmp_path / "run" / "config.yaml")
    for flags in ([], ["--parallel.cp_size", "8"]):  # another kind of host alone would have given ring 2
        assert axes(configure([*inputs, *flags], world_size=8, gpus_per_host=8).parallel) == (8, 2, 4)
    assert axes(configure([*inputs, "--parallel.cp_size", "4"], world_size=4, gpus_per_host=8).parallel) == (4, 4, 1)
    tp = ["--parallel.tp_size", "2"]
    assert axes(configure([*inputs, *tp], world_size=2, gpus_per_host=8).parallel) == (1, 1, 1)
    fresh = parse([*inputs, "--checkpoint.resume", "false"])
    assert continue_mesh(fresh) == fresh


def run_train(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_longvila.train", *argv], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_help_prints_every_field_and_exits_0():
    done = run_train("--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--output_dir", "--parallel.ulysses_size", "--model.llm.num_query_groups", "--print_config", "--config"):
        assert flag in done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["--print_config"], ["--parallel.tp_size", "3"]])
def test_no_torch_before_the_configuration_is_right(argv):
    code = (
        "import sys\nfrom megatron_longvila import train\n"
        f"try: train.main({argv!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers', 'av'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_print_config_is_a_configuration(tmp_path):
    done = run_train("--parallel.tp_size", "2", "--print_config")
    assert done.returncode == 0
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load(tmp_path / "printed.yaml") == parse(["--parallel.tp_size", "2"])


def test_a_mistake_is_one_line_and_exit_1():
    done = run_train("--parallel.virtual_pp_size", "2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: parallel.virtual_pp_size=2 is not supported")


@pytest.mark.parametrize(("rank", "flags", "left"), [("0", [], False), ("1", [], True), ("0", ["--print_config"], True)])
def test_a_job_that_is_refused_is_not_taken_for_the_one_that_stopped_before(inputs, tmp_path, rank, flags, left):
    mark = tmp_path / "run" / "interrupted"
    mark.parent.mkdir()
    mark.write_text("{}")
    done = run_train(*inputs, "--parallel.virtual_pp_size", "2", *flags, RANK=rank)
    assert done.returncode == (0 if flags else 1) and mark.exists() == left, done.stderr


def test_no_folder_is_not_the_current_one(inputs, tmp_path):
    (tmp_path / "interrupted").write_text("{}")
    words = [sys.executable, "-m", "megatron_longvila.train", *inputs, "--output_dir", ""]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and "output_dir=''" in done.stderr and (tmp_path / "interrupted").exists()


def test_other_ranks_leave_a_mistake_to_the_first_one():
    """A launcher ends all ranks when one exits: if the others were faster, nobody would have said why."""
    first, other = (
        subprocess.Popen(
            [sys.executable, "-m", "megatron_longvila.train", "--parallel.virtual_pp_size", "2"],
            cwd=ROOT, env=os.environ | {"LOCAL_RANK": rank, "WORLD_SIZE": "2"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    )  # fmt: skip
    assert first.communicate(timeout=60)[1].startswith("error: parallel.virtual_pp_size=2")
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=2)
    other.terminate()
    assert other.communicate(timeout=60)[1] == ""


def test_two_jobs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    path = log_path(tmp_path, 0)
    path.parent.mkdir()
    with open(path, "w") as log, subprocess.Popen(["sleep", "60"], stdout=log) as other:
        beat = {"rank": 0, "host": host_name(), "pid": other.pid, "time_s": 1.0}
        record_path(tmp_path, "beat", 0).parent.mkdir()
        write_record(record_path(tmp_path, "beat", 0), beat)
        with pytest.raises(ValueError, match=f"is in use: process {other.pid} on this host trains there as rank 0"):
            check_alone(tmp_path, 0, limit_s=0.3)
        check_alone(tmp_path, 1, limit_s=0.3)
        write_record(record_path(tmp_path, "beat", 0), beat | {"host": "another"})
        check_alone(tmp_path, 0, limit_s=0.3)
        write_record(record_path(tmp_path, "beat", 0), beat)
        threading.Timer(0.5, other.kill).start()
        check_alone(tmp_path, 0, limit_s=30)  # it was about to end
        assert other.wait() == -signal.SIGKILL


HELD = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.Handlers[sys.argv[1]])
from megatron_longvila.train import hold_requests
hold_requests()
os.kill(os.getpid(), signal.SIGTERM)
from megatron_longvila.training.stopping import StopSignal
with StopSignal() as stop:
    print(stop.requested)
print(signal.sigpending())
"""


@pytest.mark.parametrize(("handler", "status", "said"), [("SIG_IGN", 0, "True\nset()\n"), ("SIG_DFL", -signal.SIGTERM, "")])
def test_a_request_to_stop_by_sigterm_waits_where_a_launcher_ignores_it(handler: str, status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELD, handler], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, said), done.stderr
