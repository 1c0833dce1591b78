"""Files of a web server: any part of one, tried again when the network fails, with or without the server's ranges."""

import http.client
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import TypeVar

from decant.errors import UserError, refuse

TRIES = 6
FIRST_WAIT_SECONDS = 0.5
"""Before the second try; doubled for every further one."""
_LONGEST_WAIT_SECONDS = 60.0
_TIMEOUT_SECONDS = 60.0
_CHUNK = 2**20
_WINDOW = 32 * 2**20
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_Value = TypeVar("_Value")
_failures: Counter[str] = Counter()
_counting = Lock()


@dataclass(frozen=True)
class Head:
    """What a server says of a file: its bytes, where it tells; a tag that changes with it; whether it has ranges."""

    size: int | None
    tag: str
    ranges: bool


def head(url: str) -> Head:
    """Ask for one byte, and see what comes. Raises ``UserError``."""

    def ask() -> Head:
        with _open(url, "bytes=0-0") as response:
            return _head(response)

    return _persistently(url, ask)


def failures() -> Counter[str]:
    """What servers and network failed with since this was asked last, though what was asked for came in the end."""
    with _counting:
        counted = Counter(_failures)
        _failures.clear()
    return counted


def read_range(url: str, offset: int, size: int) -> bytes:
    """Some bytes of a file whose server has ranges. Raises ``UserError``, and ``OSError`` where the file is shorter."""

    def ask() -> bytes:
        with _open(url, f"bytes={offset}-{offset + size - 1}") as response:
            if response.status != 206:
                raise OSError("the server gave the whole file")
            return response.read()

    content = _persistently(url, ask) if size else b""
    if len(content) != size:
        raise OSError(None, "the file ends early")
    return content


@dataclass
class Forward:
    """A file read from its start to its end; a broken connection is opened again where it broke.

    A server without ranges is read from the start again, up to that place.
    """

    url: str
    place: int = 0
    _response: http.client.HTTPResponse | None = None
    _head: Head | None = None

    def read(self, size: int = _CHUNK) -> bytes:
        """At most so many of the next bytes; b"" at the end. Raises ``UserError``."""
        return _persistently(self.url, lambda: self._read(size))

    def close(self) -> None:
        """Give the connection back."""
        if self._response is not None:
            self._response.close()
        self._response = None

    def _read(self, size: int) -> bytes:
        try:
            if self._response is None:
                self._response = self._opened()
            content = self._response.read(size)
            if not content and self._head and self._head.size is not None and self.place < self._head.size:
                raise http.client.IncompleteRead(b"")
        except BaseException:
            self.close()
            raise
        self.place += len(content)
        return content

    def _opened(self) -> http.client.HTTPResponse:
        response = _open(self.url, f"bytes={self.place}-")
        now = _head(response)
        if self._head is not None and (now.size, now.tag) != (self._head.size, self._head.tag):
            response.close()
            raise refuse(f"data {self.url}", "it changed while it was read", allowed="a file at rest", hint="run again")
        self._head = now
        if response.status != 206:
            left = self.place
            while left:
                left -= len(response.read(min(left, _CHUNK)) or _ended())
        return response


@dataclass
class Replayed:
    """Any part of a file whose server has no ranges: it is read forward, and from its start again to go back.

    The last 32 MB stay in memory, so that parts asked for in nearly the file's order are read once.
    """

    url: str
    _stream: Forward | None = None
    _start: int = 0
    _window: bytearray = field(default_factory=bytearray)
    _lock: Lock = field(default_factory=Lock)

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the file. Raises ``UserError``, and ``OSError`` where the file is shorter."""
        with self._lock:
            if self._stream is None or offset < self._start:
                self._begin()
            while self._start + len(self._window) < offset + size:
                self._go_on(offset)
            begin = offset - self._start
            return bytes(self._window[begin : begin + size])

    def _begin(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._start, self._window = Forward(self.url), 0, bytearray()

    def _go_on(self, wanted: int) -> None:
        assert self._stream is not None
        content = self._stream.read()
        if not content:
            raise OSError(None, "the file ends early")
        self._window += content
        behind = min(len(self._window) - _WINDOW, wanted - self._start)
        if behind > 0:
            del self._window[:behind]
            self._start += behind


replayed = lru_cache(maxsize=2)(Replayed)
"""The `Replayed` of a url; of all, the two used last are kept."""


def _ended() -> bytes:
    raise http.client.IncompleteRead(b"")


def _open(url: str, wanted: str) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": wanted, "Accept-Encoding": "identity"})
    opened: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    return opened


def _head(response: http.client.HTTPResponse) -> Head:
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if response.status == 206:
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
        return Head(int(total) if total.isdecimal() else None, tag, ranges=True)
    length = response.headers.get("Content-Length") or ""
    return Head(int(length) if length.isdecimal() else None, tag, ranges=False)


def _persistently(url: str, ask: Callable[[], _Value]) -> _Value:
    """What ``ask`` gives, asked again after a while where server or network fail for a time."""
    wait = FIRST_WAIT_SECONDS
    for number in range(1, TRIES + 1):
        try:
            return ask()
        except UserError:
            raise
        except urllib.error.HTTPError as error:
            said, asked = f"HTTP {error.code} {error.reason}", error.headers.get("Retry-After") or ""
            if error.code not in _TRY_AGAIN:
                hint = "check the address, and whether it needs leave to be read"
                raise refuse(f"data {url}", said, allowed="a file that can be read", hint=hint) from None
            pause = float(asked) if asked.isdecimal() else wait
        except (OSError, http.client.HTTPException) as error:
            said, pause = f"{getattr(error, 'reason', error) or type(error).__name__}", wait
        if number < TRIES:
            with _counting:
                _failures[said] += 1
            time.sleep(min(pause, _LONGEST_WAIT_SECONDS))
            wait *= 2
    value = f"{said}, and so {TRIES} times"
    hint = "when the server is back, the same command goes on where it stopped"
    raise refuse(f"data {url}", value, allowed="a server that answers", hint=hint)
