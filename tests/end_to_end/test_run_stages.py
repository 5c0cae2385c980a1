"""The recipe's stages as a user runs them in a chain: a rank is killed in every stage and a merge in its middle, and what comes out is what
an undisturbed chain gives."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from programs import ROOT, environment, read_lines, start, write_question_videos
from text_files import options, pack_lines, text, write_file

pytestmark = pytest.mark.end_to_end

STEPS, KILLED_AFTER = 14, 8
NAMES = ("alignment", "pretraining", "short_sft", "extension_256", "extension_512", "long_sft")
SCALING = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
CHAIN = f"""
name: five kinds of stages
base: [{ROOT}/examples/models/tiny.yaml]
tokenizer: tokenizer.model
flags:
  data.train: [dataset]
  data.template: plain
  data.context_length: 128
  data.global_batch_size: 2
  model.llm.vocab_size: 448
  model.llm.max_position_embeddings: 512
  model.init_std: 0.05
  optimizer.warmup_steps: 2
  training.steps: {STEPS}
  checkpoint.save_interval: 6
stages:
  - name: alignment
    flags: {{training.trainable: [projector], optimizer.lr: 0.005}}
  - name: pretraining
    flags: {{training.trainable: [projector, llm], optimizer.lr: 0.001}}
  - name: short_sft
    flags: {{training.trainable: [vision, projector, llm], optimizer.lr: 0.001}}
  - name: extension_256
    config: [extension.yaml]
    flags: {{data.train: [text_256], data.context_length: 256, model.llm.rotary_base: 40000.0}}
  - name: extension_512
    config: [extension.yaml, scaled.yaml]
    flags: {{data.train: [text_512], data.context_length: 512}}
  - name: long_sft
    config: [scaled.yaml]
    flags: {{data.video.num_frames: 16, data.context_length: 256, training.trainable: [vision, projector, llm], optimizer.lr: 0.001}}
"""
EXTENSION = "{model: {lora: {rank: 4}}, training: {trainable: [lora, llm_norms]}, optimizer: {lr: 0.005}}"
SCALED = f"{{model: {{llm: {{rotary_base: 80000.0, rope_scaling: {json.dumps(SCALING)}}}}}}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight H.264 videos with one question each, text in rows of 256 and 512 tokens, a tokenizer, and a chain file that names them by
    relative paths."""
    from megatron_longvila.data.preprocess_text import preprocess_text

    folder = tmp_path_factory.mktemp("chain")
    write_question_videos(folder)
    source = write_file(folder / "texts.jsonl", pack_lines([{"text": text(number, 150)} for number in range(16)]))
    for length in (256, 512):
        preprocess_text(options([source], folder / "tokenizer.model", folder / f"text_{length}", context_length=length))
    (folder / "chain.yaml").write_text(CHAIN)
    for name, content in (("extension", EXTENSION), ("scaled", SCALED)):
        (folder / f"{name}.yaml").write_text(content)
    return folder


def command(folder: Path, output: Path, *flags: str, torchrun: bool = False) -> list[str]:
    """The chain on two ranks. Most of a tiny stage's time goes into imports, which each of torchrun's ranks does for itself."""
    chain = ["--chain", str(folder / "chain.yaml"), "--output_dir", str(output), "--num_ranks", "2", "--parallel.ulysses_size", "2"]
    launcher = [] if torchrun else ["--launcher", f"{sys.executable} {ROOT / 'tests' / 'fork_launcher.py'} 2"]
    return [sys.executable, str(ROOT / "tools" / "run_stages.py"), *chain, *launcher, *flags]


def disturb(words: list[str], find: Callable[[int], int | None], number: int) -> tuple[int, str]:
    """Run a chain until `find` (given the chain's process id) names a process, and send that one a signal."""
    deadline = time.monotonic() + 400
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while (target := find(process.pid)) is None:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.005)
        os.kill(target, number)
        text = process.communicate(timeout=120)[0]
    return process.returncode, text


def find_rank(stage: Path) -> int | None:
    """The first rank of a stage that has done some steps."""
    beat = stage / "heartbeat.json"
    found = json.loads(beat.read_text()) if beat.exists() else {"step": 0}
    return found["pid"] if found["step"] >= KILLED_AFTER else None


def find_merge(stage: Path, chain: int) -> int | None:
    """The program that merges a stage's adapters, as soon as it has begun to write: it writes for a quarter of a second."""
    merging = None
    for child in psutil.Process(chain).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
            merging = child.pid if "merge_lora.py" in " ".join(child.cmdline()) else merging
    return merging if (stage / ".merged.partial").exists() else None


def losses(output: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(output / "stages" / name / "metrics.jsonl")]


