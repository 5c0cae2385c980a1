"""An OpenAI-compatible server whose answers are known: it sees the colours in the pictures it is sent and says what it is scripted to.

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

from films import COLOURS, read_colour
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
            self._send(handler, 200, json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}).encode())
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
        shown = [read_colour(picture) for picture in pictures]
        order = [colour for number, colour in enumerate(shown) if number == 0 or colour != shown[number - 1]]
        words = ", ".join(COLOURS[colour][1] for colour in order)
        return f"The screen is {' and then '.join(order)} while a white square moves from left to right. The text at the top says {words}."
    lines = [(float(start), float(end), caption) for start, end, caption in LINE.findall(text)]
    return json.dumps(_summary(lines) if '"summary"' in text else _questions(lines))


def _told(caption: str) -> list[str]:
    return re.search(r"screen is ([a-z ]+) while", caption)[1].split(" and then ")


def _summary(lines: list[tuple[float, float, str]]) -> dict:
    colours = [colour for _, _, caption in lines for colour in _told(caption)]
    story = ", then ".join(colour for number, colour in enumerate(colours) if number == 0 or colour != colours[number - 1])
    return {
        "summary": f"A white square crosses the screen again and again while the colour behind it changes in this order: {story}.",
        "domain": "film",
    }


def _questions(lines: list[tuple[float, float, str]]) -> list[dict]:
    """For each line a question whose answer is its first colour, and one for each rule that a question can break."""
    made = []
    for number, (start_s, end_s, caption) in enumerate(lines):
        first, word = _told(caption)[0], COLOURS[_told(caption)[0]][1]
        kind, question, answer = [
            ("Attribute", f"Which colour does the screen have at second {start_s:g} of the film?", first.capitalize()),
            ("OCR", f"Which word can be read at the top of the screen after {start_s:g} seconds?", word),
        ][number % 2]
        made.append({"type": kind, "question": question, "answer": answer, "start_s": start_s, "end_s": end_s})
    good, last = made[0], lines[-1][1]
    return made + [
        {**good, "question": good["question"].upper() + "?!"},  # duplicate
        {**good, "question": f"Is the {good['answer']} colour of the screen the {good['answer']} one here?"},  # leak
        {**good, "question": "What happens long after the film is over?", "start_s": last + 5, "end_s": last + 9},  # span
        {**good, "question": "Where does the square begin its way in the film?", "start_s": "soon"},  # format
        {**good, "question": "Who has painted the square that moves?", "type": "Guess"},  # format
        {**good, "question": "Why does the square move over the screen?", "answer": "I'm sorry, I cannot tell."},  # refusal
        {
            **good,
            "question": "Wie heißt die Farbe, die der Bildschirm am Anfang des Films zeigt?",
            "answer": "Die Farbe ist sehr schön.",
        },  # language
        {**good, "question": "What moves <video> over the screen?", "answer": "A square."},  # marks
        {**good, "question": "What moves according to the captions?", "answer": "A white square."},  # about_the_text
        {**good, "question": "Colour?", "answer": "A white square."},  # length
    ]
