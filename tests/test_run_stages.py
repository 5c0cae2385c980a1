"""Chains of stages: what is run, skipped, refused and reported. Training is a small program here; tests/end_to_end has the real one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from programs import ROOT, environment, load_script
from tiny_tokenizers import write_sentencepiece

from megatron_longvila.data.preprocess import Options, preprocess
from megatron_longvila.training.chain import read_chain

TOOL = ROOT / "tools" / "run_stages.py"
TINY = str(ROOT / "examples" / "models" / "tiny.yaml")
# Stands for training: notes what it was called with, writes what a finished run leaves, or fails or waits where it was told to.
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_longvila.config_io import parse, to_dict
assert sys.argv[1:3] == ["-m", "megatron_longvila.train"]
config = parse(sys.argv[3:])
folder = Path(config.output_dir)
folder.mkdir(parents=True, exist_ok=True)
with open(Path(__file__).with_name("calls.jsonl"), "a") as calls:
    calls.write(json.dumps({"stage": folder.name, "load": config.checkpoint.load, "lr": config.optimizer.lr}) + "\\n")
fault = Path(__file__).with_name(f"fault_{folder.name}")
if fault.exists():
    if fault.read_text() == "fail":
        sys.exit(7)
    stopped = []
    signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
    (folder / "heartbeat.json").write_text(json.dumps({"pid": os.getpid(), "step": 1}))
    while not stopped:
        time.sleep(0.02)
    (folder / "interrupted").write_text("{}")
    sys.exit(0)
(folder / "interrupted").unlink(missing_ok=True)
name = f"checkpoints/step_{config.training.steps:07d}"
(folder / name).mkdir(parents=True)
(folder / name / "complete.json").write_text(json.dumps({"files": {}, "of": folder.name}))
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3 / n}) + "\\n" for n in range(1, config.training.steps + 1)))
(folder / "parameters.json").write_text(json.dumps({"total": {"trained": 10, "frozen": 90}}))
(folder / "run_summary.json").write_text(json.dumps({
    "steps": config.training.steps, "tokens": 1000, "labelled_tokens": 100, "frames": 40, "wall_s": 2.5, "loss": 3 / config.training.steps,
    "evaluation_loss": None, "memory_gib": 0.5, "num_ranks": 1, "input": config.checkpoint.load, "checkpoint": name,
    "rounded": {"tensors": 1234, "frozen": 56, "from": ["float32"], "to": ["bfloat16"]} if config.checkpoint.load else None,
}))
"""


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


class Workplace:
    """A folder with a chain of three stages and its data."""

    def __init__(self, folder: Path, tool):
        self.folder, self.tool, self.output = folder, tool, folder / "out"
        (folder / "dataset").mkdir()
        (folder / "dataset" / "dataset.json").write_text('{"hash": "1"}')
        write_sentencepiece(folder / "tokenizer.model")
        (folder / "training.py").write_text(TRAINING)
        (folder / "base.yaml").write_text("training: {steps: 4}\noptimizer: {lr: 0.1}\n")
        self.chain = {
            "base": [TINY, "base.yaml"],
            "tokenizer": "tokenizer.model",
            "flags": {"data.train": ["dataset"], "model.llm.vocab_size": 448},
            "stages": [{"name": "one"}, {"name": "two", "flags": {"optimizer.lr": 0.2}}, {"name": "three"}],
        }

    def words(self, *flags: str) -> list[str]:
        (self.folder / "chain.yaml").write_text(yaml.safe_dump(self.chain))
        launcher = f"{sys.executable} {self.folder}/training.py"
        paths = ["--chain", str(self.folder / "chain.yaml"), "--output_dir", str(self.output)]
        return [*paths, "--launcher", launcher, "--num_ranks", "1", *flags]

    def run(self, *flags: str) -> int:
        return self.tool.main(self.words(*flags))

    def calls(self) -> list[dict]:
        """What training was called with since the last question."""
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())

    def refused(self, *flags: str) -> str:
        """The one line that a chain is refused with, before anything was started."""
        with pytest.raises(SystemExit) as error:
            self.run(*flags)
        assert self.calls() == []
        return str(error.value)


@pytest.fixture
def place(tmp_path, tool, monkeypatch) -> Workplace:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tool's handlers are for a process of its own
    return Workplace(tmp_path, tool)


def checkpoint(place: Workplace, stage: str, steps: int = 4) -> str:
    return str(place.output / "stages" / stage / "checkpoints" / f"step_{steps:07d}")