def kill_in_every_stage(folder: Path, output: Path) -> None:
    """A chain of which each stage loses a rank, and the first extension its merge too, before it is brought to its end."""

    def status(name: str) -> str:
        return json.loads((output / "summary.json").read_text())["stages"][NAMES.index(name)]["status"]

    for name in NAMES:
        stage = output / "stages" / name
        words = command(folder, output, torchrun=name == "alignment")
        code, text = disturb(words, lambda _, stage=stage: find_rank(stage), signal.SIGKILL)
        assert code == 3 and f"error: stage {name}: training ended with exit status" in text and status(name) == "failed", text
        if name == "extension_256":
            code, text = disturb(command(folder, output), lambda chain, stage=stage: find_merge(stage, chain), signal.SIGKILL)
            assert code == 3 and f"error: stage {name}: merging its adapters ended with exit status -9" in text, text
            assert (stage / ".merged.partial").exists() and not (stage / "merged").exists() and status(name) == "failed"
    code, text = start(*command(folder, output), timeout_s=600)
    assert code == 0 and all(f"{name}: finished before" in text for name in NAMES[:-1]), text


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory) -> Path:
    """The output of an undisturbed chain."""
    output = tmp_path_factory.mktemp("whole") / "chain"
    code, text = start(*command(folder, output), timeout_s=600)
    assert code == 0 and "all 6 stages finished" in text, text
    return output


