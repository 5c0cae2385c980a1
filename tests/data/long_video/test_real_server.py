"""A server that is not ours, with a tiny random model that sees: the protocol works; answers that are of no use are kept and counted."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from films import Scene, make_film
from hf_models import PATCH_SIZE, VOCAB_SIZE, save_llava
from media import image_bytes
from programs import ROOT, environment, load_script, read_lines
from scripted_server import ScriptedServer

pytestmark = pytest.mark.end_to_end

tool = load_script(ROOT / "tools" / "build_long_video_sft.py")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@contextlib.contextmanager
def transformers_serve(model: Path) -> Iterator[str]:
    """`transformers serve` on a free port; yields its base address once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    words = [program, "serve", model, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    settings = environment() | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = model.parent / "serve.log"
    with open(log, "wb") as file, subprocess.Popen(list(map(str, words)), env=settings, stdout=file, stderr=file) as process:
        try:
            end = time.monotonic() + 180
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def save_vlm(folder: Path) -> Path:
    """A LLaVA of random weights that takes any number of pictures, 16 tokens each. One token in eight ends its answer."""
    from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, LlavaProcessor  # slow, and collecting tests needs none

    save_llava(folder)
    parts = {"image_processor": AutoImageProcessor.from_pretrained(folder), "tokenizer": AutoTokenizer.from_pretrained(folder)}
    settings = {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    LlavaProcessor(**parts, **settings, chat_template=TEMPLATE, num_additional_image_tokens=0).save_pretrained(folder)
    GenerationConfig(eos_token_id=list(range(0, VOCAB_SIZE, 8)), pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """(address, name of the model)"""
    model = save_vlm(tmp_path_factory.mktemp("real") / "model")
    with transformers_serve(model) as url:
        yield url, str(model)


@pytest.fixture
def films(tmp_path) -> Path:
    for colour in ("red", "blue"):
        make_film(tmp_path / "films" / f"{colour}.mp4", [Scene(colour, 10), Scene("white", 10)])
    return tmp_path / "films"


def asking(server: tuple[str, str]) -> list[str]:
    url, model = server
    return ["--endpoint", url, "--model", model, "--max_tokens", "24", "--max_answers", "2", "--concurrency", "2"]


def check_counts(work: Path, stage: str, num_questions: int, least_prompt_tokens: int) -> list[dict]:
    """Every question ends as a record or a reject, every answer is stored and counted. Returns the records."""
    report = json.loads((work / f"{stage}.report.json").read_text())
    records, rejects = (read_lines(work / f"{stage}{end}.jsonl") for end in ("", ".rejects"))
    assert report["questions"] == num_questions == len(records) + len(rejects) and report["faults"] == {}
    assert all("useless answers" in row["reason"] for row in rejects)
    answers = len(read_lines(work / "answers" / f"{stage}.jsonl"))
    assert report["usage"]["answers"] == answers == 2 * len(rejects) + sum(record["origin"]["try"] + 1 for record in records)
    assert report["usage"]["answers_without_usage"] == 0 and report["usage"]["prompt_tokens"] > answers * least_prompt_tokens
    assert 0 < report["usage"]["completion_tokens"] <= answers * 24
    return records


def test_pictures_to_a_random_model(server, films, tmp_path, capsys):
    """Clips of eight frames and single pictures reach the model as tokens. What it says of them may be words, but no caption is damaged."""
    work, folder = ["--work", str(tmp_path / "work")], tmp_path / "work"
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(image_bytes(number))
    assert tool.main(["segment", *work, "--videos", str(films)]) == 0
    caption, relabel = ["caption", *work, *asking(server)], ["caption", *work, *asking(server), "--images", str(images)]
    assert tool.main(caption) == 0, capsys.readouterr().err
    assert tool.main(relabel) == 0, capsys.readouterr().err
    captions = [record["caption"] for record in check_counts(folder, "caption", 4, 8 * 16)]
    captions += [record["conversations"][1]["value"] for record in check_counts(folder, "images", 3, 16)]
    assert all("\ufffd" not in caption and any(map(str.isalpha, caption)) for caption in captions)
    before = [(folder / "answers" / f"{stage}.jsonl").read_bytes() for stage in ("caption", "images")]
    assert tool.main(caption) == 0 and tool.main(relabel) == 0
    assert [(folder / "answers" / f"{stage}.jsonl").read_bytes() for stage in ("caption", "images")] == before


def test_captions_to_a_random_model(server, films, tmp_path, capsys):
    """Summaries and questions asked over true captions; nothing of what comes back can be exported."""
    work = ["--work", str(tmp_path / "work")]
    with ScriptedServer() as scripted:
        assert tool.main(["segment", *work, "--videos", str(films)]) == 0
        assert tool.main(["caption", *work, "--endpoint", scripted.url, "--model", "scripted"]) == 0
    for stage in ("summarize", "qa"):
        assert tool.main([stage, *work, *asking(server)]) == 0, capsys.readouterr().err
        assert check_counts(tmp_path / "work", stage, 2, 100) == []
    nobody = ["--endpoint", "http://127.0.0.1:1/v1", "--max_tries", "1"]  # what is stored answers for a server that is gone
    assert all(tool.main([stage, *work, *asking(server), *nobody]) == 0 for stage in ("summarize", "qa"))
    assert tool.main(["filter", *work]) == 0
    assert tool.main(["export", *work]) == 1
    assert "nothing to export" in capsys.readouterr().err
