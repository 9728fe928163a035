"""Who may use the server: whoever has the token, from this page, under a name that is this machine's."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.core.numbers import counted

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_BODY = 2**20
"""Bytes of a request that are read: a prompt fills a context window with less."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every response; the page itself has a content security policy as well."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    message: str


@dataclass(frozen=True)
class Guard:
    """The rules.

    Attributes:
        token: what has to be known.
        port: part of the cookie's name, because cookies do not tell ports apart.
        open: the server can be reached from other machines, so their addresses for this one are accepted too.
    """

    token: str = field(repr=False)
    port: int = 0
    open: bool = False

    @property
    def cookie(self) -> str:
        """Name of the cookie that holds the token."""
        return f"workbench-{self.port}"

    def knows(self, given: str | None) -> bool:
        """Whether this is the token; takes as long for any wrong one."""
        return hmac.compare_digest((given or "").encode(), self.token.encode())

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, str], cookies: Mapping[str, str]
    ) -> Refusal | None:
        """Why a request is refused, or None if it is not.

        A name that is not this machine's is how another site's page reaches a local server (DNS rebinding); a foreign
        origin is how it makes the browser send the cookie.
        """
        host = headers.get("host", "")
        if not is_own_name(host, everyone=self.open):
            return Refusal(421, f"This server does not answer to the name {host[:80]!r}. Use the address it printed.")
        origin = headers.get("origin")
        if method != "GET" and origin is not None and origin.partition("://")[2] != host:
            return Refusal(403, "Another page asked. Use the page at the address that was printed.")
        if self.knows(cookies.get(self.cookie)) or (path == "/" and self.knows(query.get("token"))):
            return None
        return Refusal(401, "No token, or another one. Open the address that `workbench serve` printed.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_own_name(host: str, *, everyone: bool = False) -> bool:
    """Whether a Host header names this machine; the port is free, because tunnels change it.

    An address can't be rebound to another machine as a name can.

    >>> [is_own_name(host) for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "evil.example", "10.0.0.1")]
    [True, True, True, False, False]
    >>> is_own_name("10.0.0.1:80", everyone=True), is_own_name("evil.example", everyone=True)
    (True, False)
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if is_loopback(name):
        return True
    if not everyone:
        return False
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return bool(name) and name.lower() in {socket.gethostname().lower(), socket.getfqdn().lower()}


class GuardedApp:
    """Applies a guard to an application: refused requests do not reach it, and every answer has `HEADERS`."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets it through."""
        from starlette.requests import HTTPConnection
        from starlette.responses import JSONResponse

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asked = HTTPConnection(scope)
        refusal = self._guard.refusal(
            scope.get("method", ""), asked.url.path, asked.headers, asked.query_params, asked.cookies
        )
        if scope["type"] != "http":
            refusal = Refusal(403, "This server has no sockets. Use the page at the address that was printed.")

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        if refusal is None:
            await self._app(scope, _limited(receive), with_headers)
        elif scope["type"] == "http":
            await JSONResponse({"error": refusal.message}, refusal.status)(scope, receive, with_headers)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})


def _limited(receive: Receive) -> Receive:
    """The request's messages, until they hold more than is read."""
    from starlette.exceptions import HTTPException

    size = 0

    async def limited() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, f"The request has more than {counted(MAX_BODY, 'bytes')}")
        return message

    return limited
