"""An endpoint that fails in every way: nothing is lost, everything is counted, nothing asked twice, and the key stays where it belongs."""

import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from scripted_server import FAULTS, ScriptedServer

from megatron_longvila.data.long_video.answers import parse_caption
from megatron_longvila.data.long_video.asking import (
    Answered,
    AnswerError,
    Asker,
    Declined,
    FaultLog,
    Missing,
    Pending,
    Question,
    Sampling,
    Useless,
    ask_all,
)
from megatron_longvila.data.long_video.endpoint import Client, Endpoint, EndpointUnusable, Gate, Refused, Unanswered, _retry_after
from megatron_longvila.data.long_video.prompts import Prompt
from megatron_longvila.data.long_video.records import AnswerStore, Log

KEY = "sk-test/0123456789"
KINDS = {
    "429": "rate_limited", "500": "server_error", "503": "server_error", "timeout": "timeout", "drip": "timeout", "cut_json": "not_json",
    "html": "not_json", "dead": "connection", "dead_in_the_middle": "connection", "error_object": "not_a_completion",
    "no_text": "not_a_completion",
}  # fmt: skip


def asker(**settings) -> Asker:
    return Asker("m", Prompt("p_v1", "f" * 64, "", "Say it"), Sampling(), **{"max_answers": 3, "concurrency": 8, **settings})


def questions(texts) -> list[Question]:
    return [
        Question(f"q{number}", {"text": text}, {"number": number}, "be exact", lambda text=text: text) for number, text in enumerate(texts)
    ]


def echo(_system: str, text: str, _pictures: list) -> str:
    return f"Answer to {text}"


def run(folder: Path, server: ScriptedServer, asked: list[Question], parse=parse_caption, who: Asker | None = None, **settings):
    """(outcomes, counts of faults, stored usage)"""
    endpoint = Endpoint(server.url, **{"key": KEY, "timeout_s": 0.6, "backoff_s": 0.01, **settings})
    with AnswerStore(folder / "answers") as store, Log(folder / "faults") as log:
        faults = FaultLog(log, "caption")
        outcomes = list(ask_all(asked, parse, who or asker(), store, Client(endpoint, faults)))
        return outcomes, faults.counts, store.usage_of("m")


def test_every_fault_is_outlived_and_counted(tmp_path):
    order = {}

    def fault(digest: str, seen: int) -> str | None:
        """The first try of each question fails, in all the ways; every third question fails twice."""
        number = order.setdefault(digest, len(order))
        return FAULTS[(number + seen) % len(FAULTS)] if seen < (2 if number % 3 == 0 else 1) else None

    texts = [f"number {number}" for number in range(33)]
    with ScriptedServer(echo, fault) as server:
        outcomes, counts, usage = run(tmp_path, server, questions(texts), who=asker(concurrency=16), timeout_s=3.0)
        assert [outcome.value for _, outcome in outcomes] == [f"Answer to {text}" for text in texts]
        assert [question.item for question, _ in outcomes] == [f"q{number}" for number in range(33)]
        assert set(server.faults) == set(FAULTS)
        expected = Counter()
        for name, number in server.faults.items():
            expected[KINDS[name]] += number
        assert counts == expected and sum(counts.values()) == 44
        assert len(server.requests) == 33 + 44 and usage["answers"] == 33
        assert usage["prompt_tokens"] == sum(server.served) and usage["completion_tokens"] == 7 * 33  # each answer's number, and seven
        before = len(server.requests)
        again, counts_again, usage_again = run(tmp_path, server, questions(texts))
        assert len(server.requests) == before  # all stored: not one more
        assert again == outcomes or [o for _, o in again] == [o for _, o in outcomes]
        assert counts_again == counts and usage_again == usage  # counts live in the folder, not in the process
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()
        assert b"0123456789" not in path.read_bytes()
    assert b"Bearer [key]" in (tmp_path / "faults").read_bytes()  # the server did send it back


def test_a_server_that_echoes_the_key_into_an_answer(tmp_path):
    with ScriptedServer(lambda *_: f"The key {KEY} is nice") as server:
        outcomes, _, _ = run(tmp_path, server, questions(["a"]))
    assert outcomes[0][1].value == "The key [key] is nice"
    assert KEY.encode() not in (tmp_path / "answers").read_bytes()


