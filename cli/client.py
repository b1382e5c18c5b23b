"""ROSE's API as the command line uses it: one method per call, errors as `rose.errors` with their exit codes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote

import httpx2
import msgspec

from rose.api import schema
from rose.domain.previews import Preview
from rose.errors import InvalidRequest, LimitReached, NotFound, RoseError, Unavailable, error_of

Answer = TypeVar("Answer")
Entry = TypeVar(
    "Entry",
    schema.File,
    schema.Job,
    schema.JobEvent,
    schema.JobCheckpoint,
    schema.WebhookEndpoint,
    schema.Project,
    schema.ApiKey,
)

_ID_LENGTH = 20
_PART_TIMEOUT = httpx2.Timeout(120.0, connect=5.0)
"""For a part, which a server that stands still must not hold for ever: it is sent again."""
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

    def upload(self, path: Path, purpose: str) -> schema.File:
        """Upload a file; its content is streamed from the disk."""

        def send() -> schema.File:
            with path.open("rb") as content:
                return self._call_once(
                    "POST",
                    "/files",
                    schema.File,
                    files={"file": (path.name, content)},
                    data={"purpose": purpose},
                    timeout=None,
                )

        return patiently(send)

    def create_upload(self, filename: str, purpose: str, size: int) -> schema.Upload:
        """Announce a file that comes in parts."""
        body = {"filename": filename, "purpose": purpose, "bytes": size, "mime_type": "application/octet-stream"}
        return self._call("POST", "/uploads", schema.Upload, json=body)

    def add_part(self, upload_id: str, data: IO[bytes]) -> schema.UploadPart:
        """Send a part, from the beginning of `data` to its end."""
        path = f"/uploads/{quote(upload_id, safe='')}/parts"
        return self._call_once("POST", path, schema.UploadPart, files={"data": ("part", data)}, timeout=_PART_TIMEOUT)

    def complete_upload(self, upload_id: str, part_ids: list[str], md5: str) -> schema.Upload:
        """Make a file of the parts."""
        path = f"/uploads/{quote(upload_id, safe='')}/complete"
        body = schema.CompleteUpload(part_ids=part_ids, md5=md5)
        return self._call("POST", path, schema.Upload, body=body, timeout=None)

    def cancel_upload(self, upload_id: str) -> schema.Upload:
        """Give an upload up."""
        return self._call("POST", f"/uploads/{quote(upload_id, safe='')}/cancel", schema.Upload)

    def files(self) -> list[schema.File]:
        """Return all files, newest first."""
        return self._all("/files", schema.File, {"limit": 1000})

    def file(self, file_id: str) -> schema.File:
        """Return one file."""
        return self._call("GET", f"/files/{quote(file_id, safe='')}", schema.File)

    def delete_file(self, file_id: str) -> schema.Deleted:
        """Delete a file."""
        return self._call("DELETE", f"/files/{quote(file_id, safe='')}", schema.Deleted)

    def preview(self, file_id: str | None, body: schema.PreviewFile) -> Preview:
        """Return lines of an uploaded file, or of the `content` in `body`, as a model sees them."""
        path = f"/files/{quote(file_id, safe='')}/preview" if file_id else "/files/preview"
        return self._call("POST", path, Preview, body=body, timeout=None)

    @contextmanager
    def download(self, path: str) -> Generator[Iterator[bytes]]:
        """Yield the pieces of a download."""
        with self._reach(), self._http.stream("GET", path, timeout=None) as response:
            if response.status_code >= 400:
                response.read()
                raise self._problem(response)
            yield response.iter_bytes()

    # --- jobs

    def create_job(self, body: dict[str, Any]) -> schema.Job:
        """Create a fine-tuning job; `body` as schema.CreateJob has it, with values that the server may refuse."""
        return self._call("POST", "/fine_tuning/jobs", schema.Job, json=body)

    def job(self, job_id: str) -> schema.Job:
        """Return one job."""
        return self._call("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}", schema.Job)

    def jobs(self, limit: int | None = None) -> list[schema.Job]:
        """Return jobs, newest first; all of them without a limit."""
        return self._all("/fine_tuning/jobs", schema.Job, {"limit": min(limit or 100, 100)}, limit)

    def change_job(self, job_id: str, verb: str) -> schema.Job:
        """Cancel, pause or resume a job."""
        return self._call("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/{verb}", schema.Job)

    def job_events(self, job_id: str, limit: int | None = None) -> list[schema.JobEvent]:
        """Return a job's events, newest first."""
        path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/events"
        return self._all(path, schema.JobEvent, {"limit": min(limit or 100, 100)}, limit)

    def checkpoints(self, job_id: str) -> list[schema.JobCheckpoint]:
        """Return a job's checkpoints, newest first."""
        return self._all(
            f"/fine_tuning/jobs/{quote(job_id, safe='')}/checkpoints", schema.JobCheckpoint, {"limit": 100}
        )

    def job_metrics(self, job_id: str, **queries: Any) -> Iterator[schema.JobMetrics]:
        """Yield a job's series page by page; one page when `points` are asked for."""
        path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/metrics"
        after, more = 0, True
        while more:
            page = self._call("GET", path, schema.JobMetrics, params={**queries, "after": after})
            yield page
            more, after = page.has_more, page.steps[-1] if page.steps else after

    def stream_events(
        self, job_id: str, on_lost: Callable[[str], object] = lambda _: None
    ) -> Iterator[schema.JobEvent]:
        """Yield a job's events, oldest first, until the job ends; a stream that breaks goes on where it was.

        `on_lost` is told once for each break. Raises: Unavailable when there is no server, or when it stays away.
        """
        import time

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
                        yield msgspec.json.decode(frame.data, type=schema.JobEvent)
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

    def models(self) -> list[schema.Model]:
        """Return all models."""
        return self._call("GET", "/models", schema.ModelListing).data

    def model(self, name: str) -> schema.Model:
        """Return one model."""
        return self._call("GET", f"/models/{quote(name, safe=':')}", schema.Model)

    def delete_model(self, name: str) -> schema.Deleted:
        """Delete a fine-tuned model."""
        return self._call("DELETE", f"/models/{quote(name, safe=':')}", schema.Deleted)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a whole chat completion."""
        return self._call("POST", "/chat/completions", dict[str, Any], json=body, timeout=None)

    def stream_chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a chat completion as they are made."""
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
                    raise _stated(msgspec.convert(chunk, schema.ErrorAnswer).error, 500)
                yield chunk

    # --- graders

    def run_grader(self, body: schema.RunGrader) -> schema.GraderRun:
        """Return what a grader says of one answer."""
        return self._call("POST", "/fine_tuning/alpha/graders/run", schema.GraderRun, body=body, timeout=None)

    def validate_grader(self, body: schema.ValidateGrader) -> schema.ValidGrader:
        """Return a grader that can be used. Raises: InvalidRequest saying why it cannot."""
        return self._call("POST", "/fine_tuning/alpha/graders/validate", schema.ValidGrader, body=body, timeout=None)

    # --- administration

    def create_project(self, name: str) -> schema.Project:
        """Create a project."""
        return self._call("POST", "/organization/projects", schema.Project, body=schema.NameProject(name=name))

    def projects(self, *, archived: bool) -> list[schema.Project]:
        """Return all projects, newest first; with `archived` those, too."""
        params = {"limit": 100, "include_archived": "true" if archived else "false"}
        return self._all("/organization/projects", schema.Project, params)

    def project_usage(self, project: str) -> schema.ProjectUsage:
        """Return what a project has done and what it stores; `current` is the project of the key."""
        return self._call("GET", f"/organization/projects/{quote(project, safe='')}/usage", schema.ProjectUsage)

    def archive_project(self, project: str) -> schema.Project:
        """End a project's use."""
        return self._call("POST", f"/organization/projects/{quote(project, safe='')}/archive", schema.Project)

    def create_service_account(self, project: str, body: schema.CreateServiceAccount) -> schema.ServiceAccount:
        """Create a service account with its first key, whose secret is shown this once."""
        path = f"/organization/projects/{quote(project, safe='')}/service_accounts"
        return self._call("POST", path, schema.ServiceAccount, body=body)

    def keys(self, project: str) -> list[schema.ApiKey]:
        """Return a project's keys, newest first."""
        path = f"/organization/projects/{quote(project, safe='')}/api_keys"
        return self._all(path, schema.ApiKey, {"limit": 100})

    def revoke_key(self, project: str, key: str) -> schema.Deleted:
        """End a key's use."""
        path = f"/organization/projects/{quote(project, safe='')}/api_keys/{quote(key, safe='')}"
        return self._call("DELETE", path, schema.Deleted)

    # --- webhooks

    def create_webhook(self, body: schema.CreateWebhookEndpoint) -> schema.WebhookEndpointWithSecret:
        """Create a webhook endpoint, whose secret is shown this once."""
        return self._call("POST", "/webhook_endpoints", schema.WebhookEndpointWithSecret, body=body)

    def webhooks(self) -> list[schema.WebhookEndpoint]:
        """Return all webhook endpoints, newest first."""
        return self._all("/webhook_endpoints", schema.WebhookEndpoint, {"limit": 100})

    def webhook(self, endpoint: str) -> schema.WebhookEndpoint:
        """Return one webhook endpoint."""
        return self._call("GET", _webhook(endpoint), schema.WebhookEndpoint)

    def update_webhook(self, endpoint: str, body: schema.UpdateWebhookEndpoint) -> schema.WebhookEndpoint:
        """Change a webhook endpoint."""
        return self._call("POST", _webhook(endpoint), schema.WebhookEndpoint, body=body)

    def delete_webhook(self, endpoint: str) -> schema.Deleted:
        """Delete a webhook endpoint."""
        return self._call("DELETE", _webhook(endpoint), schema.Deleted)

    def test_webhook(self, endpoint: str, event_type: str) -> schema.WebhookTestResult:
        """Send a made-up event now."""
        body = schema.TestWebhookEndpoint(event_type=event_type)
        return self._call("POST", f"{_webhook(endpoint)}/test", schema.WebhookTestResult, body=body)

    def rotate_webhook_secret(
        self, endpoint: str, body: schema.RotateWebhookSecret
    ) -> schema.WebhookEndpointWithSecret:
        """Sign with another secret, which is shown this once."""
        path = f"{_webhook(endpoint)}/rotate_secret"
        return self._call("POST", path, schema.WebhookEndpointWithSecret, body=body)

    # --- ids

    def resolve(self, given: str, kind: str) -> str:
        """Return the full id for a full id, a unique prefix of one, or `last`; `kind` is `ftjob_` or `file_`.

        The last file is the newest uploaded one; result files do not count.

        Raises: NotFound; InvalidRequest when several fit.
        """
        if given.startswith(kind) and len(given) == len(kind) + _ID_LENGTH:
            return given
        if given == "last":
            uploaded = [] if kind == "ftjob_" else [one.id for one in self.files() if one.purpose != RESULTS]
            wanted = [one.id for one in self.jobs(1)] if kind == "ftjob_" else uploaded
            if not wanted:
                raise NotFound(f"There is no {'job' if kind == 'ftjob_' else 'file'} yet.")
            return wanted[0]
        wanted = given if given.startswith(kind) else kind + given
        known = [one.id for one in (self.jobs() if kind == "ftjob_" else self.files())]
        fitting = [one for one in known if one.startswith(wanted)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidRequest(
                f"{given!r} is the beginning of {len(fitting)} ids: {', '.join(fitting[:5])}.", code="ambiguous_id"
            )
        return given

    # --- transport

    def _call(
        self, method: str, path: str, kind: type[Answer], *, body: msgspec.Struct | None = None, **options: Any
    ) -> Answer:
        """Return what the server answers, as `kind`. Raises: what it refuses with; Unavailable."""
        if body is not None:
            options |= {"content": msgspec.json.encode(body), "headers": {"content-type": "application/json"}}
        return patiently(lambda: self._call_once(method, path, kind, **options))

    def _call_once(self, method: str, path: str, kind: type[Answer], **options: Any) -> Answer:
        with self._reach():
            response = self._http.request(method, path, **options)
        if response.status_code >= 400:
            raise self._problem(response)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._stranger(response.status_code) from None

    def _all(self, path: str, kind: type[Entry], params: dict[str, Any], limit: int | None = None) -> list[Entry]:
        found: list[Entry] = []
        more = True
        while more and (limit is None or len(found) < limit):
            after = {"after": found[-1].id} if found else {}
            page = self._call("GET", path, schema.Listing[kind], params={**params, **after})
            found.extend(page.data)
            more = page.has_more and bool(page.data)
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
            stated = msgspec.json.decode(response.content, type=schema.ErrorAnswer).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._stranger(response.status_code)
        problem = _stated(stated, response.status_code)
        if isinstance(problem, LimitReached):
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


def _webhook(endpoint: str) -> str:
    return f"/webhook_endpoints/{quote(endpoint, safe='')}"


def _stated(error: schema.ErrorBody, status: int) -> RoseError:
    message = error.message.removesuffix(error.hint or "").rstrip()
    return error_of(status, error.code)(message, code=error.code, param=error.param, hint=error.hint)
