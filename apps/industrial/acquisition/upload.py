"""Frames by HTTP: a camera, a PLC's gateway or `curl` posts each picture to the station."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)
MAX_UPLOAD_BYTES = 64 * 2**20
MOST_HELD = 4 * MAX_UPLOAD_BYTES
"""Bytes of all pictures that are being received; one alone is always taken."""
LONGEST_SECONDS = 60.0
"""How long a picture may take to arrive."""
WAITING = 8
LOOPBACK = "127.0.0.1"
LONGEST_SERIAL = 200


class UploadSource:
    """`POST /frames?serial=NAME` (or PUT) with the picture as the body, at `address`:`port`; `GET /health`.

    202: the frame is on its way. 400: no body, or a serial number of more than 200 characters. 408: it did not arrive within
    LONGEST_SECONDS. 413: more than `MAX_UPLOAD_BYTES`. 415: a form. 503 with Retry-After: WAITING frames wait already, too many are being
    sent at once, or the station stops: send it again; nothing was taken.
    """

    def __init__(self, port: int, address: str = LOOPBACK) -> None:
        self._waiting: queue.Queue[Frame] = queue.Queue(WAITING)
        self._held = 0
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((address, port))
            self._socket.listen()  # who comes before the server runs waits, and is not refused
        except OSError as error:
            self._socket.close()
            raise SourceError(f"can't listen on {address}:{port}: {error}; choose another: http:[ADDRESS:]PORT") from error
        self.port = int(self._socket.getsockname()[1])

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """The frames in the order in which they came, until `stop`."""
        routes = [Route("/frames", self._take, methods=["POST", "PUT"]), Route("/health", self._health)]
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[self._socket])), name="uploads", daemon=True)
        thread.start()
        logger.info("ready", extra={"uploads": f"http://{self._socket.getsockname()[0]}:{self.port}/frames"})
        try:
            while not stop.is_set():
                with contextlib.suppress(queue.Empty):
                    yield self._waiting.get(timeout=0.2)
            server.should_exit = True
            thread.join(5)
            while not self._waiting.empty():  # these were acknowledged
                yield self._waiting.get_nowait()
        finally:
            server.should_exit = True
            thread.join(5)
            self._socket.close()

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({"waiting": self._waiting.qsize()})

    async def _take(self, request: Request) -> JSONResponse:
        serial = request.query_params.get("serial", "")
        if len(serial) > LONGEST_SERIAL:
            return JSONResponse({"error": f"serial has {len(serial)} characters; expected at most {LONGEST_SERIAL}"}, 400)
        if request.headers.get("content-type", "").startswith("multipart/"):
            error = "the body is a form; expected the bytes of a picture alone, as curl --data-binary @part.png sends them"
            return JSONResponse({"error": error}, 415)
        content = bytearray()
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                async for piece in request.stream():
                    content += piece
                    self._held += len(piece)
                    if len(content) > MAX_UPLOAD_BYTES:
                        return JSONResponse({"error": f"the picture has more than {MAX_UPLOAD_BYTES} bytes; send a smaller one"}, 413)
                    if self._held > max(MOST_HELD, len(content)):
                        return _again("too many pictures are being sent at once")
        except TimeoutError:
            logger.warning("a picture did not arrive in time; nothing was taken", extra={"serial": serial, "bytes": len(content)})
            return JSONResponse(
                {"error": f"the picture did not arrive within {LONGEST_SECONDS:g} s; nothing was taken, send it again"}, 408
            )
        except ClientDisconnect:
            logger.warning("a client went away within a picture; nothing was taken", extra={"serial": serial, "bytes": len(content)})
            return JSONResponse({"error": "the connection ended within the picture"}, 400)
        except asyncio.CancelledError:
            return _again("the station stops")
        finally:
            self._held -= len(content)
        if not content:
            return JSONResponse({"error": "the request has no body; expected the bytes of a picture (PNG, JPEG, ...)"}, 400)
        try:
            self._waiting.put_nowait(Frame(bytes(content), now_rfc3339(), serial))
        except queue.Full:
            return _again(f"{WAITING} frames wait already")
        return JSONResponse({"serial": serial, "bytes": len(content)}, 202)


def _again(why: str) -> JSONResponse:
    return JSONResponse({"error": f"{why}; nothing was taken, send it again"}, 503, headers={"Retry-After": "1"})
