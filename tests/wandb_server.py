"""A server that answers Weights & Biases' own client as far as a run needs it, and keeps what a run's history holds.

Nobody can run the real one here. The client is the real one: what it asks, sends and resumes from is its own doing.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "k" * 40


class Bucket:
    """One run as the server has it."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.name = ""
        self.exit_codes: list[int] = []
        self.resumed_from: list[int] = []
        """How many rows there were each time that somebody began or continued the run."""

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps in the order of the history."""
        return [json.loads(row)["_step"] for row in self.rows]


class WandbServer:
    """Runs by their ids, and where they are sent to."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, Bucket] = {}

    def query(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a query by the first field that is known in it."""
        entity = {"id": "e", "name": variables.get("entity") or "gardeners"}
        project = {"id": "p", "name": variables.get("project"), "entity": entity}
        if "upsertBucket" in text:
            bucket = self.runs.setdefault(variables["name"], Bucket())
            bucket.name = variables.get("displayName") or bucket.name
            bucket.config = json.loads(variables.get("config") or "{}") or bucket.config
            facts = {"project": project, "displayName": bucket.name, "config": "{}", "description": None}
            return {
                "upsertBucket": {
                    "inserted": not bucket.rows,
                    "bucket": {"id": "r", "name": variables["name"], "historyLineCount": len(bucket.rows), **facts},
                }
            }
        if "RunResumeStatus" in text:
            return {"model": {**project, "bucket": self._resume(variables["name"])}}
        if "createRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"serverInfo": {"features": []}, "viewer": {"entity": "gardeners", "username": "rose", "flags": "{}"}}

    def _resume(self, name: str) -> dict[str, Any] | None:
        bucket = self.runs.get(name)
        if bucket is None:
            return None
        bucket.resumed_from.append(len(bucket.rows))
        return {
            "id": "r",
            "name": name,
            "displayName": bucket.name,
            "summaryMetrics": json.dumps(bucket.summary),
            "historyLineCount": len(bucket.rows),
            "historyTail": json.dumps(bucket.rows[-1:]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        bucket, files = self.runs[name], sent.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            bucket.rows[history["offset"] :] = history["content"]
        if summary := files.get("wandb-summary.json"):
            bucket.summary = json.loads(summary["content"][-1])
        if sent.get("complete"):
            bucket.exit_codes.append(sent["exitcode"])


@contextmanager
def running_wandb() -> Generator[WandbServer]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                asked = json.loads(body)
                self._answer({"data": known.query(asked["query"], asked.get("variables") or {})})
            else:
                if self.path.endswith("/file_stream"):
                    known.stream(self.path.split("/")[-2], json.loads(body))
                self._answer({})

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # a client that was killed
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

        def _answer(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known = WandbServer(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield known
        server.shutdown()
