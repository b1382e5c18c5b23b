"""Every error that ROSE shows a person or a client, in one tree, with the answer and the exit status that it is.

    RoseError                  500  exit 1
    ├── InvalidRequest         400  exit 2   a parameter is wrong; names it
    │   ├── InvalidState       400  exit 5   the job or file is in a state that does not allow this
    │   ├── InvalidDataset     400  exit 6   training data has problems, with line numbers
    │   ├── SlowRequest        408  exit 1
    │   ├── PreconditionFailed 412  exit 1
    │   └── RangeNotSatisfiable 416 exit 1
    ├── NotAuthorised          401  exit 4
    ├── NotAllowed             403  exit 4
    ├── NotFound               404  exit 3
    ├── MethodNotSupported     405  exit 2
    ├── TooLarge               413  exit 6
    ├── LimitReached           429  exit 5   a rate of the project; when to come back
    │   └── ProjectFull        429  exit 5   a project has all it may have; waiting alone does not help
    ├── Conflict               503  exit 7   another writer was first: reload and decide again
    │   └── StaleEpoch         (internal) the lease is lost: whoever holds it must stop
    ├── Unavailable            503  exit 7   a service that is needed does not answer
    └── NoSpace                507  exit 1   the disk is full

An error carries a machine-readable `code`, the `param` it is about, a message that says what is wrong and where,
and a `hint`: the command or field to change. The server answers by this table, and whoever reads an answer makes the
error again by it (`error_of`); docs/api.md shows it. Errors elsewhere are kinds of these, with codes of their own.
"""

from __future__ import annotations

from typing import ClassVar

RETRY_SECONDS = 2.0


class RoseError(Exception):
    """Something went wrong inside ROSE; the server's log has the details."""

    status: ClassVar[int] = 500
    """HTTP status of the answer."""
    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""
    kind: ClassVar[str] = "server_error"
    """`type` in OpenAI's error shape."""
    default_code: str | None = None
    codes: ClassVar[frozenset[str]] = frozenset()
    """Codes that tell this error from another one with the same status."""
    retry_after_seconds: float | None = None
    """When to ask again: the header Retry-After."""
    should_retry: ClassVar[bool | None] = None
    """The header x-should-retry, where an SDK would decide otherwise by the status."""

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.code = code or self.default_code
        self.param = param
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class InvalidRequest(RoseError):
    """The request is not valid."""

    status = 400
    exit_code = 2
    kind = "invalid_request_error"
    default_code = "invalid_request"


class InvalidState(InvalidRequest):
    """This is not possible in the present state."""

    exit_code = 5
    default_code = "invalid_job_state"
    codes = frozenset(
        {
            "already_running",
            "default_project",
            "first_key",
            "invalid_job_state",
            "invalid_upload_state",
            "last_administrator",
            "not_running",
            "project_archived",
            "rebuild_running",
            "secret_gone",
            "too_many_secrets",
            "too_many_webhook_endpoints",
        }
    )


class InvalidDataset(InvalidRequest):
    """The training data has problems."""

    exit_code = 6
    default_code = "invalid_dataset"
    codes = frozenset(
        {
            "data_changed",
            "invalid_dataset",
            "invalid_file_format",
            "invalid_training_file",
            "no_conversations",
            "too_many_drops",
            "unknown_format",
        }
    )


class SlowRequest(InvalidRequest):
    """The rest of the request did not come in time."""

    status = 408
    exit_code = 1
    default_code = "request_timeout"


class PreconditionFailed(InvalidRequest):
    """The file has another content than the one that was asked for."""

    status = 412
    exit_code = 1
    default_code = "precondition_failed"


class RangeNotSatisfiable(InvalidRequest):
    """The file has no byte in the range that was asked for."""

    status = 416
    exit_code = 1
    default_code = "range_not_satisfiable"


class NotAuthorised(RoseError):
    """No valid API key was given."""

    status = 401
    exit_code = 4
    kind = "invalid_request_error"
    default_code = "invalid_api_key"


class NotAllowed(RoseError):
    """This key may not do that."""

    status = 403
    exit_code = 4
    kind = "invalid_request_error"
    default_code = "insufficient_scope"


class NotFound(RoseError):
    """There is nothing of that name."""

    status = 404
    exit_code = 3
    kind = "invalid_request_error"
    default_code = "not_found"


class MethodNotSupported(RoseError):
    """This address does not take this method."""

    status = 405
    exit_code = 2
    kind = "invalid_request_error"
    default_code = "method_not_supported"


class TooLarge(RoseError):
    """The request is larger than allowed."""

    status = 413
    exit_code = 6
    kind = "invalid_request_error"
    default_code = "too_large"


class LimitReached(RoseError):
    """A limit of the project is reached."""

    status = 429
    exit_code = 5
    kind = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class ProjectFull(LimitReached):
    """The project has as much as it may have."""

    default_code = "project_full"
    codes = frozenset({"project_bytes_limit", "project_full", "project_jobs_limit"})
    should_retry = False


class Conflict(RoseError):
    """Another writer was first; the state was read anew too often without success."""

    status = 503  # not 409, which the SDKs would repeat silently
    exit_code = 7
    default_code = "conflict"
    codes = frozenset({"conflict", "model_name_taken", "stale_epoch"})
    retry_after_seconds = RETRY_SECONDS


class StaleEpoch(Conflict):
    """The lease of this run is lost; another trainer may own the job now."""

    default_code = "stale_epoch"


class Unavailable(RoseError):
    """A service that this needs does not answer."""

    status = 503
    exit_code = 7
    default_code = "unavailable"
    retry_after_seconds = RETRY_SECONDS


class NoSpace(RoseError):
    """There is too little free disk space."""

    status = 507
    exit_code = 1
    default_code = "no_space"
    should_retry = False


TABLE: tuple[type[RoseError], ...] = (
    InvalidRequest,
    InvalidState,
    InvalidDataset,
    NotAuthorised,
    NotAllowed,
    NotFound,
    MethodNotSupported,
    SlowRequest,
    PreconditionFailed,
    TooLarge,
    RangeNotSatisfiable,
    LimitReached,
    ProjectFull,
    RoseError,
    Unavailable,
    Conflict,
    NoSpace,
)
"""What an answer can be; of one status the first is meant when no code tells."""


def error_of(status: int, code: str | None) -> type[RoseError]:
    """Return the error that an answer with this status and code stands for."""
    fitting = [kind for kind in TABLE if kind.status == status]
    if not fitting:
        return InvalidRequest if 400 <= status < 500 else RoseError
    return next((kind for kind in fitting if code in kind.codes), fitting[0])
