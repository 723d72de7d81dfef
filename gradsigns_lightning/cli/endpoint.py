"""An endpoint whose errors say where it is and what it answered."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from torch import Tensor

from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.extraction.oracles import HttpOracle, OracleError
from gradsigns_lightning.extraction.oracles.protocols import Json

if TYPE_CHECKING:
    import requests

_SHOWN = 200  # characters of an answer


class Endpoint(HttpOracle):
    """As :class:`HttpOracle`, for the command line; arguments are the same."""

    def __init__(self, url: str, *arguments: Any, **settings: Any) -> None:
        super().__init__(url, *arguments, **settings)
        self._answer = b""
        self._session.hooks["response"].append(self._read_refusal)

    def __call__(self, images: Tensor) -> Json:
        """Return scores or labels of raw images ``(n, C, H, W)``, float32.

        Raises:
            OracleError: the endpoint does not give them.
        """
        try:
            return super().__call__(images)
        except OracleError as error:
            answer = self._answer.decode("utf-8", "replace").strip()
            said = f" It answered: '{printable(answer, limit=_SHOWN)}'." if answer else ""
            raise OracleError(f"`endpoint` {without_credentials(self._url)}: {error}{said}") from error

    def _attempt(self, method: str, url: str, body: Json) -> tuple[bytes | None, str, float]:
        self._answer = b""
        content, reason, wait = super()._attempt(method, url, body)
        self._answer = self._answer if content is None else content[: 4 * _SHOWN]
        return content, reason, wait

    def _read_refusal(self, response: requests.Response, *_: Any, **__: Any) -> None:
        if not response.ok and "Content-Encoding" not in response.headers:
            with suppress(Exception):  # the status is the reason; this is beside it
                self._answer = response.raw.read(4 * _SHOWN, decode_content=False)


def without_credentials(url: str) -> str:
    """Return an address without user, password, query and fragment, any of which may be a secret."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return printable(urlunsplit((parts.scheme, host, parts.path, "", "")))
    except ValueError:
        return "(no valid address)"
