"""ROSE's API as the command line uses it: one method per call, errors as `rose.errors` with their exit codes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote

import httpx2

from rose.errors import (
    InvalidDataset,
    InvalidRequest,
    InvalidState,
    LimitReached,
    MethodNotSupported,
    NoSpace,
    NotAuthorised,
    NotFound,
    RoseError,
    TooLarge,
    Unavailable,
)

Answer = TypeVar("Answer")

_ID_LENGTH = 20
_PART_TIMEOUT = httpx2.Timeout(120.0, connect=5.0)
"""For a part, which a server that stands still must not hold for ever: it is sent again."""
_BY_STATUS: dict[int, type[RoseError]] = {
    400: InvalidRequest,
    401: NotAuthorised,
    403: NotAuthorised,
    404: NotFound,
    405: MethodNotSupported,
    413: TooLarge,
    429: LimitReached,
    503: Unavailable,
    507: NoSpace,
}
_BY_CODE: dict[str, type[RoseError]] = {
    "invalid_job_state": InvalidState,
    "invalid_dataset": InvalidDataset,
    "invalid_training_file": InvalidDataset,
}
MAX_STREAM_RESTARTS = 60
MAX_WAITS = 10
"""How often a call waits for the rate limit before it gives up."""
LONGEST_WAIT_SECONDS = 120.0
RESULTS = "fine-tune-results"
"""Purpose of the files that jobs make."""


class Client:
    """A connection to one ROSE server. Use as a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx2.Client(
            base_url=self.url + "/v1",
            headers={"Authorization": f"Bearer {api_key or 'rose'}"},
            timeout=httpx2.Timeout(60.0, connect=5.0),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # --- files

    def upload(self, path: Path, purpose: str) -> dict[str, Any]:
        """Upload a file; its content is streamed from the disk."""

        def send() -> dict[str, Any]:
            with path.open("rb") as content:
                return self._call_once(
                    "POST", "/files", files={"file": (path.name, content)}, data={"purpose": purpose}, timeout=None
                )

        return patiently(send)

    def create_upload(self, filename: str, purpose: str, size: int) -> dict[str, Any]:
        """Announce a file that comes in parts."""
        body = {"filename": filename, "purpose": purpose, "bytes": size, "mime_type": "application/octet-stream"}
        return self._call("POST", "/uploads", json=body)

    def add_part(self, upload_id: str, data: IO[bytes]) -> dict[str, Any]:
        """Send a part, from the beginning of `data` to its end."""
        path = f"/uploads/{quote(upload_id, safe='')}/parts"
        return self._call_once("POST", path, files={"data": ("part", data)}, timeout=_PART_TIMEOUT)

    def complete_upload(self, upload_id: str, part_ids: list[str], md5: str) -> dict[str, Any]:
        """Make a file of the parts."""
        path = f"/uploads/{quote(upload_id, safe='')}/complete"
        return self._call("POST", path, json={"part_ids": part_ids, "md5": md5}, timeout=None)

    def cancel_upload(self, upload_id: str) -> dict[str, Any]:
        """Give an upload up."""
        return self._call("POST", f"/uploads/{quote(upload_id, safe='')}/cancel")

    def files(self) -> list[dict[str, Any]]:
        """Return all files, newest first."""
        return self._all("/files", {"limit": 1000})

    def file(self, file_id: str) -> dict[str, Any]:
        """Return one file."""
        return self._call("GET", f"/files/{quote(file_id, safe='')}")

    def delete_file(self, file_id: str) -> dict[str, Any]:
        """Delete a file."""
        return self._call("DELETE", f"/files/{quote(file_id, safe='')}")

    def preview(self, file_id: str | None, body: dict[str, Any]) -> dict[str, Any]:
        """Return lines of an uploaded file, or of the `content` in `body`, as a model sees them."""
        path = f"/files/{quote(file_id, safe='')}/preview" if file_id else "/files/preview"
        return self._call("POST", path, json=body, timeout=None)

    @contextmanager
    def download(self, path: str) -> Generator[Iterator[bytes]]:
        """Yield the pieces of a download."""
        with self._reach(), self._http.stream("GET", path, timeout=None) as response:
            if response.status_code >= 400:
                response.read()
                raise self._problem(response)
            yield response.iter_bytes()

    # --- jobs

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create a fine-tuning job."""
        return self._call("POST", "/fine_tuning/jobs", json=body)

    def job(self, job_id: str) -> dict[str, Any]:
        """Return one job."""
        return self._call("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}")

    def jobs(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return jobs, newest first; all of them without a limit."""
        return self._all("/fine_tuning/jobs", {"limit": min(limit or 100, 100)}, limit)

    def change_job(self, job_id: str, verb: str) -> dict[str, Any]:
        """Cancel, pause or resume a job."""
        return self._call("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/{verb}")

    def job_events(self, job_id: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return a job's events, newest first."""
        path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/events"
        return self._all(path, {"limit": min(limit or 100, 100)}, limit)

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return a job's checkpoints, newest first."""
        return self._all(f"/fine_tuning/jobs/{quote(job_id, safe='')}/checkpoints", {"limit": 100})

    def job_metrics(self, job_id: str, **queries: Any) -> Iterator[dict[str, Any]]:
        """Yield a job's series page by page; one page when `points` are asked for."""
        path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/metrics"
        after, more = 0, True
        while more:
            page = self._call("GET", path, params={**queries, "after": after})
            yield page
            more, after = page["has_more"], page["steps"][-1] if page["steps"] else after

    def stream_events(self, job_id: str, on_lost: Callable[[str], object] = lambda _: None) -> Iterator[dict[str, Any]]:
        """Yield a job's events, oldest first, until the job ends; a stream that breaks goes on where it was.

        `on_lost` is told once for each break. Raises: Unavailable when there is no server, or when it stays away.
        """
        import time

        import msgspec

        cursor: str | None = None
        met, failures = False, 0
        while True:
            try:
                with self._event_source(job_id, cursor) as source:
                    met = True
                    if source.response.status_code == 204:
                        return
                    for frame in source:
                        if frame.data == "[DONE]":
                            return
                        failures, cursor = 0, frame.id or cursor
                        yield msgspec.json.decode(frame.data)
                lost = Unavailable(f"{self.url} closes the stream of {job_id} again and again.")
            except Unavailable as problem:
                lost = problem
            failures += 1
            if not met or failures > MAX_STREAM_RESTARTS:
                raise lost
            if failures == 2:  # the first attempt after a restart of the server is soon enough not to talk about it
                on_lost(f"{lost.message} Trying again…")
            time.sleep(min(0.2 * failures, 2.0))

    @contextmanager
    def _event_source(self, job_id: str, cursor: str | None) -> Generator[httpx2.EventSource]:
        path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/events"
        headers = {"Last-Event-ID": cursor} if cursor else {}
        timeout = httpx2.Timeout(60.0, connect=5.0)
        with (
            self._reach(),
            self._http.sse(path, params={"stream": "true"}, headers=headers, timeout=timeout) as source,
        ):
            if source.response.status_code >= 400:
                source.response.read()
                raise self._problem(source.response)
            yield source

    # --- models and chat

    def models(self) -> list[dict[str, Any]]:
        """Return all models."""
        return self._call("GET", "/models")["data"]

    def model(self, name: str) -> dict[str, Any]:
        """Return one model."""
        return self._call("GET", f"/models/{quote(name, safe=':')}")

    def delete_model(self, name: str) -> dict[str, Any]:
        """Delete a fine-tuned model."""
        return self._call("DELETE", f"/models/{quote(name, safe=':')}")

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a whole chat completion."""
        return self._call("POST", "/chat/completions", json=body, timeout=None)

    def stream_chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a chat completion as they are made."""
        import msgspec

        request = {**body, "stream": True}
        with (
            self._reach(),
            self._http.sse("/chat/completions", method="POST", json=request, timeout=None) as source,
        ):
            if source.response.status_code >= 400:
                source.response.read()
                raise self._problem(source.response)
            for frame in source:
                if frame.data == "[DONE]":
                    return
                chunk = msgspec.json.decode(frame.data)
                if "error" in chunk:
                    raise _stated(chunk["error"], 500)
                yield chunk

    # --- graders

    def run_grader(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what a grader says of one answer."""
        return self._call("POST", "/fine_tuning/alpha/graders/run", json=body, timeout=None)

    def validate_grader(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a grader that can be used. Raises: InvalidRequest saying why it cannot."""
        return self._call("POST", "/fine_tuning/alpha/graders/validate", json=body, timeout=None)

    # --- administration

    def organization(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask something of the administration API; `path` is below /organization."""
        return self._call(method, f"/organization{path}", json=body)

    def organization_list(self, path: str, **params: str) -> list[dict[str, Any]]:
        """Return a whole list of the administration API."""
        return self._all(f"/organization{path}", {"limit": 100, **params})

    # --- webhooks

    def webhooks(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask something of the webhook endpoints; `path` is below /webhook_endpoints."""
        return self._call(method, f"/webhook_endpoints{path}", json=body)

    def webhook_list(self) -> list[dict[str, Any]]:
        """Return all webhook endpoints, newest first."""
        return self._all("/webhook_endpoints", {"limit": 100})

    # --- ids

    def resolve(self, given: str, kind: str) -> str:
        """Return the full id for a full id, a unique prefix of one, or `last`; `kind` is `ftjob_` or `file_`.

        The last file is the newest uploaded one; result files do not count.

        Raises: NotFound; InvalidRequest when several fit.
        """
        if given.startswith(kind) and len(given) == len(kind) + _ID_LENGTH:
            return given
        if given == "last":
            newest = self.jobs(1) if kind == "ftjob_" else self.files()
            wanted = [item["id"] for item in newest if kind == "ftjob_" or item["purpose"] != RESULTS]
            if not wanted:
                raise NotFound(f"There is no {'job' if kind == 'ftjob_' else 'file'} yet.")
            return wanted[0]
        wanted = given if given.startswith(kind) else kind + given
        known = [item["id"] for item in (self.jobs() if kind == "ftjob_" else self.files())]
        fitting = [one for one in known if one.startswith(wanted)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidRequest(
                f"{given!r} is the beginning of {len(fitting)} ids: {', '.join(fitting[:5])}.", code="ambiguous_id"
            )
        return given

    # --- transport

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return patiently(lambda: self._call_once(method, path, **options))

    def _call_once(self, method: str, path: str, **options: Any) -> Any:
        with self._reach():
            response = self._http.request(method, path, **options)
        if response.status_code >= 400:
            raise self._problem(response)
        try:
            return response.json()
        except ValueError:
            raise self._stranger(response.status_code) from None

    def _all(self, path: str, params: dict[str, Any], limit: int | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"] and (limit is None or len(found) < limit):
            after = {"after": found[-1]["id"]} if found else {}
            page = self._call("GET", path, params={**params, **after})
            found.extend(page["data"])
            if not page["data"]:
                break
        return found[:limit]

    @contextmanager
    def _reach(self) -> Generator[None]:
        try:
            yield
        except httpx2.TransportError as problem:
            raise self._unreachable(problem) from None

    def _unreachable(self, problem: Exception) -> Unavailable:
        reason = str(problem) or type(problem).__name__
        return Unavailable(
            f"No ROSE server answers at {self.url} ({reason}).",
            code="server_unreachable",
            hint="Start one with `rose up`, or name another with --url or ROSE_URL.",
        )

    def _problem(self, response: httpx2.Response) -> RoseError:
        try:
            body = response.json()
        except ValueError:
            body = {}
        stated = body.get("error") if isinstance(body, dict) else None
        if not isinstance(stated, dict):
            return self._stranger(response.status_code)
        problem = _stated(stated, response.status_code)
        if isinstance(problem, LimitReached) and response.headers.get("x-should-retry") != "false":
            problem.retry_after_seconds = _seconds(response.headers)
        return problem

    def _stranger(self, status: int) -> Unavailable:
        return Unavailable(
            f"What answers at {self.url} is no ROSE server (status {status}).",
            code="not_rose",
            hint="See where ROSE answers with `rose status`, or name its address with --url or ROSE_URL.",
        )


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Return what `ask` returns; where the server says when to come back, ask again then.

    Raises: what `ask` raises; LimitReached when waiting does not help, or has not helped.
    """
    import time

    for left in reversed(range(MAX_WAITS + 1)):
        try:
            return ask()
        except LimitReached as limit:
            wait = limit.retry_after_seconds
            if wait is None or wait > LONGEST_WAIT_SECONDS or not left:
                raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _seconds(headers: httpx2.Headers) -> float | None:
    try:
        return int(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(headers["retry-after"])
    except (KeyError, ValueError):
        return None


def _stated(error: dict[str, Any], status: int) -> RoseError:
    code = error.get("code")
    kind = _BY_CODE.get(code or "") or _BY_STATUS.get(status, RoseError)
    message = error.get("message") or f"The server answered {status}."
    hint = error.get("hint")
    return kind(message.removesuffix(hint or "").rstrip(), code=code, param=error.get("param"), hint=hint)