def test_a_key_that_is_a_word_leaves_answers_as_they_are(tmp_path):
    with ScriptedServer(lambda *_: "The word EMPTY stands on the wall.") as server:
        outcomes, _, _ = run(tmp_path, server, questions(["a"]), key="EMPTY")
    assert outcomes[0][1].value == "The word EMPTY stands on the wall."
    with ScriptedServer(echo, lambda digest, seen: "500") as server:
        outcomes, _, _ = run(tmp_path, server, questions(["b"]), key="EMPTY", max_tries=1)
    assert "EMPTY" not in outcomes[0][1].reason and "[key]" in outcomes[0][1].reason


def test_useless_answers_are_kept_and_asked_anew_with_another_seed(tmp_path):
    said = {"never": ["", "I'm sorry, I can't", ("half a", "length")], "second": ["   ", "It is red."], "first": ["It is blue."]}
    asked = Counter()

    def answer(_system, text, _pictures):
        asked[text] += 1
        return said[text][asked[text] - 1]

    with ScriptedServer(answer) as server:
        outcomes, counts, usage = run(tmp_path, server, questions(said))
        never, second, first = (outcome for _, outcome in outcomes)
        assert isinstance(never, Useless) and never.reason == "3 useless answers: is empty; is a refusal; cut at max_tokens=1024"
        assert second.value == "It is red." and second.origin["try"] == 1
        assert first.value == "It is blue." and first.origin["try"] == 0 and first.origin["answered_by"] == "scripted"
        assert first.origin["prompt_sha256"] == "f" * 64 and first.origin["sampling"]["temperature"] == 0.2
        seeds = {body["messages"][1]["content"]: set() for body in server.bodies}
        for body in server.bodies:
            seeds[body["messages"][1]["content"]].add(body["seed"])
        assert seeds == {"never": {0, 1, 2}, "second": {0, 1}, "first": {0}}
        assert usage["answers"] == 6 and not counts
        assert [outcome for _, outcome in run(tmp_path, server, questions(said))[0]] == [never, second, first]
        assert sum(asked.values()) == 6


def test_what_changes_the_question_asks_again_and_coming_back_does_not(tmp_path):
    with ScriptedServer(echo) as server:
        one = asker()
        other = Asker("m2", one.prompt, one.sampling)
        hotter = Asker("m", one.prompt, Sampling(temperature=1.0))
        for number, who in enumerate((one, other, hotter), 1):
            run(tmp_path, server, questions(["a"]), who=who)
            assert len(server.requests) == number
        for who in (one, other, hotter):
            run(tmp_path, server, questions(["a"]), who=who)
        assert len(server.requests) == 3


def test_the_limit_of_an_answer_goes_by_the_name_that_the_endpoint_wants(tmp_path):
    with ScriptedServer(echo) as server:
        run(tmp_path, server, questions(["a"]), who=asker(limit_field="max_completion_tokens"))
        assert server.bodies[0]["max_completion_tokens"] == 1024 and "max_tokens" not in server.bodies[0]
        run(tmp_path, server, questions(["a", "b"]))
        assert len(server.requests) == 2 and server.bodies[1]["max_tokens"] == 1024 and "max_completion_tokens" not in server.bodies[1]


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path):
    with ScriptedServer(echo, delay_s=0.05) as server:
        outcomes, _, _ = run(tmp_path, server, questions(["a"] * 40))
        assert len(server.requests) == 1 and len(outcomes) == 40


def test_questions_run_side_by_side_and_are_read_no_further_ahead_than_needed(tmp_path):
    made = []

    def endless():
        for question in questions([str(number) for number in range(1000)]):
            made.append(question.item)
            yield question

    with ScriptedServer(echo, delay_s=0.05) as server, AnswerStore(tmp_path / "a") as store:
        outcomes = ask_all(endless(), parse_caption, asker(concurrency=4), store, Client(Endpoint(server.url), lambda *_: None))
        for _ in range(8):
            next(outcomes)
        outcomes.close()
        assert server.most_at_once == 4 and len(made) <= 8 + 4 * 4
        assert len(store) == len(server.requests)  # those on the way when the loop was left are stored too


