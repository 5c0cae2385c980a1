"""The command line of tools/evaluate_needle.py: what it asks, writes and refuses, and that a killed run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from media import image_bytes, video_bytes
from programs import ROOT, environment, load_script, read_lines, start
from tiny_tokenizers import write_sentencepiece

from megatron_longvila import config_io
from ranks import run_ranks

TOOL = ROOT / "tools" / "evaluate_needle.py"
ANSWERS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


def _write_checkpoint(rank: int, config, folder: Path) -> None:
    from megatron_longvila import platform
    from megatron_longvila.checkpoint.sharded import save_weights
    from megatron_longvila.config_check import check
    from megatron_longvila.models.init import initialize_weights
    from megatron_longvila.models.longvila import build_model
    from megatron_longvila.parallel.groups import initialize_groups

    groups = initialize_groups(check(config, 1), timeout_s=60)
    platform.seed(0, 0)
    model = build_model(config, groups)
    initialize_weights(model, config, seed=1)
    save_weights(folder, model, config, groups)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An untrained checkpoint that says many different things, two videos, needles and filler."""
    folder = tmp_path_factory.mktemp("needle")
    write_sentencepiece(folder / "tokenizer.model")
    (folder / "a.mp4").write_bytes(video_bytes(range(40)))
    (folder / "b.mp4").write_bytes(video_bytes(range(100, 130)))
    question, needles, facts = "What colour is the square?", [], []
    for number in range(6):
        (folder / f"{number}.png").write_bytes(image_bytes(200 + number))
        line = {"id": f"n{number}", "question": question, "answer": ANSWERS[number % 3]}
        needles.append(line | {"image": f"{number}.png", "distractors": [f"{(number + 1) % 6}.png"]})
        facts.append(line | {"facts": f"The square is {ANSWERS[number % 3]}."})
    for name, lines in (("needles.jsonl", needles), ("facts.jsonl", facts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "filler.txt").write_text("There are two shapes.\nA green triangle goes up.\nDescribe the video.\n")
    config = config_io.parse(
        [
            "--config", str(ROOT / "examples/models/tiny.yaml"), "--data.tokenizer", str(folder / "tokenizer.model"),
            "--data.template", "plain", "--model.llm.vocab_size", "448", "--model.init_std", "0.5", "--data.context_length", "128",
        ]
    )  # fmt: skip
    run_ranks(_write_checkpoint, 1, config, folder / "checkpoint", timeout_s=60)
    return folder


def command(data: Path, output: Path, *flags: object, num_ranks: int = 1) -> list[str]:
    launch = [sys.executable]
    if num_ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    words = [
        *launch, TOOL, "--checkpoint", data / "checkpoint", "--needles", data / "needles.jsonl",
        "--haystack", data / "a.mp4", data / "b.mp4", "--haystack_fps", 5,
        "--lengths", "2,6,20", "--depths", "0,0.5,1", "--trials_per_cell", 3, "--output", output, *flags,
    ]  # fmt: skip
    return list(map(str, words))


def asked(output: Path) -> list[dict]:
    """The records without the time they took."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in read_lines(output / "trials.jsonl")]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The result of one plain process, both protocols, with the control."""
    output = tmp_path_factory.mktemp("finished") / "out"
    code, text = start(*command(data, output, "--no_needle"))
    assert code == 0, text
    assert "needle found in 0 of 27 trials = 0.000" in text and "without the needle 0.000 of 27" in text
    return output


def test_results(finished, data):
    records = asked(finished)
    assert len(records) == 54 and [record["length"] for record in records[::18]] == [2, 6, 20]
    assert {record["needle"] for record in records} == {f"n{number}" for number in range(6)}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["trials"] == summary["no_needle_trials"] == 27 and summary["chance"] == pytest.approx(1 / 3, abs=0.05)
    assert summary["lengths"] == [2, 6, 20] and summary["depths"] == [0.0, 0.5, 1.0] and len(summary["cells"]) == 9
    assert summary["haystack"]["frames"] == 35 and summary["haystack"]["shown_times"] == 1 and summary["disagreements"] == 0
    assert summary["mesh"] == {"tp": 1, "pp": 1, "cp": 1, "ulysses": 1, "ring": 1, "world_size": 1}
    assert len((finished / "cells.csv").read_text().splitlines()) == 10
    assert (finished / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    with_needle = [record["greedy"]["tokens"] for record in records if not record["control"]]
    without = [record["greedy"]["tokens"] for record in records if record["control"]]
    assert with_needle != without  # the model sees the picture


def test_nothing_is_asked_twice_and_a_disagreement_fails(finished, tmp_path, data):
    output = tmp_path / "out"
    output.mkdir()
    lines = (finished / "trials.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["greedy"]["correct"] = True
    (output / "trials.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    code, text = start(*command(data, output, "--no_needle"))
    assert code == 1 and "the protocols disagree on length 2, depth 0%, trial 0: teacher_forcing" in text, text
    assert read_lines(output / "trials.jsonl") == [first, *map(json.loads, lines[1:])]  # the same seconds
    assert json.loads((output / "summary.json").read_text())["disagreements"] == 1


def test_refusals_name_the_way_out(tool, data, finished, tmp_path):
    def refusal(*flags: object) -> str:
        arguments, rest, prog = tool.parse_arguments(command(data, finished, *flags)[2:])
        with pytest.raises(ValueError) as caught:
            config = tool.evaluation_config(arguments.checkpoint, rest, prog=prog, world_size=1, gpus_per_host=1)
            tool.build_test(arguments, config)
        return str(caught.value)

    assert "holds no config.yaml; give a folder like" in refusal("--checkpoint", data)
    assert "--haystack none.mp4 does not exist" in refusal("--haystack", "none.mp4")
    assert "--needles none.jsonl cannot be read" in refusal("--needles", "none.jsonl")
    assert "image must be a text" in refusal("--needles", data / "facts.jsonl")
    assert "more than model.llm.max_position_embeddings=4096; leave the length out" in refusal("--lengths", "2,1000")
    assert "add --model.llm.max_position_embeddings" in refusal("--lengths", "1000", "--haystack", "generated")
    assert "nearest fields: parallel.ulysses_size" in refusal("--parallel.ulysses", 2)
    assert "must lie between 0" in refusal("--depths", "2")
    (tmp_path / "config.yaml").write_bytes((data / "checkpoint" / "config.yaml").read_bytes())
    (tmp_path / "tokens.json").write_text('{"tokenizer_sha256": "0"}')
    assert "was trained with tokenizer_sha256=0, data.tokenizer gives" in refusal("--checkpoint", tmp_path)
    dynamic = '{"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}'
    assert "under model.llm.rope_scaling.type='dynamic'" in refusal("--model.llm.rope_scaling", dynamic)
    for flags in (("--plain_text",), ("--text", "--haystack", "a", "b"), ("--lengths", "a,b"), ("--lengths", "1.5")):
        with pytest.raises(SystemExit) as caught:
            tool.parse_arguments(command(data, finished, *flags)[2:])
        assert caught.value.code == 2


@pytest.mark.end_to_end
def test_another_test_is_refused(data, finished):
    before = (finished / "trials.jsonl").read_bytes()
    code, text = start(*command(data, finished, "--seed", 1))
    assert code == 1 and "holds trials of another test (seed changed); give another --output" in text, text
    assert (finished / "trials.jsonl").read_bytes() == before


def test_help_imports_no_torch():
    code = "import runpy, sys\nsys.argv = ['tool', '--help']\ntry:\n    runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, TOOL], capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "--trials_per_cell" in done.stdout, done.stderr


def test_dry_run_says_what_it_would_cost(data, tmp_path, tool, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ("--dry_run", "--parallel.ulysses_size", 2)
    assert tool.main(command(data, tmp_path / "out", *flags)[2:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "length cells trials tokens of a trial rows of a cell tokens".split()  # noqa: SIM905
    length, cells, trials, tokens, rows, total = (int(word.replace(",", "")) for word in lines[3].split())
    assert (length, cells, trials, total) == (20, 3, 9, 9 * tokens) and rows == 3 and tokens > 20 * 5
    assert lines[-1].startswith("27 trials of 6 needles") and not (tmp_path / "out").exists()


@pytest.mark.end_to_end
@pytest.mark.parametrize("mesh", [("--parallel.ulysses_size", 2, "--parallel.ring_size", 2), ("--parallel.pp_size", 2)])
def test_four_ranks_find_the_same(data, finished, tmp_path, mesh):
    code, text = start(*command(data, tmp_path / "out", "--no_needle", *mesh, num_ranks=4))
    assert code == 0, text
    assert asked(tmp_path / "out") == asked(finished)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["mesh"]["world_size"] == 4


@pytest.mark.end_to_end
def test_a_killed_run_goes_on_at_its_cell(data, finished, tmp_path):
    output = tmp_path / "out"
    trials = output / "trials.jsonl"
    with subprocess.Popen(command(data, output, "--no_needle"), env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (trials.exists() and trials.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    kept = read_lines(trials)
    assert 0 < len(kept) < 54 and len(kept) % 3 == 0
    code, text = start(*command(data, output, "--no_needle", "--tokens_per_row", 64))
    assert code == 0, text
    assert read_lines(trials)[: len(kept)] == kept and asked(output) == asked(finished)


@pytest.mark.end_to_end
@pytest.mark.parametrize("plain", [(), ("--plain_text",)])
def test_text_needles(data, tmp_path, plain):
    flags = ("--text", "--needles", data / "facts.jsonl", "--haystack", data / "filler.txt", "--lengths", "30,90", *plain)
    code, text = start(*command(data, tmp_path / "out", *flags, "--parallel.ring_size", 2, num_ranks=2))
    assert code == 0 and "needle found in 0 of 18 trials" in text, text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mode"] == "text" and summary["lengths"] == [30, 90] and summary["haystack"]["shown_times"] > 1
    for record in asked(tmp_path / "out"):  # a sentence at most is missing; the question and its answer come on top
        assert record["length"] - 8 < record["num_tokens"] < record["length"] + 30
