"""A server that is not ours, with a tiny random model: the protocol works, and answers that mean nothing are kept, counted and refused."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from films import Scene, make_film
from hf_models import save_llm
from programs import ROOT, environment, load_script, read_lines
from scripted_server import ScriptedServer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


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
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.mark.end_to_end
def test_a_random_model_behind_transformers_serve(tmp_path, capsys):
    tool = load_script(ROOT / "tools" / "build_long_video_sft.py")
    model = save_llm(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    for colour in ("red", "blue"):
        make_film(tmp_path / "films" / f"{colour}.mp4", [Scene(colour, 10), Scene("white", 10)])
    work = ["--work", str(tmp_path / "work")]
    with ScriptedServer() as server:
        assert tool.main(["segment", *work, "--videos", str(tmp_path / "films")]) == 0
        assert tool.main(["caption", *work, "--endpoint", server.url, "--model", "scripted"]) == 0
    with transformers_serve(model) as url:
        asking = [*work, "--endpoint", url, "--model", str(model), "--max_tokens", "24", "--max_answers", "2", "--concurrency", "2"]
        assert tool.main(["summarize", *asking]) == 0, capsys.readouterr().err
        assert tool.main(["qa", *asking]) == 0
    for stage in ("summarize", "qa"):
        report = json.loads((tmp_path / "work" / f"{stage}.report.json").read_text())
        assert report["records"] == 0 and report["rejected"] == 2 and report["faults"] == {}
        assert report["usage"]["answers"] == 4 and report["usage"]["answers_without_usage"] == 0
        assert report["usage"]["prompt_tokens"] > 400 and 0 < report["usage"]["completion_tokens"] <= 4 * 24
        assert all("useless answers" in row["reason"] for row in read_lines(tmp_path / "work" / f"{stage}.rejects.jsonl"))
    # the server is gone: what is stored answers for it
    assert tool.main(["summarize", *asking]) == 0 and tool.main(["qa", *asking]) == 0
    assert tool.main(["filter", *work]) == 0
    assert tool.main(["export", *work]) == 1
    assert "nothing to export" in capsys.readouterr().err
