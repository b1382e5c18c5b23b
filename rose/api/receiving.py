"""What every upload has in common, in one piece or in parts: how its bytes come in, and how a file may be described."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from rose.decoding import check_values
from rose.domain.training_data import check_name
from rose.errors import InvalidRequest, SlowRequest

MAX_FILENAME_CHARACTERS = 255
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
