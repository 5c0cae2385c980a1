"""An OpenAI-compatible server whose answers are known: it sees what is in the pictures it is sent and says what it is scripted to.

Every request and every answer is kept. The number of an answer travels in `usage.prompt_tokens`, so a test can tell from what is stored
which requests must never be seen again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from typing import NamedTuple

import numpy as np
from films import MOVES, Seen, read_frame
from PIL import Image

LINE = re.compile(r"^\[([0-9.]+) - ([0-9.]+)\] (.*)$", re.MULTILINE)
FAULTS = ("429", "500", "503", "timeout", "drip", "cut_json", "html", "dead", "dead_in_the_middle", "error_object", "no_text")


class ScriptedServer:
    """Serves in threads while the `with` block runs.

    Args:
        answer: (system, text, pictures) -> text of the answer, or (text, finish_reason).
        fault: (digest of the request, how often it was seen before) -> one of FAULTS, a status as text, or None.
        delay_s: time an answer takes.
    """

    def __init__(self, answer: Callable | None = None, fault: Callable[[str, int], str | None] | None = None, delay_s: float = 0.0):
        self.answer = answer or tell
        self.fault = fault or (lambda digest, seen: None)
        self.delay_s = delay_s
        self.hang_s = 30.0
        self.requests: list[str] = []  # digests of the bodies in order of arrival
        self.served: dict[int, str] = {}  # number of an answer -> digest of its request
        self.faults: dict[str, int] = {}
        self.headers: list[dict] = []
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> ScriptedServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                with contextlib.suppress(ConnectionError):  # a client that was killed or has lost patience
                    server._serve(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers["Content-Length"])
        data = handler.rfile.read(size)
        if len(data) < size:  # the client was killed while it asked
            return
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            seen = self.requests.count(digest)
            self.requests.append(digest)
            self.headers.append(dict(handler.headers))
            self.bodies.append(json.loads(data))
            self.times.append(time.monotonic())
            number = len(self.requests)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            fault = self.fault(digest, seen)
            if fault:
                with self._lock:
                    self.faults[fault] = self.faults.get(fault, 0) + 1
                self._fail(handler, fault)
                return
            self._closing.wait(self.delay_s)
            with self._lock:
                self.served[number] = digest
            self._send(handler, 200, self._completion(json.loads(data), number))
        finally:
            with self._lock:
                self._at_once -= 1

    def _completion(self, body: dict, number: int) -> bytes:
        messages = {message["role"]: message["content"] for message in body["messages"]}
        content = messages["user"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True))) for url in urls]
        answer = self.answer(messages.get("system", ""), text, pictures)
        said, finish = answer if isinstance(answer, tuple) else (answer, "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish}
        usage = {"prompt_tokens": number, "completion_tokens": 7, "total_tokens": number + 7}
        return json.dumps(
            {"id": f"c{number}", "object": "chat.completion", "model": "scripted", "choices": [choice], "usage": usage}
        ).encode()

    def _fail(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        whole = json.dumps({"choices": [{"message": {"content": "never to be seen " * 9}, "finish_reason": "stop"}]}).encode()
        key = handler.headers.get("Authorization", "")
        if fault.isdigit():
            self._send(handler, int(fault), json.dumps({"error": {"message": f"no: {key}"}}).encode(), {"Retry-After": "0"})
        elif fault == "timeout":
            self._closing.wait(self.hang_s)
        elif fault == "drip":
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
            for byte in head + whole:
                handler.wfile.write(bytes([byte]))
                if self._closing.wait(0.05):
                    return
        elif fault == "cut_json":
            self._send(handler, 200, whole[: len(whole) // 2])
        elif fault == "html":
            self._send(handler, 200, b"<html>busy</html>")
        elif fault == "dead_in_the_middle":
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
        elif fault == "error_object":
            self._send(handler, 200, json.dumps({"error": {"message": f"overloaded, {key}"}}).encode())
        elif fault == "no_text":
            self._send(handler, 200, json.dumps({"choices": [{"message": {"content": {"text": 5}}, "finish_reason": "stop"}]}).encode())
        handler.close_connection = True  # "dead" says nothing at all

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict | None = None) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


def tell(_system: str, text: str, pictures: list[Image.Image]) -> str:
    """The truth about the films: captions from the pictures; a summary or questions from the lines of captions in the text."""
    if pictures:
        return _caption([read_frame(picture) for picture in pictures])
    lines = [Line(float(start), float(end), _told(caption)) for start, end, caption in LINE.findall(text)]
    return json.dumps(_summary(lines) if '"summary"' in text else _questions(lines))


class Line(NamedTuple):
    """A caption in a prompt: its span, and (colour, shape, from, to, word, place) of each shot that it tells of."""

    start_s: float
    end_s: float
    shots: list[tuple[str, ...]]


def _caption(seen: list[Seen]) -> str:
    if len(seen) == 1:
        return f"The screen is {seen[0].colour} behind a {seen[0].shape}, and the word {seen[0].word} stands at the {seen[0].place}."
    told = []
    for _, frames in groupby(seen, key=lambda frame: frame.colour):
        frames = list(frames)
        first, step = frames[0], np.subtract(frames[-1].middle, frames[0].middle)
        way = next(way for way, sign in MOVES.items() if np.dot(sign, step) > 0.99 * np.linalg.norm(step) > 0)
        told.append(
            f"the screen is {first.colour} while a {first.shape} moves from {way[0]} to {way[1]}, "
            f"and the word {first.word} stands at the {first.place}."
        )
    return " ".join(("Here" if number == 0 else "After that,") + f" {one}" for number, one in enumerate(told))


def _told(caption: str) -> list[tuple[str, ...]]:
    return re.findall(r"screen is (\w+) while a (\w+) moves from (\w+) to (\w+), and the word (\w+) stands at the (\w+)\.", caption)


def _story(lines: list[Line]) -> list[str]:
    """The colours in order; a shot that goes on in the next line counts once."""
    return [colour for colour, _ in groupby(shot[0] for line in lines for shot in line.shots)]


def _summary(lines: list[Line]) -> dict:
    shown = [(shot[0], shot[4]) for line in lines for shot in line.shots]
    story = ", then ".join(f"{colour} behind the word {word}" for (colour, word), _ in groupby(shown))
    return {"summary": f"Shapes cross the screen again and again while its colour changes in this order: {story}.", "domain": "film"}


def _questions(lines: list[Line]) -> list[dict]:
    """For each line a question of one of the seven types, and one for each rule that a question can break."""
    made = [_question(lines, number) for number in range(len(lines))]
    good, last = made[0], lines[-1].end_s
    return made + [
        {**good, "question": good["question"].upper() + "?!"},  # duplicate
        {**good, "question": good["question"].replace("?", " now?")},  # near_duplicate
        {**good, "question": f"Is the {good['answer']} colour of the screen the {good['answer']} one here?"},  # leak
        {**good, "question": "What happens long after the film is over?", "start_s": last + 5, "end_s": last + 9},  # span
        {**good, "question": "Where does the shape begin its way in the film?", "start_s": "soon"},  # format
        {**good, "question": "Who has painted the shape that moves?", "type": "Guess"},  # format
        {**good, "question": "Why does the shape move over the screen?", "answer": "I'm sorry, I cannot tell."},  # refusal
        {
            **good,
            "question": "Wie heißt die Farbe, die der Bildschirm am Anfang des Films zeigt?",
            "answer": "Die Farbe ist sehr schön.",
        },  # language
        {**good, "question": "What moves <video> over the screen?", "answer": "A square."},  # marks
        {**good, "question": "What moves according to the captions?", "answer": "A white square."},  # about_the_text
        {**good, "question": "Colour?", "answer": "A white square."},  # length
    ]


def _question(lines: list[Line], number: int) -> dict:
    """About the first shot of a line, or what comes after it."""
    line = lines[number]
    colour, shape, begin, end, word, place = line.shots[0]
    at, span = f"second {line.start_s:g} of the film", (line.start_s, line.end_s)
    following = next((later for later in range(number, len(lines)) if len(_story(lines[number : later + 1])) > 1), None)
    kinds = ["Attribute", "OCR", "Object", "Action", "Spatial", "Temporal", "Synopsis"]
    kind = kinds[number % len(kinds)]
    if kind == "Temporal" and following is None:
        kind = "Attribute"
    if kind == "Attribute":
        question, answer = f"Which colour does the screen have at {at}?", colour.capitalize()
    elif kind == "OCR":
        question, answer = f"Which word can be read on the screen at {at}?", word
    elif kind == "Object":
        question, answer = f"Which shape moves over the screen at {at}?", f"A {shape}."
    elif kind == "Action":
        question, answer = f"What does the shape do on the screen at {at}?", f"It moves from {begin} to {end}."
    elif kind == "Spatial":
        question, answer = f"Where on the screen does the word stand at {at}?", f"At the {place}."
    elif kind == "Temporal":
        question, answer = (
            f"Which colour follows the one that the screen has at {at}?",
            _story(lines[number : following + 1])[1].capitalize(),
        )
        span = (line.start_s, lines[following].end_s)
    else:
        stretch = lines[number : number + 3]
        question = f"Which colours fill the screen from second {line.start_s:g} to second {stretch[-1].end_s:g}, in order?"
        answer, span = ", then ".join(_story(stretch)).capitalize() + ".", (line.start_s, stretch[-1].end_s)
    return {"type": kind, "question": question, "answer": answer, "start_s": span[0], "end_s": span[1]}
