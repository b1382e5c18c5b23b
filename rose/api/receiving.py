"""What every upload has in common, in one piece or in parts: how its bytes come in, and how a file may be described."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from rose.api.body import check_values
from rose.domain.training_data import check_name
from rose.errors import InvalidRequest, SlowRequest

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_FILENAME_CHARACTERS = 255
SHORTEST_LIFE_SECONDS = 3600
LONGEST_LIFE_SECONDS = 2_592_000
FORM_OVERHEAD_BYTES = 1 << 20
"""What a multipart body may have besides the file."""
SILENCE_SECONDS = 60.0
"""How long an upload may stand still."""
DRAIN_SECONDS = 20.0
"""How long the rest of a refused upload is read and thrown away, so that the client gets to see the refusal."""


async def in_time(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what comes. Raises: SlowRequest when nothing more comes for a while."""
    while True:
        try:
            with anyio.fail_after(SILENCE_SECONDS):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise SlowRequest(f"The upload was silent for {SILENCE_SECONDS:.0f} seconds.") from None
        yield chunk


async def drain(chunks: AsyncIterator[bytes]) -> None:
    """Read the rest of a refused upload and throw it away."""
    with anyio.move_on_after(DRAIN_SECONDS):
        async for _ in chunks:
            pass


def check_purpose(purpose: str) -> str:
    """Return the purpose. Raises: InvalidRequest naming `purpose`."""
    if not purpose:
        raise InvalidRequest(
            f"Missing required parameter: purpose (one of {', '.join(PURPOSES)}).",
            code="missing_required_parameter",
            param="purpose",
        )
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose is {purpose[:80]!r}; it must be one of {', '.join(PURPOSES)}.",
            code="invalid_value",
            param="purpose",
        )
    return purpose


def clean_filename(given: str, purpose: str, param: str) -> str:
    """Return the last part of a file name.

    Raises: InvalidRequest naming `param` when nothing usable is left, or when training does not take such a file.
    """
    check_values({param: given})
    name = given.replace("\\", "/").rpartition("/")[2].strip()
    if not name or name in (".", "..") or len(name) > MAX_FILENAME_CHARACTERS or not name.isprintable():
        raise InvalidRequest(
            f"The file needs a name of 1 to {MAX_FILENAME_CHARACTERS} printable characters.",
            code="invalid_value",
            param=param,
        )
    if purpose == "fine-tune":
        check_name(name, param)
    return name


def check_lifetime(anchor: object, seconds: int | None, *, anchor_param: str, seconds_param: str) -> int:
    """Return after how many seconds the file expires. Raises: InvalidRequest naming the field."""
    if anchor != "created_at":
        raise InvalidRequest(f"{anchor_param} must be created_at.", code="invalid_value", param=anchor_param)
    if seconds is None or not SHORTEST_LIFE_SECONDS <= seconds <= LONGEST_LIFE_SECONDS:
        raise InvalidRequest(
            f"{seconds_param} must be a whole number from {SHORTEST_LIFE_SECONDS} to {LONGEST_LIFE_SECONDS}.",
            code="invalid_value",
            param=seconds_param,
        )
    return seconds
