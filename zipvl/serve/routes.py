"""HTTP: who may ask, how a body is read, and the shapes of the answers.

    Guard: host, origin, token -> body, counted while it is read -> parse and fetch in one thread
        -> queue -> JSON, or server-sent events

Needs the packages of the extra `serve`.
"""

import asyncio
import hmac
import json
import math
import re
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn import Server as Uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..report import say
from .request import Refusal, parse
from .worker import GONE, Done, Event, Job, Worker

HEAD_SECONDS = 10.0  # a request's head has to be there
BODY_SECONDS = 60.0  # and its body
WRITE_SECONDS = 60.0  # a client reads something of an answer
CONNECTIONS = 256
SHUT_SECONDS = 5.0  # at the end, for answers that are written but not read
SMALL, LARGE = 2**20, 4  # bytes of a body that are read at once; so many larger ones at a time
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]*)(:\d*)?")


def json_response(status: int, content: object, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, allow_nan=False)  # ASCII: half a surrogate pair is no failure
    return Response(body, status, headers, "application/json")


def refused(e: Refusal) -> Response:
    headers = {"Retry-After": "1"} if e.status == 503 else {}
    if e.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(e.status, e.error(), headers)


class Guard:
    """Lets requests in that come for this host, from no foreign web page, with the token."""

    def __init__(self, app: ASGIApp, hosts: set[str] | None, token: str | None):
        """`hosts`: names that a request may call the server by; None: any."""
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope), scope["path"])
            except Refusal as e:
                await refused(e)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, headers: Headers, path: str) -> None:
        """Raises Refusal. A name that DNS turned to this machine, and a page that a browser shows,
        are no reason to answer."""
        host = HOST.fullmatch(headers.get("host", ""))
        if self.hosts is not None and (not host or host[1].lower() not in self.hosts):
            raise Refusal(403, "this server does not go by that Host: ask localhost", "Host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise Refusal(403, "this server does not answer pages of other places", "Origin")
        if self.token is not None and path != "/health":
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if kind.lower() != "bearer" or not same:
                raise Refusal(
                    401, "no valid token: send Authorization: Bearer TOKEN", None, "invalid_api_key"
                )


@dataclass
class Service:
    """What the routes answer from."""

    worker: Worker
    name: str  # of the model

    def __post_init__(self) -> None:
        self.made, self.store = int(time.time()), self.worker.store
        self.desk = ThreadPoolExecutor(1, "desk")  # reads requests one by one, beside the engine
        self.large = asyncio.Semaphore(LARGE)

    def app(self, hosts: set[str] | None, token: str | None) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
        ]
        guard = Middleware(Guard, hosts=hosts, token=token)
        faults = {HTTPException: self.unknown, Exception: self.failed}
        app = Starlette(routes=routes, middleware=[guard], exception_handlers=faults)
        app.router.redirect_slashes = False
        return app

    async def unknown(self, request: Request, e: Any) -> Response:
        asked = f"{request.method} {request.url.path:.200}"
        return refused(Refusal(e.status_code, f"{asked}: {e.detail}"))

    async def failed(self, request: Request, e: Exception) -> Response:
        return refused(Refusal(500, "the server failed: its log says why"))

    async def health(self, request: Request) -> Response:
        worker = self.worker
        status = "draining" if worker.draining else "ok"
        said = {"status": status, "queue": len(worker.queue), "running": worker.job is not None}
        return json_response(503 if worker.draining else 200, said)

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.made, "owned_by": "zipvl"}
        asked = request.path_params.get("name")
        if asked is None:
            return json_response(200, {"object": "list", "data": [model]})
        if asked != self.name:
            return refused(
                Refusal(404, f"the model {asked!r:.80} does not exist", "model", "model_not_found")
            )
        return json_response(200, model)

    async def chat(self, request: Request) -> Response:
        job = Job()
        try:
            async with AsyncExitStack() as large:
                body = await self.body(request, large)
                async with self.watched(request, job):
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self.desk, self.read, body, job)
                    del body
                    await large.aclose()
                    self.submit(job)
                    return await self.answered(job)
        except ClientDisconnect:
            return refused(Refusal(*GONE))
        except Refusal as e:
            return refused(e)

    async def body(self, request: Request, large: AsyncExitStack) -> bytes:
        """Raises Refusal before more is read than may be, ClientDisconnect."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refusal(415, "the body has to be JSON: send Content-Type: application/json")
        self.worker.admit()
        body, most, waited = bytearray(), self.store.limits.body, False

        async def expect(size: int) -> None:
            nonlocal waited
            if size > most:
                raise Refusal(413, f"the body has more than {most} bytes: send less")
            if size > SMALL and not waited:
                await large.enter_async_context(self.large)
                waited = True

        try:
            async with asyncio.timeout(BODY_SECONDS):
                await expect(int(request.headers.get("content-length", 0)))
                async for chunk in request.stream():
                    await expect(len(body) + len(chunk))
                    body += chunk
        except TimeoutError:
            raise Refusal(408, f"the body was not there after {BODY_SECONDS:g} s") from None
        return bytes(body)

    def read(self, body: bytes, job: Job) -> None:
        """What is asked, with its media as files; in the thread of the desk. Raises Refusal."""
        job.check()
        ask = parse(body, self.store.limits, self.name)
        job.media, job.placed = self.store.fetch(ask, job.check)
        job.ask = replace(ask, links=[])  # their bytes have gone to disk

    def submit(self, job: Job) -> None:
        try:
            self.worker.submit(job)
        except Refusal:
            self.store.release(job.media)
            raise

    @asynccontextmanager
    async def watched(self, request: Request, job: Job) -> AsyncIterator[None]:
        """Meanwhile, the job ends where the client leaves."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.worker.cancel(job)

        watching = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            self.worker.cancel(job)
            raise
        finally:
            watching.cancel()

    async def answered(self, job: Job) -> Response:
        """The response, once the first event says of which kind it is."""
        event, answer = await job.events.get(), Answer(job, self.name)
        if isinstance(event, Refusal):
            return refused(event)
        if job.ask.stream:
            return Stream(answer.chunks(event), self.worker, job)
        text = ""
        while isinstance(event, str):
            text += event
            event = await job.events.get()
        if isinstance(event, Refusal):
            return refused(event)
        return json_response(200, answer.whole(text, event))