def test_weights_are_handed_over_and_finished_stages_skipped(place, capsys) -> None:
    assert place.run() == 0
    calls = place.calls()
    assert [(call["stage"], call["load"]) for call in calls] == [
        ("one", ""), ("two", checkpoint(place, "one")), ("three", checkpoint(place, "two"))
    ]  # fmt: skip
    assert [call["lr"] for call in calls] == [0.1, 0.2, 0.1]
    summary = place.summary()
    assert summary["finished"] and summary["checkpoint"] == checkpoint(place, "three") and summary["chain"] == "chain"
    assert summary["total"] | {"seconds": 0} == {
        "steps": 12, "tokens": 3000, "labelled_tokens": 300, "frames": 120, "wall_s": 7.5, "seconds": 0
    }  # fmt: skip
    assert [stage["final_loss"] for stage in summary["stages"]] == [0.75] * 3
    assert summary["stages"][1]["input"] == checkpoint(place, "one")
    page = (place.output / "summary.html").read_text()
    assert "3 of 3 stages finished: 3,000 tokens, 120 frames" in page and page.count("<svg") == 1
    assert page.count("<td>1,234 (56 frozen)</td>") == 2 and [bool(stage["rounded"]) for stage in summary["stages"]] == [False, True, True]
    capsys.readouterr()
    assert place.run() == 0 and place.calls() == []
    assert capsys.readouterr().out.count("finished before") == 3


def test_weights_of_stages_before_a_finished_one_may_be_removed(place, capsys) -> None:
    assert place.run() == 0 and len(place.calls()) == 3
    shutil.rmtree(checkpoint(place, "one"))
    capsys.readouterr()
    assert place.run() == 0 and place.calls() == []
    assert "one: finished before, its weights removed since" in capsys.readouterr().out and place.summary()["finished"]
    shutil.rmtree(checkpoint(place, "three"))
    assert place.run() == 0 and [call["stage"] for call in place.calls()] == ["three"]


def test_inputs_of_finished_stages_may_be_removed(place, capsys) -> None:
    """What the first one began with, and its data and tokenizer: only a stage that is to be trained needs them."""
    start, own = place.folder / "start", place.folder / "own"
    for folder, name, text in ((start, "complete.json", "{}"), (own, "dataset.json", '{"hash": "3"}')):
        folder.mkdir()
        (folder / name).write_text(text)
    shutil.copy(place.folder / "tokenizer.model", own / "tokenizer.model")
    place.chain["stages"][0]["flags"] = {"data.train": ["own"], "data.tokenizer": "own/tokenizer.model"}
    (place.folder / "fault_three").write_text("fail")
    flags = ("--from_checkpoint", str(start))
    assert place.run(*flags) == 3
    shutil.rmtree(start)
    shutil.rmtree(own)
    (place.folder / "fault_three").unlink()
    place.calls()
    assert place.run(*flags) == 0 and [call["stage"] for call in place.calls()] == ["three"]
    assert place.run(*flags) == 0 and place.calls() == []
    assert place.run("--restart_from", "two", *flags) == 0 and len(place.calls()) == 2
    assert "stage one: data.train" in place.refused("--restart_from", "one", *flags)
    assert place.run(*flags) == 0 and place.calls() == []  # and nothing was removed
    assert "stage one in" in place.refused("--stages.one.training.steps", "2", *flags)


def test_dry_run_of_a_restart(place, capsys) -> None:
    assert place.run() == 0 and len(place.calls()) == 3
    capsys.readouterr()
    assert place.run("--dry_run", "--restart_from", "two") == 0 and place.calls() == []
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] == "="] == [
        "== stage one: finished",
        *(f"== stage {n}: to be trained" for n in ("two", "three")),
    ]
    assert [f"--checkpoint.load {checkpoint(place, name)}" in line for name, line in (("one", lines[2]), ("two", lines[4]))] == [True, True]
    assert Path(checkpoint(place, "three")).exists()
    assert "--restart_from four must be one of" in place.refused("--dry_run", "--restart_from", "four")


def test_a_failed_stage_ends_the_chain_and_is_taken_up_again(place, capsys) -> None:
    (place.folder / "fault_two").write_text("fail")
    assert place.run() == 3
    assert "error: stage two: training ended with exit status 7" in capsys.readouterr().err
    assert [stage["status"] for stage in place.summary()["stages"]] == ["finished", "failed", "pending"]
    (place.folder / "fault_two").unlink()
    place.calls()
    assert place.run() == 0 and [call["stage"] for call in place.calls()] == ["two", "three"]
    assert [stage["attempts"] for stage in place.summary()["stages"]] == [1, 2, 1]