def test_killed_in_every_stage(folder: Path, whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    kill_in_every_stage(folder, killed)
    summary, again = (json.loads((output / "summary.json").read_text()) for output in (whole, killed))
    assert summary["finished"] and [stage["name"] for stage in summary["stages"]] == list(NAMES)
    for name, one, other in zip(NAMES, summary["stages"], again["stages"], strict=True):
        assert [step for step, _ in losses(whole, name)] == list(range(1, STEPS + 1))
        assert losses(killed, name) == losses(whole, name), name  # every loss of every stage, to the last bit
        for field in ("steps", "tokens", "labelled_tokens", "frames", "final_loss", "parameters", "trainable"):
            assert other[field] == one[field], (name, field)
        # Training, and a merge after it; a kill costs one more of either.
        merges = name.startswith("extension")
        assert (one["attempts"], other["attempts"]) == (1 + merges, 2 + merges + (name == "extension_256"))
        assert (one["frames"] > 0) != merges and one["tokens"] > one["labelled_tokens"] > 0

    metrics = killed / "stages" / "short_sft" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    code, text = start(*command(folder, killed), timeout_s=600)
    assert code == 0 and text.count("finished before") == 6 and metrics.stat().st_mtime_ns == before
    assert not differing(result(whole, "long_sft"), result(killed, "long_sft"))  # through the merge that was killed, too


def test_hand_over(whole: Path) -> None:
    """Each stage began with the weights of the one before, froze what it had to, and says what it is."""
    summary = json.loads((whole / "summary.json").read_text())
    stages = summary["stages"]
    alignment, pretraining, short_sft, *extensions, long_sft = stages
    assert alignment["input"] == "" and [one["input"] for one in stages[1:]] == [one["checkpoint"] for one in stages[:-1]]
    assert [one["checkpoint"] for one in stages] == [str(result(whole, name)) for name in NAMES]
    assert long_sft["checkpoint"] == summary["checkpoint"]
    counts = [stage["parameters"]["total"] for stage in stages]
    assert counts[0]["trained"] < counts[0]["frozen"] and counts[0]["trained"] < counts[1]["trained"] and counts[2]["frozen"] == 0
    assert counts[0]["trained"] + counts[0]["frozen"] == sum(counts[1].values()) == counts[2]["trained"] == counts[5]["trained"]
    for one in extensions:
        assert one["parameters"]["lora"]["frozen"] == 0 < one["parameters"]["lora"]["trained"] < one["parameters"]["total"]["frozen"]
        assert one["final_loss"] < one["first_loss"]
    assert alignment["final_loss"] < alignment["first_loss"] and short_sft["first_loss"] < alignment["first_loss"]
    assert pretraining["final_loss"] < pretraining["first_loss"]
    page = (whole / "summary.html").read_text()
    assert "<svg" in page and all(f"<td>{name}</td>" in page for name in NAMES)
    assert not re.search("<script|<link|<img|src=|@import", page)  # it needs no other file


def trained(output: Path, name: str) -> Path:
    """The checkpoint of a stage's last step."""
    return output / "stages" / name / "checkpoints" / f"step_{STEPS:07d}"


def result(output: Path, name: str) -> Path:
    """The checkpoint a stage hands on."""
    return output / "stages" / name / "merged" if name.startswith("extension") else trained(output, name)


@functools.cache
def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Bytes of every tensor on disk under VILA's name, adapters under their own."""
    from megatron_longvila.checkpoint.inspect import inspect

    facts = inspect(checkpoint)
    return {name: facts.read(name).numpy().tobytes() for name in facts.infos}


def differing(one: Path, other: Path, prefix: str = "") -> set[str]:
    """Names below `prefix` of the tensors that two checkpoints do not both have, bit for bit."""
    names = {name for checkpoint in (one, other) for name in tensors(checkpoint) if name.startswith(prefix)}
    assert names, prefix
    return {name for name in names if tensors(one).get(name) != tensors(other).get(name)}


def test_extension_changes_the_decoder_alone(whole: Path) -> None:
    """Tower and projector are bit-equal on disk after every step of stage four; adapters begin afresh on merged weights."""
    before = result(whole, "short_sft")
    for name in ("extension_256", "extension_512"):
        for checkpoint in (trained(whole, name), result(whole, name)):
            assert not differing(before, checkpoint, "vision_tower."), checkpoint
            assert not differing(before, checkpoint, "mm_projector."), checkpoint
            assert any("norm" in one for one in differing(before, checkpoint, "llm.")), checkpoint
    assert differing(before, result(whole, "long_sft"), "vision_tower.") and differing(before, result(whole, "long_sft"), "mm_projector.")

    layers = [f"llm.model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(4) for part in "qkvo"]
    input_of = {"extension_256": before, "extension_512": result(whole, "extension_256")}
    for name, started_with in input_of.items():
        under = differing(started_with, trained(whole, name), "llm.")
        assert not under & set(layers) and all("norm" in one for one in under), name  # frozen below the adapters
        assert differing(trained(whole, name), result(whole, name), "llm.") == set(layers), name  # where they are merged
        assert any(".lora." in one for one in tensors(trained(whole, name))), name
        assert not any(".lora." in one for one in tensors(result(whole, name))), name  # so the next stage's adapters are fresh ones


def test_rope_travels(whole: Path, folder: Path, tmp_path: Path) -> None:
    """Base and scaling of each stage are in its checkpoints, merged ones too, and the needle test takes them from there."""
    from megatron_longvila import config_io
    from megatron_longvila.config import RopeScaling

    scaling = RopeScaling(**SCALING)
    expected = dict.fromkeys(NAMES[:3], (10000.0, None)) | {"extension_256": (40000.0, None)}
    expected |= dict.fromkeys(NAMES[4:], (80000.0, scaling))
    for name, wanted in expected.items():
        for checkpoint in {trained(whole, name), result(whole, name)}:
            llm = config_io.load(checkpoint / "config.yaml").model.llm
            tokens = json.loads((checkpoint / "tokens.json").read_text())
            assert (llm.rotary_base, llm.rope_scaling) == wanted, checkpoint
            assert tokens["rotary_base"] == wanted[0] and tokens["rope_scaling"] == (wanted[1] and vars(scaling)), checkpoint
            assert tokens["newline_ids"] and tokens["template"] == "plain"

    needles = [{"id": one, "question": "What colour is it?", "answer": one, "facts": f"The square is {one}."} for one in ("red", "blue")]
    write_file(folder / "needles.jsonl", pack_lines(needles))
    (folder / "filler.txt").write_text("There are two circles.\n")
    code, text = start(
        sys.executable, ROOT / "tools" / "evaluate_needle.py", "--checkpoint", result(whole, "extension_512"), "--text", "--plain_text",
        "--needles", folder / "needles.jsonl", "--haystack", folder / "filler.txt", "--lengths", 400, "--depths", "0.5",
        "--trials_per_cell", 2, "--output", tmp_path / "needle",
    )  # fmt: skip
    assert code == 0 and "of 2 trials" in text, text
    llm = json.loads((tmp_path / "needle" / "settings.json").read_text())["model"]["llm"]
    assert llm["rotary_base"] == 80000.0 and llm["rope_scaling"] == vars(scaling)


def test_stopped_by_a_signal(folder: Path, tmp_path: Path) -> None:
    """SIGTERM to the chain: the running stage saves itself, the chain ends with status 0 and goes on from there."""
    stage = tmp_path / "run" / "stages" / "alignment"
    words = command(folder, tmp_path / "run", "--stages.long_sft.training.steps", "4", torchrun=True)
    code, text = disturb(words, lambda chain: chain if find_rank(stage) else None, signal.SIGTERM)
    assert code == 0 and "stopped by a signal at stage alignment" in text, text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["interrupted"] + ["pending"] * 5
    assert (stage / "interrupted").exists()
