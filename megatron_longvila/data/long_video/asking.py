"""Many questions to an endpoint at once: what is stored is never asked again, what is useless is asked anew a few times, nothing is lost.

An answer is stored before anything looks at what it says. Whether it is useful is decided by a pure function of its text each time a stage
runs, so a run that was killed at any point goes on exactly where it was. A useless answer (no JSON, cut at the token limit, a refusal)
is asked again under the next number of try, which is part of the request's key and seed; a fault of the transport is no answer and has no
number.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from weakref import WeakValueDictionary

from megatron_longvila.data.long_video.endpoint import Client, EndpointUnusable, Refused, Unanswered
from megatron_longvila.data.long_video.prompts import Prompt
from megatron_longvila.data.long_video.records import AnswerStore, Log, WorkError, request_key

_WINDOW = 4  # questions looked ahead per thread: order is kept, so one slow answer holds back at most this much
_GIVE_UP_AFTER = 20  # questions in a row that the endpoint failed to answer: it is down, the questions are not to blame
DECLINED = "the endpoint refuses it: "


class AnswerError(ValueError):
    """An answer that cannot be used; the message is the reason in rejects."""


class Missing(RuntimeError):
    """What a question shows cannot be read now: a file that is gone, a disk that fails. Says nothing about the endpoint."""


@dataclass(frozen=True)
class Sampling:
    """How the model is asked to write; part of every record and of the key of every request."""

    temperature: float = 0.2
    top_p: float = 0.6
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Asker:
    """Who is asked and how: `model` as the endpoint names it, `max_answers` useless answers end a question.

    `limit_field` is what the endpoint calls the limit of an answer's tokens; it does not shape the answer and is in no key.
    """

    model: str
    prompt: Prompt
    sampling: Sampling
    max_answers: int = 3
    concurrency: int = 8
    limit_field: str = "max_tokens"


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        item: names it in reports.
        identity: everything beside model, prompt and sampling that the answer depends on; small and JSON. No names: a renamed file
            is not asked about again.
        about: what the record needs to know beside the answer.
        content: makes the user message's content (text, or text and pictures); called only when the question is really asked. Raises
            AnswerError where it never can, Missing where it cannot now.
    """

    item: str
    identity: dict
    about: dict
    system: str
    content: Callable[[], str | list[dict]]


@dataclass(frozen=True)
class Answered:
    """A useful answer; `origin` is what goes into the record: prompt, its hash, model, sampling, number of the try."""

    value: object
    origin: dict


@dataclass(frozen=True)
class Useless:
    """All answers were useless, or the question itself could not be made; the same on every run."""

    reason: str


@dataclass(frozen=True)
class Declined:
    """The endpoint understood the question and does not take it (too long, a picture it cannot read); nothing is stored."""

    reason: str


@dataclass(frozen=True)
class Pending:
    """No answer this time; the next run asks again. `endpoint_failed`: it was asked, and no try got an answer."""

    reason: str
    endpoint_failed: bool


Outcome = Answered | Useless | Declined | Pending
Parse = Callable[[str], object]


class FaultLog:
    """Counts faults by kind over all runs of a stage."""

    def __init__(self, log: Log, stage: str):
        self._log, self._stage = log, stage
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter(record["kind"] for _, _, record in log.scan() if record.get("stage") == stage)

    def __call__(self, kind: str, detail: str) -> None:
        with self._lock:
            self.counts[kind] += 1
        self._log.append({"stage": self._stage, "kind": kind, "detail": detail})


def ask_all(
    questions: Iterable[Question], parse: Parse, asker: Asker, store: AnswerStore, client: Client
) -> Iterator[tuple[Question, Outcome]]:
    """(question, outcome) in the order of `questions`, which is read only as far ahead as there are threads to ask.

    Leaving the loop early (also by an interrupt) starts no further requests but waits for those on the way, which are paid for.

    Raises:
        EndpointUnusable: no request can succeed, or the endpoint failed many questions in a row.
        WorkError, OSError: answers cannot be stored.
    """
    one = _OneQuestion(parse, asker, store, client)
    waiting: deque[tuple[Question, Future]] = deque()
    unanswered = 0
    pool = ThreadPoolExecutor(asker.concurrency, thread_name_prefix="ask")
    try:
        questions = iter(questions)
        while True:
            while len(waiting) < _WINDOW * asker.concurrency and (question := next(questions, None)) is not None:
                waiting.append((question, pool.submit(one.ask, question)))
            if not waiting:
                return
            question, future = waiting.popleft()
            outcome = future.result()
            if not isinstance(outcome, Pending):
                unanswered = 0
            elif outcome.endpoint_failed:  # a missing file says nothing about the endpoint, neither that it fails nor that it answers
                unanswered += 1
            if unanswered >= _GIVE_UP_AFTER:
                raise EndpointUnusable(f"{unanswered} questions in a row got no answer, the last one: {outcome.reason}")
            yield question, outcome
    finally:
        client.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _OneQuestion:
    """Asks one question until its answer is useful; threads that ask the same thing at the same time share one request."""

    def __init__(self, parse: Parse, asker: Asker, store: AnswerStore, client: Client):
        self._parse, self._asker, self._store, self._client = parse, asker, store, client
        self._lock = threading.Lock()
        self._on_the_way: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # held by those who ask, and gone with them

    def ask(self, question: Question) -> Outcome:
        reasons, content = [], None
        for number in range(self._asker.max_answers):
            request = self._request(question, number)
            key = request_key(request)
            with self._turn(key):
                answer = self._store.get(key)
                if answer is None:
                    try:
                        content = question.content() if content is None else content
                        answer = self._send(question, content, number)
                    except AnswerError as error:  # the question cannot be made: its video or image does not open
                        return Useless(str(error))
                    except Missing as error:
                        return Pending(str(error), endpoint_failed=False)
                    except Unanswered as error:
                        return Pending(str(error), endpoint_failed=True)
                    except Refused as error:
                        return Declined(f"{DECLINED}{error}")
                    self._store.put(key, answer, self._asker.model)
            try:
                value = self._read(answer)
                return Answered(value, {name: part for name, part in request.items() if name != "input"} | {"answered_by": answer["model"]})
            except AnswerError as error:
                reasons.append(str(error))
        return Useless(f"{len(reasons)} useless answers: " + "; ".join(dict.fromkeys(reasons)))

    def _turn(self, key: str) -> threading.Lock:
        with self._lock:
            return self._on_the_way.setdefault(key, threading.Lock())

    def _request(self, question: Question, number: int) -> dict:
        asker = self._asker
        made_by = {"prompt": asker.prompt.name, "prompt_sha256": asker.prompt.hash, "model": asker.model}
        return {**made_by, "sampling": asdict(asker.sampling), "try": number, "input": question.identity}

    def _send(self, question: Question, content: str | list[dict], number: int) -> dict:
        sampling = asdict(self._asker.sampling)
        sampling["seed"] += number
        sampling[self._asker.limit_field] = sampling.pop("max_tokens")
        messages = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": content})
        reply = self._client.complete({"model": self._asker.model, "messages": messages, **sampling, "stream": False})
        return asdict(reply)

    def _read(self, answer: dict) -> object:
        if answer["finish_reason"] == "length":
            raise AnswerError(f"cut at max_tokens={self._asker.sampling.max_tokens}")
        if not answer["text"].strip():
            raise AnswerError("is empty")
        return self._parse(answer["text"])


def check_writable(error: OSError) -> WorkError:
    """What a full or failing disk means for the run."""
    return WorkError(f"answers cannot be stored ({error.strerror or error}); once that is solved, the same command goes on")
