"""What stands before every route: who may ask, from where, and how much may come in."""

import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/auth/", "/auth", "/auth/token")  # where a token is asked for


class TooLargeError(Exception):
    """More bytes came than are taken."""


class Guard:
    """ASGI middleware that refuses before anything is read.

    Args:
        app: what comes behind it.
        token: that every request must carry (`Authorization: Bearer TOKEN`); None where only this machine can ask.
        hosts: names under which the server is asked; another one in the header `Host` is a page of somebody else
            whose name was made to lead here (DNS rebinding). Empty takes any.
        origins: web pages, besides the server's own, that may ask, such as that of an OHIF viewer.
        max_bytes: of a request's body.
    """

    def __init__(
        self, app: App, *, token: str | None, hosts: Sequence[str], origins: Sequence[str], max_bytes: int
    ) -> None:
        self.app, self.token, self.hosts, self.origins, self.max_bytes = app, token, hosts, origins, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a sentence."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["path"], headers)
        if refusal:
            await self._drain(receive)
            await _answer(send, *refusal)
            return
        seen, more, begun = 0, True, False

        async def counted() -> dict[str, Any]:
            nonlocal seen, more
            message = await receive()
            seen += len(message.get("body", b""))
            more = bool(message.get("more_body"))
            if seen > self.max_bytes:
                raise TooLargeError
            return message

        async def noted(message: dict[str, Any]) -> None:
            nonlocal begun
            if seen > self.max_bytes and not begun:
                raise TooLargeError  # what the framework says of the error that it was given is not the reason
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except Exception:
            if seen <= self.max_bytes or begun:
                raise
            if more:  # after the last part, the next message would be the client's leaving, who waits for an answer
                await self._drain(receive)
            await _answer(send, *self._too_large())

    def refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and sentence of a request that goes no further, by its head alone."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name.strip("[]") not in self.hosts:
            return 400, f"Host {host[:100]!r} is not this server's name. Ask it under {self.hosts[0]}."
        origin = headers.get("origin")
        if origin is not None and origin not in (*self.origins, f"http://{host}", f"https://{host}"):
            return (
                403,
                f"pages of {origin[:100]} may not ask this server. Start it with --origin {origin[:100]} if they may.",
            )
        if self.token and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                return (
                    401,
                    "no valid token. Send the header Authorization: Bearer TOKEN, or log in with it as password.",
                )
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, f"Content-Length {length[:50]!r}: expected a number."
        return self._too_large() if int(length) > self.max_bytes else None

    async def _drain(self, receive: Receive) -> None:
        """Read what still comes and drop it, within bounds: a connection that is closed first hides the answer."""
        dropped = 0
        while dropped <= self.max_bytes:
            message = await receive()
            dropped += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def _too_large(self) -> tuple[int, str]:
        return (
            413,
            f"more than {self.max_bytes // 2**20} MiB were sent. Raise --max-upload-mib, or send a smaller file.",
        )


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