def test_changes_of_a_finished_stage_are_refused(place) -> None:
    place.run("--stages.one.training.steps", "2")
    place.calls()
    message = place.refused()
    assert "stage one in" in message and "training.steps was 2 and is 4" in message and "--restart_from one" in message
    assert place.run("--stages.one.training.steps", "2", "--parallel.timeout_s", "5", "--training.recompute", "full") == 0
    assert place.calls() == []  # how it is run does not matter
    (place.folder / "dataset" / "dataset.json").write_text('{"hash": "2"}')
    assert "data was ['1'] and is ['2']" in place.refused("--stages.one.training.steps", "2")
    (place.folder / "dataset" / "dataset.json").write_text('{"hash": "1"}')
    place.chain["stages"][1]["flags"]["optimizer.lr"] = 0.3
    assert "stage two in" in place.refused("--stages.one.training.steps", "2")
    assert place.run("--stages.one.training.steps", "2", "--restart_from", "two") == 0
    assert [(call["stage"], call["lr"]) for call in place.calls()] == [("two", 0.3), ("three", 0.1)]


def test_an_unfinished_stage_may_change_but_not_its_input(place, capsys) -> None:
    (place.folder / "fault_two").write_text("fail")
    assert place.run() == 3
    assert place.run("--stages.two.optimizer.lr", "0.4") == 3
    assert "stage two goes on with other fields than it began with: optimizer.lr was 0.2 and is 0.4" in capsys.readouterr().out
    assert [call["lr"] for call in place.calls() if call["stage"] == "two"] == [0.2, 0.4]
    place.chain["stages"] = place.chain["stages"][1:]
    assert "input was" in place.refused()


def test_start_weights(place) -> None:
    start = place.folder / "start"
    start.mkdir()
    assert "holds no complete.json" in place.refused("--from_checkpoint", str(start))
    (start / "complete.json").write_text("{}")
    assert place.run("--from_checkpoint", str(start)) == 0
    assert place.calls()[0]["load"] == str(start)
    (start / "complete.json").write_text("{ }")
    assert "stage one in" in place.refused("--from_checkpoint", str(start))


def test_dry_run_changes_nothing(place, capsys) -> None:
    place.chain["stages"][1]["flags"] |= {"model.lora.rank": 2, "training.trainable": ["lora"]}
    assert place.run("--dry_run") == 0 and place.calls() == [] and not place.output.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "== stage one: pending" and f"--checkpoint.load {checkpoint(place, 'one')}" in lines[3]
    merged = f"{place.output}/stages/two/merged"
    assert lines[4].endswith(f"merge_lora.py --checkpoint {checkpoint(place, 'two')} --output {merged}")
    assert lines[6].endswith(f"--checkpoint.load {merged}")


def test_a_stage_whose_adapters_are_not_merged_is_not_finished(place, capsys) -> None:
    place.chain["stages"][1]["flags"] |= {"model.lora.rank": 2, "training.trainable": ["lora"]}
    assert place.run() == 3  # the checkpoint of this training holds nothing to merge
    assert "stage two: merging its adapters ended with exit status 1" in capsys.readouterr().err
    place.calls()
    merged = place.output / "stages" / "two" / "merged"
    merged.mkdir()
    (merged / "complete.json").write_text("{}")
    assert place.run() == 0
    assert [(call["stage"], call["load"]) for call in place.calls()] == [("three", str(merged))]  # two is not trained again


