"""Limits on the time and size of a whole HTTP exchange.

The time-out of ``requests`` bounds only the silence between two bytes, and ``requests`` buffers chunk headers
and trailers of any size. A server that sends a byte now and then, or endless lines, would block its client
forever.
"""

from __future__ import annotations

import io
import socket
import threading
from contextlib import suppress
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

_current: ContextVar[Watchdog] = ContextVar("watchdog")


class ReplyTooLargeError(RuntimeError):
    """A server sends more bytes than any valid reply has."""


class Watchdog:
    """A context manager that aborts an exchange after a time, whatever the exchange waits for or reads.

    It shuts down the connections that the exchange uses, so that reading from them ends; what was read must
    then be discarded, even if it looks complete. It cannot interrupt the system's resolution of a host name.

    Args:
        seconds: how long the exchange may take.

    Attributes:
        has_bitten: whether the exchange was aborted.
    """

    def __init__(self, seconds: float) -> None:
        self.has_bitten = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True

    def __enter__(self) -> Watchdog:
        self._timer.start()
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        self._timer.cancel()
        self._timer.join()
        for handle in self._sockets:
            handle.close()

    def guard(self, connection: Any) -> None:
        """Watch a socket through a duplicate, which TLS does not take over and nobody else closes.

        Raises:
            TimeoutError: the time is over.
        """
        with self._lock:
            if self.has_bitten:
                raise TimeoutError("the exchange took too long")
            self._sockets.append(socket.socket(fileno=socket.dup(connection.fileno())))

    def _bite(self) -> None:
        with self._lock:
            self.has_bitten = True
            for handle in self._sockets:
                with suppress(OSError):  # no longer connected
                    handle.shutdown(socket.SHUT_RDWR)


def watched_session(largest: int) -> requests.Session:
    """Return a session whose exchanges each run under a :class:`Watchdog`.

    It does not follow redirects, and does not read their bodies.

    Args:
        largest: most bytes of a reply, with headers and framing; more raise :class:`ReplyTooLargeError`.
    """
    import requests
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, **options)
            _watch_pools(self.poolmanager, largest)

        def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
            is_new = proxy not in self.proxy_manager
            manager = super().proxy_manager_for(proxy, **options)
            if is_new:
                _watch_pools(manager, largest)
            return manager

    class Session(requests.Session):
        def get_redirect_target(self, resp: Any) -> str | None:
            return None

    session = Session()
    # cookies would accumulate with every reply
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


def _watch_pools(manager: Any, largest: int) -> None:
    manager.pool_classes_by_scheme = {
        scheme: type(pool.__name__, (pool,), {"ConnectionCls": _watched(pool.ConnectionCls, largest)})
        for scheme, pool in manager.pool_classes_by_scheme.items()
    }


def _watched(base: Any, largest: int) -> Any:
    """Return a connection class with bounded replies, guarded by the current watchdog from the start."""

    class Connection(base):  # type: ignore[misc]
        def _new_conn(self) -> Any:
            connection = super()._new_conn()
            _current.get().guard(connection)  # handshakes and proxies' replies may drip, too
            return connection

        def putrequest(self, *args: Any, **options: Any) -> Any:
            if self.sock is not None:  # kept from an earlier exchange
                _current.get().guard(self.sock)
            return super().putrequest(*args, **options)

        def response_class(self, *args: Any, **options: Any) -> Any:
            response = base.response_class(*args, **options)
            response.fp = io.BufferedReader(_Bounded(response.fp.detach(), largest))
            return response

    return Connection


class _Bounded(io.RawIOBase):
    """A stream of at most ``left`` bytes."""

    def __init__(self, stream: Any, left: int) -> None:
        self._stream, self._left = stream, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        n_read: int | None = self._stream.readinto(buffer)
        self._left -= n_read or 0
        if self._left < 0:
            raise ReplyTooLargeError
        return n_read

    def close(self) -> None:
        self._stream.close()
        super().close()
