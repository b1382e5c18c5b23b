"""What an API process has counted is written when it ends, also when it has had no time before."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import pytest

from rose import leases
from rose.log.pool import Pool, open_pool
from rose.settings import Settings
from tests.in_own_loop import in_own_loop
from tests.local.test_app import given, process

__all__ = ["given"]
pytestmark = pytest.mark.timeout(300)

ANSWER = b"""{"id": "c", "object": "chat.completion", "created": 1, "model": "tiny",
"choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
"usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}}"""


class Engine(BaseHTTPRequestHandler):
    """Another engine that speaks OpenAI's protocol, as far as a plain answer needs it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@asynccontextmanager
async def opened(given: Settings) -> AsyncIterator[Pool]:
    pool = await open_pool(given, min_size=1, max_size=1)
    try:
        yield pool
    finally:
        await pool.close()


def test_what_was_counted_is_written_at_the_end(given: Settings) -> None:
    async def announce(url: str) -> None:
        async with opened(given) as pool:
            worker = leases.Worker(id="engine_1", kind="inference", host="here", url=url, capabilities={}, pid=1)
            await leases.announce(pool, worker)

    async def counted() -> list[Any]:
        async with opened(given) as pool:
            rows = await pool.fetch("select project, model, requests, prompt_tokens, completion_tokens from rose.usage")
            return [tuple(row) for row in rows]

    with process("api", given) as running, engine() as url:
        in_own_loop(announce(url))
        with httpx2.Client(base_url=given.url, trust_env=False, timeout=60) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Are you there?"}]}
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=body).json()["usage"]["total_tokens"] == 13
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 0
    assert in_own_loop(counted()) == [("default", "tiny", 3, 33, 6)]
