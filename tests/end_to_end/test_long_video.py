"""The README's way from a folder of films to a trained stage 5, word for word: twenty films, a server that knows what it sees and fails."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from film_truth import check_caption, check_question, check_summary
from films import film_library
from programs import ROOT, environment, load_script, read_lines, start
from scripted_server import FAULTS, ScriptedServer

from megatron_longvila.data.long_video.filters import RULES
from megatron_longvila.data.long_video.prompts import QUESTION_TYPES
from megatron_longvila.data.shards import open_dataset

pytestmark = pytest.mark.end_to_end

QUICKSTART = ROOT / "examples" / "quickstart"
KEY, STEPS = "sk-0123456789abcdef", 10
QUICK_FAULTS = [fault for fault in FAULTS if fault not in ("timeout", "drip")]  # those two would wait for minutes


def fault(digest: str, seen: int) -> str | None:
    """One request in sixteen fails the first time."""
    number = int(digest[:8], 16)
    return QUICK_FAULTS[number // 16 % len(QUICK_FAULTS)] if number % 16 == 0 and not seen else None


def commands() -> str:
    """The shell commands of the README's section."""
    section = (ROOT / "README.md").read_text().split("## Long-video instruction data\n")[1].split("\n## ")[0]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def place(request, tmp_path_factory) -> tuple[Path, dict]:
    """Where the README's commands run: films, our programs, and what the quickstart leaves, after a few steps of its stage 4."""
    place = tmp_path_factory.mktemp("place")
    library, scripts = film_library(request.config.cache.mkdir("films"))
    (place / "films").symlink_to(library)
    for name in ("tools", "examples"):
        (place / name).symlink_to(ROOT / name)
    data = place / "runs" / "quickstart" / "data"
    few = [f"--{kind}_passages=8" for kind in ("short", "middle", "long")] + ["--images=8", "--albums=4", "--stories=4", "--needles=8"]
    load_script(QUICKSTART / "make_data.py").main(["--output_dir", str(data), *few, "--short_videos=4", "--long_videos=4"])
    words = ["--input", data / "passages-long.jsonl", "--tokenizer", data / "tokenizer.model", "--context_length", 512]
    code, text = start(sys.executable, ROOT / "tools" / "preprocess_text.py", *words, "--output", data / "passages")
    assert code == 0, text
    stage = {
        "name": "context_extension",
        "config": [str(QUICKSTART / "stages" / "4_context_extension.yaml")],
        "flags": {"training.steps": 5},
    }
    (place / "chain.yaml").write_text(yaml.safe_dump({"name": "stage 4", "base": [str(QUICKSTART / "model.yaml")], "stages": [stage]}))
    words = ["--chain", place / "chain.yaml", "--output_dir", data.parent / "chain", "--num_ranks", 4]
    words += ["--data.train", f"[{data / 'passages'}]", "--data.tokenizer", data / "tokenizer.model"]
    code, text = start(sys.executable, ROOT / "tools" / "run_stages.py", *words, timeout_s=900)
    assert code == 0, text
    return place, scripts


@pytest.fixture(scope="module")
def built(place) -> tuple[Path, dict, dict]:
    """(folder, scripts, counts of the server) after the commands."""
    folder, scripts = place
    block = commands()
    with ScriptedServer(fault=fault) as server:
        for port in (8000, 8001):
            block, found = re.subn(rf"http://localhost:{port}/v1", server.url, block)
            assert found
        block = block.rstrip() + f" --training.steps {STEPS} --logging.interval 1 --logging.sample_ids true\n"  # instead of a hundred
        path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
        settings = environment() | {"PATH": path, "OPENAI_API_KEY": KEY, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=settings, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert KEY not in done.stdout + done.stderr
        counts = {"requests": server.requests, "faults": server.faults}
    return folder, scripts, counts


def test_every_accepted_record_is_right(built):
    folder, scripts, _ = built
    assert len(scripts) == 20 and {round(sum(scene.duration_s for scene in scenes)) for scenes in scripts.values()} >= {120, 600}
    captions = read_lines(folder / "build" / "caption.jsonl")
    for record in captions:
        check_caption(record, scripts[record["video"]])
    kinds = Counter()
    for record in read_lines(folder / "build" / "filter.jsonl"):
        (check_summary if record["kind"] == "summary" else check_question)(record, scripts[record["video"]])
        kinds[record.get("type", "summary")] += 1
    assert kinds.pop("summary") == 20 and set(kinds) == set(QUESTION_TYPES) and kinds.total() == len(captions) > 400
    refused = json.loads((folder / "build" / "filter.report.json").read_text())["questions"]
    assert {rule: refused[rule] for rule in RULES} == {rule: 40 if rule == "format" else 20 for rule in RULES}  # as planted, no more


def test_faults_lose_nothing_and_are_counted(built):
    folder, _, counts = built
    stages = json.loads((folder / "build" / "stats.json").read_text())["stages"].values()
    assert sum(sum(stage["faults"].values()) for stage in stages) == sum(counts["faults"].values()) > 20
    answers = sum(stage["usage"]["answers"] for stage in stages)
    assert answers == len(set(counts["requests"])) and len(counts["requests"]) == answers + sum(counts["faults"].values())
    assert all(stage["rejected"] == 0 for stage in stages)
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_the_dataset_holds_what_was_accepted(built):
    folder, scripts, _ = built
    report = json.loads((folder / "data" / "long_sft" / "report.json").read_text())
    assert report["accepted"] == 40 and report["rejected"] == 0  # a summary and a question of each film
    said = {(row["id"], row["conversations"][1]["value"]) for row in read_lines(folder / "build" / "export.jsonl")}
    dataset = open_dataset(folder / "data" / "long_sft")
    assert {(sample.id, sample.conversations[1]["value"]) for sample in dataset.samples} == said
    assert len(dataset.media) == 20 and {media.num_frames for media in dataset.media.values()} == {
        round(5 * sum(scene.duration_s for scene in scenes)) for scenes in scripts.values()
    }


def test_stage_5_trains_on_it(built):
    folder, _, _ = built
    steps = read_lines(folder / "runs" / "long_sft" / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1)) and all(step["skipped_samples"] == 0 for step in steps)
    shown = Counter(name for step in steps for row in step["sample_ids"] for name in row)
    exported = {row["id"] for row in read_lines(folder / "build" / "export.jsonl")}
    assert set(shown) <= exported and len(shown) >= 20
    assert sum(step["loss"] for step in steps[-3:]) < 0.8 * sum(step["loss"] for step in steps[:3])
    settings = yaml.safe_load((folder / "runs" / "long_sft" / "config.yaml").read_text())
    assert settings["data"]["video"]["num_frames"] == 64 and settings["parallel"]["ring_size"] == 2 == settings["parallel"]["ulysses_size"]
