"""Every error that ROSE shows a person or a client, in one tree.

    RoseError
    ├── InvalidRequest        400  exit 2   a parameter is wrong; names it
    │   ├── InvalidState      400  exit 5   the job or file is in a state that does not allow this
    │   └── InvalidDataset    400  exit 6   training data has problems, with line numbers
    ├── NotAuthorised         401  exit 4
    ├── NotFound              404  exit 3
    ├── MethodNotSupported    405  exit 2
    ├── TooLarge              413  exit 6
    ├── LimitReached          429  exit 5   a limit of the project; `code` names it
    ├── Conflict              (internal) another writer was first: reload and decide again
    │   └── StaleEpoch        (internal) the lease is lost: whoever holds it must stop
    ├── Unavailable           503  exit 7   a service that is needed does not answer
    └── NoSpace               507  exit 1   the disk is full

An error carries a machine-readable `code`, the `param` it is about, a message that says what is wrong and where,
and a `hint`: the command or field to change.
"""

from __future__ import annotations


class RoseError(Exception):
    """Something went wrong inside ROSE; the server's log has the details."""

    status: int = 500
    exit_code: int = 1
    kind: str = "server_error"
    default_code: str | None = None

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


class InvalidDataset(InvalidRequest):
    """The training data has problems."""

    exit_code = 6
    default_code = "invalid_dataset"


class NotAuthorised(RoseError):
    """No valid API key was given."""

    status = 401
    exit_code = 4
    kind = "invalid_request_error"
    default_code = "invalid_api_key"


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
        """When to ask again; None where waiting for some seconds does not help."""


class Conflict(RoseError):
    """Another writer was first; the state was read anew too often without success."""

    default_code = "conflict"


class StaleEpoch(Conflict):
    """The lease of this run is lost; another trainer may own the job now."""

    default_code = "stale_epoch"


class Unavailable(RoseError):
    """A service that this needs does not answer."""

    status = 503
    exit_code = 7
    default_code = "unavailable"


class NoSpace(RoseError):
    """There is too little free disk space."""

    status = 507
    exit_code = 1
    default_code = "no_space"
