"""An oracle behind an HTTP endpoint."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor

from gradsigns_lightning.core.utils.canonical import parse_json
from gradsigns_lightning.core.utils.checks import check_int, check_number
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.oracles.protocols import Json, WireProtocol
from gradsigns_lightning.oracles.watchdog import ReplyTooLargeError, Watchdog, watched_session

if TYPE_CHECKING:
    import requests

_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LARGEST_REPLY = 64 << 20  # bytes
_MOST_VALUES = 1 << 21  # in a reply's JSON; 32 images with 22,000 classes take a third of it
_LARGEST_TRANSFER = 2 * _LARGEST_REPLY  # in bytes, with headers and framing
_TOO_LARGE = f"The endpoint's reply is larger than {_LARGEST_REPLY >> 20} MiB."
_CHUNK = 1 << 16
_SHOWN = 200  # characters of a reply in an error message
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class OracleError(RuntimeError):
    """An endpoint cannot be reached, keeps failing, or replies with something other than scores."""


class HttpOracle:
    """Queries an HTTP endpoint for scores, and repeats requests that fail for a time.

    Transient failures (no connection, time-outs, status 408, 425, 429, 500, 502, 503 and 504) are retried
    after a growing pause, or after the time that ``Retry-After`` asks for. Redirects are not followed, so
    that images and credentials go nowhere else.

    A request thus takes at most ``(retries + 1) * timeout`` seconds plus the pauses between the attempts,
    ``pause * (2**retries - 1)`` in all, or up to ``longest_pause`` each where the server asks for it: 196
    seconds with the defaults and a silent server. Resolving the host's name adds to that, and so does each
    further address of a host that does not connect. A reply has at most 64 MiB, unpacked. All requests
    together take at most ``time_limit``.

    Args:
        url: the endpoint, ``http://`` or ``https://``.
        protocol: the endpoint's format of requests and replies: :class:`OpenInferenceProtocol`,
            :class:`MlflowProtocol` or :class:`JsonTemplate`.
        headers: sent with every request, for example ``{"Authorization": "Bearer ..."}``; never shown.
        timeout: seconds from connecting to the last byte of the reply; whatever takes longer is aborted.
        retries: repetitions of a failed request, 0 or more.
        pause: seconds before the first repetition; it doubles with each further one.
        longest_pause: longest pause in seconds; if a server asks for a longer one, the reading ends.
        time_limit: seconds after the first request from which on no other is sent; a day by default.

    Raises:
        ValueError: an argument is out of range.
        ImportError: requests is not installed.
    """

    def __init__(
        self,
        url: str,
        protocol: WireProtocol,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        pause: float = 0.5,
        longest_pause: float = 120.0,
        time_limit: float = 86_400.0,
    ) -> None:
        require("requests", extra="http")
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            # user, password and query may be secret
            shown = url.rpartition("@")[2].partition("?")[0] if isinstance(url, str) else url
            raise ValueError(f"`url` must start with http:// or https://, got {shown!r}.")
        self._url, self._protocol = url, protocol
        self._timeout = check_number("timeout", timeout, minimum=0.001)
        self._retries = check_int("retries", retries, minimum=0)
        self._pause = check_number("pause", pause, minimum=0)
        self._longest_pause = check_number("longest_pause", longest_pause, minimum=0)
        self._time_limit = check_number("time_limit", time_limit, minimum=0.001)
        self._began: float | None = None
        self._session = watched_session(_LARGEST_TRANSFER)
        self._session.headers.update({"Accept-Encoding": "gzip, deflate", **(headers or {})})
        self._prepared = False

    def __call__(self, images: Tensor) -> Json:
        """Return scores or labels of raw images ``(n, C, H, W)``, float32.

        Raises:
            OracleError: the endpoint does not return them.
        """
        images = images.detach().cpu()
        try:
            if not self._prepared:
                self._protocol.prepare(self._url, lambda url: self._exchange("GET", url, None))
                self._prepared = True
            address = self._protocol.address(self._url)
            rows: list[Any] = []
            for batch in [images] if self._protocol.batched else torch.split(images, 1):
                reply = self._exchange("POST", address, self._protocol.request(batch))
                rows += list(self._protocol.scores(reply, len(batch)))
            return rows
        except (ValueError, TypeError, RecursionError) as error:
            raise OracleError(f"The endpoint's reply cannot be used: {str(error).rstrip('.')}.") from error

    def _exchange(self, method: str, url: str, body: Json) -> Json:
        """Send a request until there is a reply, and return its JSON."""
        for attempt in range(self._retries + 1):
            self._check_time()
            content, reason, wait = self._attempt(method, url, body)
            if content is not None:
                return parse_json(content, max_bytes=_LARGEST_REPLY, max_values=_MOST_VALUES)
            wait = max(wait, self._pause * 2**attempt)
            if wait > self._longest_pause:
                raise OracleError(
                    f"The endpoint failed with {reason} and asks to wait {wait:.0f} s; try again later."
                )
            if attempt < self._retries:
                time.sleep(wait)
        raise OracleError(f"The endpoint failed {self._retries + 1} times, at last with {reason}.")

    def _check_time(self) -> None:
        self._began = time.monotonic() if self._began is None else self._began
        if time.monotonic() - self._began > self._time_limit:
            raise OracleError(
                f"The endpoint has taken longer than `time_limit`, {self._time_limit:g} s; with a journal "
                "the reading can be continued."
            )

    def _attempt(self, method: str, url: str, body: Json) -> tuple[bytes | None, str, float]:
        """Send a request once; return the content or None, the reason for None, and the seconds to wait."""
        import requests
        import urllib3

        content, reason, wait = None, "a broken connection", 0.0
        with Watchdog(self._timeout) as watchdog:
            try:
                with self._session.request(
                    method, url, json=body, timeout=self._timeout, stream=True, allow_redirects=False
                ) as response:
                    reason = f"status {response.status_code}"
                    if response.ok and not response.is_redirect:
                        content = _content(response)
                    elif response.status_code not in _RETRIED:
                        asked = "to describe its model (GET)" if method == "GET" else "the request"
                        raise OracleError(f"The endpoint refused {asked} with {reason}.")
                    wait = _retry_after(response)
            except requests.exceptions.InvalidURL as error:
                raise OracleError("The endpoint's address is not valid.") from error
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                is_late = isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError))
                reason = "a time-out" if is_late else "a broken connection"
            except ReplyTooLargeError as error:
                raise OracleError(_TOO_LARGE) from error
        return (None, "a time-out", wait) if watchdog.has_bitten else (content, reason, wait)


class Endpoint(HttpOracle):
    """An :class:`HttpOracle` for the command line, whose errors show the endpoint's address and its reply.

    A reply may contain secrets, so errors of the library, which end up in logs, do not show it. The arguments
    are those of :class:`HttpOracle`.
    """

    def __init__(self, url: str, *arguments: Any, **settings: Any) -> None:
        super().__init__(url, *arguments, **settings)
        self._reply = b""
        self._session.hooks["response"].append(self._read_refusal)

    def __call__(self, images: Tensor) -> Json:
        """Return scores or labels of raw images ``(n, C, H, W)``, float32.

        Raises:
            OracleError: the endpoint does not return them.
        """
        try:
            return super().__call__(images)
        except OracleError as error:
            reply = self._reply.decode("utf-8", "replace").strip()
            said = f" It answered: '{printable(reply, limit=_SHOWN)}'." if reply else ""
            raise OracleError(f"`endpoint` {without_credentials(self._url)}: {error}{said}") from error

    def _attempt(self, method: str, url: str, body: Json) -> tuple[bytes | None, str, float]:
        self._reply = b""
        content, reason, wait = super()._attempt(method, url, body)
        self._reply = self._reply if content is None else content[: 4 * _SHOWN]
        return content, reason, wait

    def _read_refusal(self, response: requests.Response, *_: Any, **__: Any) -> None:
        if not response.ok and "Content-Encoding" not in response.headers:
            with suppress(Exception):  # the status is the reason; the body only explains it
                self._reply = response.raw.read(4 * _SHOWN, decode_content=False)


def without_credentials(url: str) -> str:
    """Return an address without user, password, query and fragment, any of which may be a secret."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return printable(urlunsplit((parts.scheme, host, parts.path, "", "")))
    except ValueError:
        return "(no valid address)"


def _content(response: requests.Response) -> bytes:
    """Read a reply of a bounded size, also where a few bytes unpack to many."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise OracleError(
            f"The endpoint's reply has a content encoding that was not asked for: {encoding[:80]!r}."
        )
    unpacker = None if encoding == "identity" else zlib.decompressobj(_GZIP_OR_ZLIB)
    content = bytearray()
    try:
        for chunk in response.raw.stream(_CHUNK, decode_content=False):
            content += unpacker.decompress(chunk, _LARGEST_REPLY + 1 - len(content)) if unpacker else chunk
            if len(content) > _LARGEST_REPLY:
                raise OracleError(_TOO_LARGE)
    except zlib.error as error:
        raise OracleError("The endpoint's reply is compressed, and cannot be decompressed.") from error
    return bytes(content)


def _retry_after(response: requests.Response) -> float:
    """Return the seconds that ``Retry-After`` asks for (RFC 9110, section 10.2.3); 0 without that header."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    header = response.headers.get("Retry-After")
    try:
        return float(Retry().parse_retry_after(header)) if header else 0.0
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0
