"""One request to an OpenAI-compatible endpoint, tried until there is an answer: faults are classified, counted and waited out.

The key goes into one header and nowhere else: it is never part of an exception, and what a server echoes of it is blotted out. Of answers
that holds for keys too long to be words; a local server's `EMPTY` is no secret, and a caption may say it.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

MAX_REPLY_BYTES = 16 << 20
_SECRET_LENGTH = 16  # characters of a key that no answer holds by chance
_MAX_HEADER_WAIT_S = 600.0
_TRY_AGAIN = {408: "timeout", 409: "server_error", 425: "server_error", 429: "rate_limited"}
_SETTINGS_WRONG = (301, 302, 303, 307, 308, 401, 402, 404, 405)
_FORBIDDEN = 403  # a wrong key; from some providers also one question that their filter does not like
_FORBIDDEN_AT_MOST = 10  # in a row, once the key has proved good


class EndpointError(RuntimeError):
    """No answer; the message is free of the key."""


class Unanswered(EndpointError):
    """Every try failed; the next run asks again."""


class Refused(EndpointError):
    """The server understood and refuses this one request (too long, an image it cannot read); asking again in this run is pointless."""


class EndpointUnusable(EndpointError):
    """No request can succeed: wrong key, model or address. The run ends."""


class _Fault(Exception):
    """A try that failed in a way that the next one may not."""

    def __init__(self, kind: str, detail: str, wait_s: float | None = None):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.wait_s = kind, wait_s


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how patiently.

    Attributes:
        url: base, such as http://localhost:8000/v1; /chat/completions is added.
        timeout_s: wall-clock limit of one try, from connecting to the last byte.
        max_tries: tries of one request before it is given up for this run.
        backoff_s: wait before the second try; doubles with each further one up to `max_backoff_s`, times a random half to one and a half.
        requests_per_minute: of all threads together; None: no limit. Retry-After of a server that is busy holds for all threads.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    max_tries: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    requests_per_minute: float | None = None

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "--endpoint must be http://HOST[:PORT]/PATH or https://..., without user, password or ?query; the key has its own variable"
            )
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable() or " " in self.key or len(self.key) < 4):
            raise ValueError("the key must be at least 4 printable ASCII characters without spaces; look at the variable that holds it")


@dataclass(frozen=True)
class Reply:
    """An answer: `usage` is {"prompt_tokens", "completion_tokens"}, or None where the server does not say."""

    text: str
    finish_reason: str
    model: str
    usage: dict | None


class Gate:
    """Lets requests through at a rate, and none while the server has asked for a pause."""

    def __init__(self, requests_per_minute: float | None, stop: threading.Event):
        self._spacing_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = self._paused_until = time.monotonic()
        self._lock, self._stop = threading.Lock(), stop

    def wait(self) -> None:
        """Returns when this thread may send; Unanswered once the run is stopping."""
        while True:
            with self._lock:
                slot = max(self._next, self._paused_until, time.monotonic())
                self._next = slot + self._spacing_s
            self.sleep(slot - time.monotonic())
            with self._lock:
                if slot >= self._paused_until:  # else the server asked for a pause while this thread slept: its turn is void
                    return

    def pause(self, wait_s: float) -> None:
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + wait_s)

    def sleep(self, wait_s: float) -> None:
        if self._stop.wait(max(0.0, wait_s)):
            raise Unanswered("the run was stopped")


class Client:
    """Asks an endpoint; used by many threads at once. `on_fault(kind, detail)` hears of every failed try, a refusal included.

    `proven`: the endpoint has answered before, in an earlier run.
    """

    def __init__(self, endpoint: Endpoint, on_fault: Callable[[str, str], None], proven: bool = False):
        self.endpoint = endpoint
        self._forbidden = 0 if proven else _FORBIDDEN_AT_MOST  # how often in a row
        self.stop = threading.Event()
        self._on_fault = on_fault
        self._gate = Gate(endpoint.requests_per_minute, self.stop)
        self._context = ssl.create_default_context() if endpoint.url.startswith("https") else None

    def complete(self, body: dict) -> Reply:
        """The answer to a chat completion request. Raises Unanswered, Refused or EndpointUnusable."""
        data = json.dumps(body, separators=(",", ":")).encode()
        for attempt in range(self.endpoint.max_tries):
            self._gate.wait()
            try:
                return self._parse(*self._exchange(data))
            except _Fault as fault:
                self._on_fault(fault.kind, self.redact(str(fault)))
                last = fault
            except Refused as refusal:
                self._on_fault("refused", str(refusal))
                raise
            if last.wait_s is not None:  # also after the last try: it holds for the others
                self._gate.pause(last.wait_s)
            if attempt + 1 < self.endpoint.max_tries:
                backoff_s = min(self.endpoint.max_backoff_s, self.endpoint.backoff_s * 2**attempt)
                self._gate.sleep(backoff_s * random.uniform(0.5, 1.5))
        raise Unanswered(self.redact(f"no answer in {self.endpoint.max_tries} tries, the last one: {last}"))

    def redact(self, text: str) -> str:
        """The text of an error without the key, however often it repeats it."""
        if self.endpoint.key:
            for spelling in (self.endpoint.key, self.endpoint.key.replace("/", "\\/")):  # some servers escape slashes in JSON
                text = text.replace(spelling, "[key]")
        return text

    def _exchange(self, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One try: status, headers and body. _Fault when the connection does not live to the end of the answer."""
        parts = urllib.parse.urlsplit(self.endpoint.url)
        kind = http.client.HTTPSConnection if self._context else http.client.HTTPConnection
        settings = {"context": self._context} if self._context else {}
        connection = kind(parts.hostname, parts.port, timeout=self.endpoint.timeout_s, **settings)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        watchdog = _Watchdog(self.endpoint.timeout_s)  # the socket's own limit starts again with every byte
        try:
            connection.connect()
            with watchdog.over(connection.sock):
                connection.request("POST", parts.path.rstrip("/") + "/chat/completions", data, headers)
                response = connection.getresponse()
                body = response.read(MAX_REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            if watchdog.fired or isinstance(error, TimeoutError):
                raise _Fault("timeout", f"no whole answer within {self.endpoint.timeout_s:g} s") from None
            raise _Fault("connection", f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if watchdog.fired:  # what it cut may look whole: http.client takes a header that ends early for an answer without a body
            raise _Fault("timeout", f"no whole answer within {self.endpoint.timeout_s:g} s")
        if response.length and len(body) <= MAX_REPLY_BYTES:  # a read with a limit does not complain about a body that ends early
            raise _Fault("connection", f"it ended {response.length} bytes before the end of the answer")
        if len(body) > MAX_REPLY_BYTES:
            raise _Fault("not_a_completion", f"the answer has more than {MAX_REPLY_BYTES} bytes")
        return response.status, response.headers, body

    def _parse(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> Reply:
        excerpt = self.redact(body.decode(errors="replace"))[:300]
        if status in _TRY_AGAIN or status >= 500:
            raise _Fault(_TRY_AGAIN.get(status, "server_error"), f"HTTP {status}: {excerpt}", _retry_after(headers.get("Retry-After")))
        if status in _SETTINGS_WRONG:
            raise EndpointUnusable(f"{self.endpoint.url} answers HTTP {status}: {excerpt}; check the address, the model's name and the key")
        if status == _FORBIDDEN:
            self._forbidden += 1
            if self._forbidden > _FORBIDDEN_AT_MOST:
                raise EndpointUnusable(f"{self.endpoint.url} answers HTTP 403 to everything: {excerpt}; check the key and what it may use")
        if status != 200:
            raise Refused(f"HTTP {status}: {excerpt}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise _Fault("not_json", f"the answer is cut or no JSON: {excerpt}") from None
        try:
            choice = answer["choices"][0]
            text, finish_reason, model = _text(choice["message"]), choice.get("finish_reason"), answer.get("model")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Fault("not_a_completion", f"the answer is no chat completion: {excerpt}") from None
        if not isinstance(text, str):
            raise _Fault("not_a_completion", f"the answer holds no text: {excerpt}")
        self._forbidden = 0
        blot = self.redact if self.endpoint.key and len(self.endpoint.key) >= _SECRET_LENGTH else str
        return Reply(blot(text), blot(str(finish_reason)), blot(str(model)), _usage(answer.get("usage")))


class _Watchdog:
    """Shuts a connection down when its time is up, so that a server which sends a byte now and then cannot hold a thread for ever."""

    def __init__(self, timeout_s: float):
        self.fired = False
        self._timeout_s = timeout_s

    @contextlib.contextmanager
    def over(self, sock: socket.socket) -> Iterator[None]:
        def fire() -> None:
            self.fired = True
            with contextlib.suppress(OSError):  # closed meanwhile: nobody waits for it any more
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which would want to say goodbye first

        timer = threading.Timer(self._timeout_s, fire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _text(message: dict) -> object:
    """What a message says: its text, or that of its parts together. "" where a filter or the limit of tokens left none: that is an answer
    too, and paid for."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return "" if content is None else content


def _usage(value: object) -> dict | None:
    if not isinstance(value, dict):
        return None
    counts = {name: value.get(name) for name in ("prompt_tokens", "completion_tokens")}
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts.values())
    return counts if whole else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3), at most ten minutes; None without a usable one."""
    if value is None:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(wait_s, 0.0), _MAX_HEADER_WAIT_S) if wait_s == wait_s else None
