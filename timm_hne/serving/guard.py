"""What stands before the application and reads the bodies of requests: whole, of a bounded size, in a bounded time."""
import asyncio
import json
import time
from collections.abc import Callable

# Bytes that are read and dropped of a body that is too large, so that its sender hears why, over the largest allowed.
_DROPPED = 4

# Bounds of the number of requests that the application has at a time.
_LEAST_INSIDE, _MOST_INSIDE = 8, 512

# Header that holds the seconds since 1970 at which all of a request was there. What clients put in it is removed.
RECEIVED = b'x-hne-received'


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: The status of HTTP.
        message: One sentence for the client.
        reason: One word for the metrics.
    """

    def __init__(self, status: int, message: str, reason: str):
        super().__init__(message)
        self.status = status
        self.reason = reason


async def send_error(send, status: int, message: str) -> None:
    """Answer a request with an error in JSON, by ASGI."""
    body = json.dumps({'error': message}).encode()
    headers = [(b'content-type', b'application/json'), (b'content-length', str(len(body)).encode())]
    if status == 503:
        headers.append((b'retry-after', b'1'))
    if status in (408, 413):
        headers.append((b'connection', b'close'))
    await send({'type': 'http.response.start', 'status': status, 'headers': headers})
    await send({'type': 'http.response.body', 'body': body})


class BodyGuard:
    """ASGI middleware that hands a request on only when all of its body is there.

    So a slow or endless sender takes nothing from the application, and there are never more than `max_total` bytes of
    bodies in memory. What the server around the application says in plain text is put into JSON as well.

    Args:
        app: The ASGI application.
        max_body: Bytes of a body at most.
        max_total: Bytes of all bodies at most that are being read or answered at a time.
        timeout: Seconds that a body may take to arrive.
        on_refused: Called with the status and the reason of each request that is refused here.
        stamp: Be the first of several guards: take nothing from clients of the header `RECEIVED`, which tells the
            application when the request arrived, and bound how many requests the application has at a time.
    """

    def __init__(
            self,
            app: Callable,
            max_body: int = 16 << 20,
            max_total: int = 256 << 20,
            timeout: float = 10.,
            on_refused: Callable[[int, str], None] | None = None,
            stamp: bool = True,
    ):
        self.app = app
        self.max_body = max_body
        self.max_total = max_total
        self.timeout = timeout
        self.on_refused = on_refused
        self.stamp = stamp
        self.held = 0
        self.inside = 0
        self.bound = float(_MOST_INSIDE)

    async def __call__(self, scope, receive, send) -> None:
        """Answer a request."""
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        body = bytearray()
        headers = [(name, value) for name, value in scope['headers'] if not self.stamp or name != RECEIVED]
        scope = {**scope, 'headers': headers}
        try:
            try:
                complete = await asyncio.wait_for(self._read(scope, receive, body), self.timeout)
            except asyncio.TimeoutError:
                raise Refused(
                    408, f'the body did not arrive within {self.timeout:.3g} seconds.', 'slow_body') from None
            body = bytes(body)  # the one that grew is let go: bodies are in memory once
            if complete:
                if all(name != RECEIVED for name, _ in headers):  # no guard before this one has said so
                    headers.append((RECEIVED, repr(time.time()).encode()))
                await self._hand_on(scope, _Exchange(body, receive, send))
        except Refused as error:
            await self._refuse(send, error)
        finally:
            self.held -= len(body)

    async def _hand_on(self, scope, exchange: '_Exchange') -> None:
        """Let the application answer, unless so many requests are in it that those before came too late.

        Refusing costs far less here than further on, where in the end all would come too late. The bound goes up by one
        for as many answers as it is, and down by a twentieth for each request that was refused there because of others.
        """
        limited = self.stamp and scope.get('method') == 'POST'
        if limited and self.inside >= self.bound:
            raise Refused(503, 'too many requests are being answered; try again later.', 'busy')
        self.inside += limited
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.inside -= limited
            if limited and exchange.status == 200:
                self.bound = min(_MOST_INSIDE, self.bound + 1 / self.bound)
            elif limited and exchange.overloaded:
                self.bound = max(_LEAST_INSIDE, 0.95 * self.bound)
        if exchange.unanswered:
            raise Refused(503, 'the service cannot take the request just now; try again.', 'unavailable')

    async def _read(self, scope, receive, body: bytearray) -> bool:
        """Read into `body`; return whether the client is still there."""
        length = next((value for name, value in scope['headers'] if name == b'content-length'), b'0')
        too_large = int(length) > self.max_body
        dropped, more = 0, True
        while more:
            message = await receive()
            if message['type'] != 'http.request':
                return False
            chunk, more = message.get('body', b''), message.get('more_body', False)
            too_large = too_large or len(body) + len(chunk) > self.max_body
            if too_large:
                self.held -= len(body)
                dropped += len(body) + len(chunk)
                body.clear()
                if dropped > _DROPPED * self.max_body:
                    break
            elif self.held + len(chunk) > self.max_total:
                raise Refused(503, 'too many requests are being received; try again later.', 'memory')
            else:
                body += chunk
                self.held += len(chunk)
        if too_large:
            raise Refused(413, f'the body must have at most {self.max_body:,} bytes.', 'large_body')
        return True

    async def _refuse(self, send, error: Refused) -> None:
        if self.on_refused is not None:
            self.on_refused(error.status, error.reason)
        await send_error(send, error.status, str(error))


class _Exchange:
    """What the application hears and says.

    It hears the body first, and then what happens to the connection. What it says is passed on, unless it is a refusal
    in plain text, which is one of the server's own: Ray Serve answers with 404 while there is no application, with 503
    if its queue is full, with 408 after a minute, and not at all if the replica that had the request is gone. In all of
    these cases the client may try again.
    """

    def __init__(self, body: bytes, receive: Callable, send: Callable):
        self._body: bytes | None = body
        self._receive = receive
        self._send = send
        self._gone = False
        self._passed = None  # whether the answer was passed on, None before there is one
        self.status: int | None = None
        self.overloaded = False  # whether it was refused because of others, and may be tried again

    @property
    def unanswered(self) -> bool:
        """Whether the client still waits for an answer."""
        return not self._passed and not self._gone

    async def receive(self) -> dict:
        """Return the next message for the application."""
        if self._body is not None:
            body, self._body = self._body, None
            return {'type': 'http.request', 'body': body, 'more_body': False}
        message = await self._receive()
        self._gone = self._gone or (message['type'] == 'http.disconnect' and not self._passed)
        return message

    async def send(self, message: dict) -> None:
        """Take a message from the application."""
        if message['type'] == 'http.response.start':
            headers = {name.lower(): value for name, value in message['headers']}
            self.status = message['status']
            ours = headers.get(b'content-type', b'').startswith(b'application/json')
            self._passed = ours or self.status not in (404, 408, 429, 500, 503)
            self.overloaded = self.status == 503 and (not ours or b'retry-after' in headers)
        if self._passed:
            await self._send(message)