class Stream(StreamingResponse):
    """Server-sent events; when they end, however they do, the job ends."""

    def __init__(self, chunks: AsyncIterator[bytes], worker: Worker, job: Job):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self.worker, self.job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.job)


class Answer:
    """OpenAI's objects for one answer."""

    def __init__(self, job: Job, name: str):
        self.job = job
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head: dict[str, Any] = {**made, "model": name}

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": done.reason
        }  # fmt: skip
        kind = {"object": "chat.completion", "choices": [choice]}
        return self.head | kind | {"usage": done.usage, "zipvl": done.zipvl}

    async def chunks(self, event: Event) -> AsyncIterator[bytes]:
        """From the first event on: the role, texts, why it ended, usage if it was asked for."""
        yield self.chunk({"role": "assistant", "content": ""})
        while isinstance(event, str):
            yield self.chunk({"content": event})
            event = await self.job.events.get()
        if isinstance(event, Refusal):
            yield sent(event.error())
            return
        yield self.chunk({}, event.reason, zipvl=event.zipvl)
        if self.job.ask.usage:
            usage = {"choices": [], "usage": event.usage}
            yield sent(self.head | {"object": "chat.completion.chunk"} | usage)
        yield b"data: [DONE]\n\n"

    def chunk(self, delta: dict[str, str], reason: str | None = None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.job.ask.usage else {}
        kind = {"object": "chat.completion.chunk", "choices": [choice]}
        return sent(self.head | kind | usage | more)


def sent(content: object) -> bytes:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()


class Protocol(H11Protocol):
    """uvicorn's connection, not for ever: not without a whole head, nor without anybody who reads
    what is written, and not more than so many."""

    late: asyncio.TimerHandle | None = None  # no request is being answered
    stuck: asyncio.TimerHandle | None = None  # what is written is not read

    # uvicorn's own method takes no other kind of transport either
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def watch(self) -> None:
        """The time for a head, or for what comes behind an answer, starts, runs on or ends."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self.late is None:
            self.late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        elif not waits and self.late is not None:
            self.late.cancel()
            self.late = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.watch()

    def send_400_response(self, msg: str) -> None:
        """A request that turns into nonsense on its way is not answered any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stuck is not None:
            self.stuck.cancel()
            self.stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.late, self.stuck):
            if timer is not None:
                timer.cancel()


class Server(Uvicorn):
    """Serves until a signal, and then what is under way. `code` is what the process exits with."""

    greeting = ""  # on stderr, once requests are taken and a signal ends nothing abruptly

    def __init__(self, service: Service, hosts: set[str] | None, token: str | None, seconds: float):
        """`seconds`: for what is under way."""
        app = service.app(hosts, token)
        config = Config(
            app, http=Protocol, ws="none", lifespan="off", log_config=None, log_level="error",
            access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=round(SHUT_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self.service, self.worker, self.seconds = service, service.worker, seconds
        self.code, self.until = 0, math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.greeting:
            say(self.greeting)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In a signal's handler: what takes a lock is done in on_tick."""
        self.code = 130 if sig == signal.SIGINT else 0
        first = self.until == math.inf
        self.until = time.monotonic() + self.seconds if first else 0.0

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: whether to stop listening."""
        if self.until < math.inf:
            late = time.monotonic() > self.until
            self.worker.drain((503, "this server is shutting down") if late else None)
            self.should_exit |= late or self.worker.idle
        return await super().on_tick(counter)
