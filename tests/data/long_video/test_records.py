"""The store under kills: whatever is cut, what was whole stays, nothing else appears, and the next line is whole."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from programs import environment

from megatron_longvila.data.long_video import records
from megatron_longvila.data.long_video.records import AnswerStore, Log, WorkError, read_stage, request_key, work_folder, write_stage


def answer(text: str, tokens: int = 3) -> dict:
    return {"text": text, "finish_reason": "stop", "model": "m", "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}


def test_a_log_cut_at_every_byte_keeps_exactly_the_whole_lines(tmp_path):
    whole = tmp_path / "whole"
    with AnswerStore(whole) as store:
        for number in range(4):
            store.put(f"k{number}", answer(f"text {number} \ud800 \u00fc\n"), "m")
    data = whole.read_bytes()
    for size in range(len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:size])
        kept = data[:size].count(b"\n")
        with AnswerStore(path) as store:
            assert len(store) == kept == store.usage_of("m")["answers"]
            assert [store.get(f"k{number}") for number in range(kept)] == [answer(f"text {n} \ud800 \u00fc\n") for n in range(kept)]
            store.put("next", answer("after"), "m")
        with AnswerStore(path) as store:
            assert len(store) == kept + 1 and store.get("next") == answer("after")


def test_a_last_line_longer_than_the_search_window_is_dropped(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"a":1}\n' + b"x" * 200_000)
    with Log(path) as log:
        assert [record for _, _, record in log.scan()] == [{"a": 1}]
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    with AnswerStore(tmp_path / "log") as store:
        store.put("a", answer("one"), "m")
        with monkeypatch.context() as patch:
            patch.setattr(records.os, "pwrite", _writes_then_fails(os.pwrite))
            with pytest.raises(OSError, match="No space"):
                store.put("b", answer("two"), "m")
        assert "b" not in store
        store.put("c", answer("three"), "m")
    with AnswerStore(tmp_path / "log") as store:
        assert [key in store for key in "abc"] == [True, False, True]


def _writes_then_fails(real):
    calls = []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[:10], offset)

    return pwrite


def test_a_damaged_line_is_named_and_never_skipped(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"key":"a"\n{"key":"b","answer":{"usage":null}}\n')
    with pytest.raises(WorkError, match="line 1 is damaged"):
        AnswerStore(path)
    path.write_bytes(b'{"key":"a"}\n')
    with pytest.raises(WorkError, match="no answer"):
        AnswerStore(path)


def test_threads_do_not_mix_their_lines(tmp_path):
    with AnswerStore(tmp_path / "log") as store:
        threads = [
            threading.Thread(target=lambda t=t: [store.put(f"{t}-{n}", answer("x" * (100 * t + n)), "m") for n in range(25)])
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with AnswerStore(tmp_path / "log") as store:
        assert len(store) == 200 and all(store.get(f"{t}-{n}") == answer("x" * (100 * t + n)) for t in range(8) for n in range(25))
        assert store.usage_of("m") == {"answers": 200, "answers_without_usage": 0, "prompt_tokens": 600, "completion_tokens": 200}


WRITER = """
import sys
from pathlib import Path
from megatron_longvila.data.long_video.records import AnswerStore
with AnswerStore(Path(sys.argv[1])) as store:
    number = len(store)
    while True:
        store.put(f"k{number}", {"text": "x" * 5000, "finish_reason": "stop", "model": "m", "usage": None}, "m")
        print(number, flush=True)
        number += 1
"""


def test_what_was_acknowledged_before_kill_9_is_there(tmp_path):
    path = tmp_path / "log"
    acknowledged = -1
    for round_number in range(4):
        words = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                acknowledged = int(line)
                if acknowledged >= 7 * (round_number + 1):
                    process.send_signal(signal.SIGKILL)
                    break
        with AnswerStore(path) as store:
            assert all(f"k{number}" in store for number in range(acknowledged + 1))
            assert len(store) <= acknowledged + 3  # what was stored between the last line read and the kill
            assert store.usage_of("m")["answers_without_usage"] == len(store)


def test_a_key_depends_on_everything_and_on_nothing_else():
    base = {"prompt": "p", "model": "m", "sampling": {"seed": 0}, "try": 0, "input": {"text": "a\ud800"}}
    keys = {request_key(base), *(request_key({**base, name: "other"}) for name in base)}
    assert len(keys) == 1 + len(base)
    assert request_key(json.loads(json.dumps(base))) == request_key(base)


def test_stage_files_are_refused_when_they_or_their_sources_change(tmp_path):
    def write(stage: str, value: int, *sources: str) -> None:
        write_stage(tmp_path, stage, [{"v": value}], [], {}, sources=[tmp_path / f"{name}.jsonl" for name in sources])

    write("a", 1)
    write("b", 2, "a")
    write("c", 3, "b")
    assert list(read_stage(tmp_path, "c")) == [{"v": 3}]
    write("a", 5)
    for stage in "bc":
        with pytest.raises(WorkError, match="a.jsonl has changed since `b` ran; run `b` again"):
            list(read_stage(tmp_path, stage))
    write("b", 2, "a")
    assert list(read_stage(tmp_path, "c")) == [{"v": 3}]  # b says the same as before, so c still holds
    (tmp_path / "a.report.json").unlink()  # as a kill leaves it
    for stage in "bc":
        with pytest.raises(WorkError, match="`a` has not finished"):
            list(read_stage(tmp_path, stage))
    write("a", 5)
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(WorkError, match="is not what `c` wrote"):
        list(read_stage(tmp_path, "c"))
    with pytest.raises(WorkError, match="`d` has not finished"):
        list(read_stage(tmp_path, "d"))


def test_a_stage_that_fails_among_its_records_leaves_the_earlier_one(tmp_path):
    write_stage(tmp_path, "a", [{"v": 1}], [], {}, sources=[])

    def records():
        yield {"v": 2}
        raise WorkError("the endpoint is gone")

    with pytest.raises(WorkError, match="gone"):
        write_stage(tmp_path, "a", records(), [], {}, sources=[])
    assert list(read_stage(tmp_path, "a")) == [{"v": 1}] and not list(tmp_path.glob("*.tmp"))


def test_records_are_written_one_by_one(tmp_path):
    tracemalloc.start()
    try:
        report = write_stage(tmp_path, "a", ({"v": f"{number:01000}"} for number in range(5000)), [], {}, sources=[])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.jsonl").stat().st_size == 5000 * 1009 and peak < 1 << 20
    assert report["hash"] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()


def test_usage_is_of_the_model_that_was_asked(tmp_path):
    with AnswerStore(tmp_path / "log") as store:
        store.put("a", answer("one", 5), "cheap")
        store.put("b", answer("two", 7), "dear")
    with open(tmp_path / "log", "a") as file:
        file.write(json.dumps({"key": "c", "answer": answer("three", 11)}) + "\n")  # of before the store knew who was asked
    with AnswerStore(tmp_path / "log") as store:
        assert store.usage_of("dear")["prompt_tokens"] == 7 and store.usage_of("nobody")["answers"] == 0
        assert {name: usage["prompt_tokens"] for name, usage in store.usage_without("dear").items()} == {"cheap": 5, "m": 11}


def test_one_run_at_a_time_and_only_in_its_own_folder(tmp_path):
    with work_folder(tmp_path / "work"), pytest.raises(WorkError, match="another run"), work_folder(tmp_path / "work"):
        pass
    with work_folder(tmp_path / "work"):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(WorkError, match="did not write"), work_folder(tmp_path / "mine"):
        pass
    with pytest.raises(WorkError, match="is a file"), work_folder(Path(__file__)):
        pass