def test_an_endpoint_that_is_down_stops_the_run_and_loses_nothing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(Endpoint(f"http://127.0.0.1:{port}/v1", max_tries=2, backoff_s=0.001), lambda *_: None)
    with AnswerStore(tmp_path / "a") as store, pytest.raises(EndpointUnusable, match="20 questions in a row got no answer"):
        list(ask_all(questions(map(str, range(100))), parse_caption, asker(), store, client))


def test_missing_files_do_not_stop_the_questions_after_them(tmp_path):
    def gone():
        raise Missing("cannot be read")

    asked = questions(map(str, range(60)))
    asked[10:40] = [Question(f"q{number}", {"film": number}, {}, "", gone) for number in range(10, 40)]
    with ScriptedServer(echo) as server:
        outcomes, _, _ = run(tmp_path, server, asked)
    assert [type(outcome) for _, outcome in outcomes] == [Answered] * 10 + [Pending] * 30 + [Answered] * 20 and len(server.requests) == 30


def test_open_questions_stay_open_and_refused_ones_are_not_repeated(tmp_path):
    with ScriptedServer(echo, lambda digest, seen: "500") as server:
        outcomes, counts, _ = run(tmp_path, server, questions(["a", "b"]), max_tries=3)
        assert all(isinstance(outcome, Pending) and "HTTP 500" in outcome.reason for _, outcome in outcomes)
        assert counts == {"server_error": 6} and len(server.requests) == 6
    with ScriptedServer(echo, lambda digest, seen: "400") as server:
        outcomes, _, _ = run(tmp_path, server, questions(["a"]))
        assert isinstance(outcomes[0][1], Declined) and "HTTP 400" in outcomes[0][1].reason and len(server.requests) == 1
    with ScriptedServer(echo) as server:
        outcomes, counts, _ = run(tmp_path, server, questions(["a", "b"]))
        assert [outcome.value for _, outcome in outcomes] == ["Answer to a", "Answer to b"]
        assert counts == {"server_error": 6, "refused": 1}


@pytest.mark.parametrize("status", ["401", "403", "404", "302"])
def test_wrong_settings_end_the_run_at_once_and_the_key_is_not_shown(tmp_path, status):
    with ScriptedServer(echo, lambda digest, seen: status) as server:
        with pytest.raises(EndpointUnusable, match=f"HTTP {status}") as error:
            run(tmp_path, server, questions(["a"]))
        assert len(server.requests) == 1 and KEY not in str(error.value) and "[key]" in str(error.value)


def test_an_answer_without_text_is_an_answer_and_is_counted(tmp_path):
    """A content filter, or a thought that takes all tokens, leaves no text: asked anew with other seeds, then given up, and paid for."""
    said = {
        "filtered": (None, "content_filter"),
        "cut": (None, "length"),
        "parts": [{"type": "text", "text": "It "}, {"type": "image_url"}, {"type": "text", "text": "rains."}],
    }
    with ScriptedServer(lambda _system, text, _pictures: said[text]) as server:
        outcomes, counts, usage = run(tmp_path, server, questions(said))
        assert [type(outcome) for _, outcome in outcomes] == [Useless, Useless, Answered]
        assert outcomes[2][1].value == "It rains." and not counts
        assert len(server.requests) == usage["answers"] == 3 + 3 + 1 and usage["completion_tokens"] == 7 * 7


def test_a_key_that_has_proved_good_may_be_refused_one_question(tmp_path):
    with ScriptedServer(echo, lambda digest, seen: "403" if server.requests[2:3] == [digest] else None) as server:
        outcomes, counts, _ = run(tmp_path, server, questions("abcd"), who=asker(concurrency=1))
        assert [type(outcome) for _, outcome in outcomes] == [Answered, Answered, Declined, Answered]
        assert "HTTP 403" in outcomes[2][1].reason and KEY not in outcomes[2][1].reason and counts == {"refused": 1}
    with ScriptedServer(echo, lambda digest, seen: "403") as server:
        client = Client(Endpoint(server.url), lambda *_: None, proven=True)
        for _ in range(10):
            with pytest.raises(Refused):
                client.complete({})
        with pytest.raises(EndpointUnusable, match="403 to everything"):
            client.complete({})