REFUSED = {
    "field": (lambda chain: chain["flags"].update({"optimizer.rate": 1}), "stage one: .*optimizer.rate.*nearest fields"),
    "rule": (lambda chain: chain["stages"][2].update(flags={"optimizer.lr": -1.0}), "stage three: optimizer.lr=-1.0 must be positive"),
    "mesh": (lambda chain: chain["flags"].update({"parallel.tp_size": 2}), "stage one: .*tp"),
    "data": (lambda chain: chain["stages"][1].update(flags={"data.train": ["gone"]}), "stage two: data.train: '.*/gone' holds no dataset"),
    "fit": (
        lambda chain: chain["stages"][1].update(flags={"model.llm.ffn_hidden_size": 256}),
        "stage two: the weights of stage one do not fit: model.llm.ffn_hidden_size is .* there and 256 here",
    ),
    "save": (lambda chain: chain["flags"].update({"checkpoint.save_at_end": False}), "save_at_end=false leaves nothing"),
    "nested own": (lambda chain: chain["flags"].update({"checkpoint": {"load": "x"}}), "checkpoint.load is set by the chain itself"),
    "file": (lambda chain: chain["flags"].update({"config": "x.yaml"}), "config is a key of its own beside flags"),
    "path": (lambda chain: chain["flags"].update({"data.train": [3]}), "data.train must be a path, or a list of them, not \\[3\\]"),
    "files": (lambda chain: chain["stages"][0].update(config=[1]), "stage one: config must be a list of files, not \\[1\\]"),
    "own": (lambda chain: chain["flags"].update({"output_dir": "x"}), "output_dir is set by the chain itself"),
    "merge": (lambda chain: chain["stages"][0].update(merge_lora=True), "stage one: merge_lora is true and model.lora.rank=0"),
    "key": (lambda chain: chain["stages"][0].update(flag={}), "unknown key 'flag'; known are .*flags\\?"),
    "twice": (lambda chain: chain["stages"][1].update(name="one"), "must differ"),
    "folder": (lambda chain: chain["stages"][1].update(name="../one"), "must be letters"),
    "none": (lambda chain: chain.update(stages=[]), "at least one stage"),
    "base": (lambda chain: chain.update(base="base.yaml"), "base must be a list of files, not 'base.yaml'"),
    "flags": (lambda chain: chain["stages"][1].update(flags=["x"]), "stage two: flags must be a mapping"),
    "bool": (lambda chain: chain["stages"][1].update(merge_lora="no"), "stage two: merge_lora must be true or false, not 'no'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(case: str, place) -> None:
    harm, message = REFUSED[case]
    harm(place.chain)
    found = place.refused()
    assert re.search(message, found, re.DOTALL), found
    assert not place.output.exists()


def test_a_stage_on_a_mixture_is_bound_to_what_the_mixture_draws(place, capsys) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    for name in ("a", "b"):
        rows = place.folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"id": f"{name}{number}", "conversations": turns}) + "\n" for number in range(4)))
        preprocess(Options(input=rows, media_root=place.folder, output=place.folder / name, num_workers=1))
    registry = place.folder / "mixtures.yaml"

    def write(weight: str, mixture: str = "m") -> None:
        registry.write_text(f"datasets: {{a: a, b: b, c: c}}\nmixtures:\n  {mixture}: {{mix: a + {weight}*b, limit: {{late: 100}}}}\n")

    write("2")
    flags = {"data.train": [], "data.mixture": "m", "data.registry": "mixtures.yaml", "data.stage": "late"}
    place.chain["stages"][1]["flags"] |= flags
    assert place.run() == 0 and len(place.calls()) == 3
    write("2.0")
    assert place.run() == 0 and place.calls() == []  # written differently, the same draws
    write("3")
    assert "stage two in " in (said := place.refused()) and "8 from the 4 of b" in said and "12 from the 4 of b" in said
    assert place.run("--restart_from", "two") == 0 and [call["stage"] for call in place.calls()] == ["two", "three"]
    place.chain["stages"][1]["flags"]["data.mixture"] = "m + c"
    assert "stage two: " in (said := place.refused()) and "c' holds no dataset.json" in said


def test_parts_that_are_not_taken_over_need_not_fit(place) -> None:
    place.chain["stages"][0]["flags"] = {"model.llm.ffn_hidden_size": 256}
    place.chain["stages"][1]["flags"] |= {"checkpoint.load_parts": ["vision"]}
    assert place.run() == 0


def test_fields_of_a_chain_file_may_be_nested(tmp_path) -> None:
    """And are what they are in one word each: paths relative to the file, and no field that is a mapping itself is taken apart."""
    path, scaling = tmp_path / "chain.yaml", {"factor": 2.0, "type": "linear"}
    nested = {"data": {"train": ["rows"]}, "model": {"llm": {"rope_scaling": scaling}}}
    flat = {"data.train": ["rows"], "model.llm.rope_scaling": scaling}
    words = []
    for flags in (nested, flat):
        path.write_text(yaml.safe_dump({"stages": [{"name": "one", "flags": flags}]}))
        words.append(read_chain(path).stages[0].argv)
    assert words[0] == words[1] == ("--data.train", json.dumps([str(tmp_path / "rows")]), "--model.llm.rope_scaling", json.dumps(scaling))


def test_a_key_that_stands_twice_in_a_chain_file_is_refused(tmp_path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text("stages:\n- name: one\n  flags: {training.steps: 3}\n  flags: {training.seed: 1}\n")
    with pytest.raises(ValueError, match="chain.yaml: flags stands twice, in lines 3 and 4"):
        read_chain(path)


def test_refused_flags(place) -> None:
    assert "no stage 'four', only one, two, three" in place.refused("--stages.four.optimizer.lr", "1")
    assert "--checkpoint.load is set by the chain itself" in place.refused("--checkpoint.load", "x")
    assert "--restart_from four must be one of" in place.refused("--restart_from", "four")


def test_a_signal_stops_the_chain_and_a_second_one_is_locked_out(place) -> None:
    (place.folder / "fault_two").write_text("wait")
    words = [sys.executable, str(TOOL), *place.words()]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        beat, deadline = place.output / "stages" / "two" / "heartbeat.json", time.monotonic() + 60
        while not beat.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        place.calls()
        assert "is in use" in place.refused()
        os.kill(process.pid, signal.SIGTERM)
        text = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by a signal at stage two; start the same command again" in text, text
    assert [stage["status"] for stage in place.summary()["stages"]] == ["finished", "interrupted", "pending"]
    (place.folder / "fault_two").unlink()
    assert place.run() == 0 and [call["stage"] for call in place.calls()] == ["two", "three"]
