"""Limits of time and size on a whole HTTP exchange.

The time-out of ``requests`` bounds the silence between two bytes only, and it buffers lengths of chunks and
trailers of any size. A server that sends a byte now and then, or lines without end, would hold its client for
good.
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
    """A server sends more than any reply has."""


class Watchdog:
    """A context that breaks off an exchange that is not over in time, whatever it waits for or reads.

    It shuts down the connections that the exchange uses, so that reading from them ends; what was read then
    means nothing, even if it looks complete. Looking up a host's name is the system's, and goes on.

    Args:
        seconds: how long the exchange may take.

    Attributes:
        has_bitten: whether it was broken off.
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
        """Watch a socket by a duplicate, which TLS does not take over and nobody else closes.

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
                with suppress(OSError):  # not connected any more
                    handle.shutdown(socket.SHUT_RDWR)


def watched_session(largest: int) -> requests.Session:
    """Return a session whose exchanges each run under a :class:`Watchdog`; redirects are not followed, nor their bodies read.

    Args:
        largest: bytes of a reply as they come, with headers and framing; more are a
            :class:`ReplyTooLargeError`.
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
    # a server's cookies would grow with every reply
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
    """Return a class of connections that the current watchdog guards from the first byte on, and whose replies are bounded."""

    class Connection(base):  # type: ignore[misc]
        def _new_conn(self) -> Any:
            connection = super()._new_conn()
            _current.get().guard(connection)  # handshakes and proxies' answers may drip, too
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
    """A stream of at most so many bytes."""

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
