"""A real HTTP server on loopback that serves a folder badly, by a seeded plan."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FAULTS = ("500", "503", "reset", "stall", "truncate", "short", "empty", "whole")


class FaultServer(ThreadingHTTPServer):
    """Serves `folder`.  `faults`: what may befall a request for a tar; `share`: of the requests; None: all of them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, faults: tuple[str, ...] = (), share: float | None = None, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.share = folder, faults, share
        self.stall_s = 1.0
        self.draws, self.guard = random.Random(seed), threading.Lock()
        self.asked: Counter[tuple[str, int]] = Counter()  # by (name, first byte)
        self.befell: Counter[str] = Counter()
        self.in_a_row: Counter[tuple[str, int]] = Counter()  # requests for the same bytes that went badly

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, name: str, start: int) -> str:
        """What befalls a request: at most two in a row for the same bytes go badly, unless all shall."""
        with self.guard:
            self.asked[name, start] += 1
            fault = ""
            may = self.share is None or (self.draws.random() < self.share and self.in_a_row[name, start] < 2)
            if name.endswith(".tar") and self.faults and may:
                fault = self.draws.choice(self.faults)
            self.in_a_row[name, start] = self.in_a_row[name, start] + 1 if fault else 0
            self.befell[fault or "fine"] += 1
            return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms
    server: FaultServer

    def log_message(self, *args: object) -> None:
        del args

    def do_GET(self) -> None:
        path = self.server.folder / unquote(self.path).lstrip("/")
        said = self.headers.get("Range", "")
        first, _, last = said.removeprefix("bytes=").partition("-")
        start = int(first or 0)
        fault = self.server.fault(path.name, start)
        if fault in ("403", "500", "503"):
            self.answer(int(fault), b"no")
        elif not path.is_file():
            self.answer(404, b"no such file")
        else:
            self.serve(path.read_bytes(), fault, start, last)

    def serve(self, data: bytes, fault: str, start: int, last: str) -> None:
        """Bytes `start` to `last`, or all where `last` is empty."""
        if fault == "damage":
            data = data[:-1] + bytes([data[-1] ^ 1])
        part = data[start : int(last) + 1] if last and fault != "whole" else data
        whole = len(part) == len(data)
        if last and start >= len(data):
            fault = "416"
        match fault:
            case "416":
                self.answer(416, b"")
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            case "stall":
                self.answer(206, part, send=len(part) // 2)
                time.sleep(self.server.stall_s)
            case "truncate":
                self.answer(206, part, send=len(part) // 2)
            case "short":
                self.answer(206, part[: max(1, len(part) // 2)])
            case "empty":
                self.answer(206, b"")
            case _:
                self.answer(200 if whole else 206, part)

    def answer(self, status: int, body: bytes, send: int | None = None) -> None:
        """`send`: how many of the promised bytes come before the connection is closed."""
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if send is None else body[:send])
            self.wfile.flush()
        except OSError:
            self.close_connection = True
        if send is not None:
            self.close_connection = True

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the connection that was reset
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()


@contextmanager
def serving(
    folder: Path, faults: tuple[str, ...] = (), share: float | None = None, seed: int = 0
) -> Generator[FaultServer]:
    """The server, while the block runs."""
    with FaultServer(folder, faults, share, seed) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