def test_the_rate_is_kept_and_a_pause_holds_for_all(tmp_path):
    with ScriptedServer(echo) as server:
        run(tmp_path, server, questions(map(str, range(7))), requests_per_minute=1200)
        assert server.times[-1] - server.times[0] >= 6 * 0.05 - 0.02  # seven requests are six gaps of 50 ms
    pauses = []
    client = Client(Endpoint(server.url), lambda *_: None)
    client._gate.pause(0.15)
    start = time.monotonic()
    threads = [threading.Thread(target=lambda: (client._gate.wait(), pauses.append(time.monotonic() - start))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(pauses) >= 0.14


def test_a_pause_holds_for_threads_that_sleep_already_and_after_the_last_try():
    gate = Gate(600, threading.Event())  # a request each 100 ms
    gate.wait()
    passed = []
    sleeper = threading.Thread(target=lambda: (gate.wait(), passed.append(time.monotonic())))
    start = time.monotonic()
    sleeper.start()
    time.sleep(0.02)
    gate.pause(0.4)
    sleeper.join()
    assert passed[0] - start >= 0.4

    client = Client(Endpoint("http://localhost:1/v1", max_tries=1), lambda *_: None)
    client._exchange = lambda data: (429, {"Retry-After": "30"}, b"busy")
    with pytest.raises(Unanswered, match="HTTP 429"):
        client.complete({"messages": []})
    assert client._gate._paused_until > time.monotonic() + 20


def test_retry_after():
    assert _retry_after("3") == 3 and _retry_after("1e9") == 600 and _retry_after("-5") == 0
    assert _retry_after(None) is None and _retry_after("soon") is None and _retry_after("nan") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_stopped_run_does_not_wait_out_its_back_off(tmp_path):
    with ScriptedServer(echo, lambda digest, seen: "500") as server:
        client = Client(Endpoint(server.url, backoff_s=100.0), lambda *_: client.stop.set())
        with pytest.raises(Unanswered, match="stopped"):
            client.complete({"messages": [{"role": "user", "content": "a"}]})


def test_too_long_an_answer_is_a_fault(monkeypatch):
    monkeypatch.setattr("megatron_longvila.data.long_video.endpoint.MAX_REPLY_BYTES", 1000)
    heard = []
    with ScriptedServer(lambda *_: "x" * 5000) as server, pytest.raises(Unanswered, match="more than 1000 bytes"):
        Client(Endpoint(server.url, max_tries=1), lambda kind, detail: heard.append(kind)).complete(
            {"messages": [{"role": "user", "content": ""}]}
        )
    assert heard == ["not_a_completion"]


def test_a_question_that_cannot_be_made_is_useless(tmp_path):
    def content():
        raise AnswerError("is empty (0 bytes)")

    with ScriptedServer(echo) as server:
        outcomes, _, _ = run(tmp_path, server, [Question("a.mp4#0", {}, {}, "", content), *questions(["b"])])
        assert outcomes[0][1] == Useless("is empty (0 bytes)") and isinstance(outcomes[1][1], Answered)


@pytest.mark.parametrize("url", ["ftp://host/v1", "localhost:8000/v1", "http://user:pw@host/v1", "http://host/v1?key=abc", "http://"])
def test_addresses_that_are_refused(url):
    with pytest.raises(ValueError, match="--endpoint must be") as error:
        Endpoint(url)
    assert "pw" not in str(error.value) and "abc" not in str(error.value)


def test_a_key_that_cannot_be_a_header_is_refused_unseen():
    for key in ("sk-\n", "sk-ä123", "a b c d", "sk"):
        with pytest.raises(ValueError, match="key must be") as error:
            Endpoint("http://h/v1", key=key)
        assert key not in str(error.value)
    assert KEY not in repr(Endpoint("http://h/v1", key=KEY))


def test_a_refusal_is_counted_and_not_tried_again():
    heard = []
    with ScriptedServer(echo, lambda digest, seen: "422") as server, pytest.raises(Refused, match="HTTP 422"):
        Client(Endpoint(server.url), lambda kind, _: heard.append(kind)).complete({"messages": [{"role": "user", "content": "a"}]})
    assert heard == ["refused"] and len(server.requests) == 1
