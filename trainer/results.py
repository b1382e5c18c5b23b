"""The result file of a finished job: one CSV row per step, made from the log alone, so that it tells what happened.

Blocking parts run in threads; nothing is kept in memory but one page of events.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import anyio.to_thread

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from rose.domain.job_events import StepsReported
from rose.domain.job_values import StepMetrics
from rose.log.pool import Pool
from rose.log.read import read_stream

HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
PAGE_EVENTS = 256
BASE64_UNIT = 3
"""Bytes that base 64 encodes as a whole; cutting elsewhere would pad in the middle."""


def row(metrics: StepMetrics) -> str:
    """Return one line: shortest text that reads back as the same number, empty where nothing was evaluated."""
    numbers = (
        metrics.step,
        metrics.train_loss,
        metrics.train_mean_token_accuracy,
        metrics.valid_loss,
        metrics.valid_mean_token_accuracy,
    )
    return ",".join("" if number is None else repr(number) for number in numbers)


async def reported_steps(pool: Pool, job_id: str) -> AsyncIterator[list[StepMetrics]]:
    """Yield the metrics of all steps that the log holds for a job, in order, some at a time. Raises: Unavailable."""
    position = 0
    while page := await read_stream(pool, f"job/{job_id}", after_position=position, limit=PAGE_EVENTS):
        position = page[-1].position
        steps = [step for found in page if isinstance(found.event, StepsReported) for step in found.event.steps]
        if steps:
            yield steps


async def write_result_file(pool: Pool, blobs: Blobs, job_id: str, file_id: str, encoding: str) -> Artifact:
    """Write the job's CSV to `files/<file_id>` and return what was written; `encoding` is plain or base64.

    Raises: Unavailable, NoSpace.
    """
    relative = f"files/{file_id}"
    with await anyio.to_thread.run_sync(blobs.open_temporary) as file:
        pending = f"{HEADER}\n".encode()
        async for steps in reported_steps(pool, job_id):
            pending += "".join(f"{row(step)}\n" for step in steps).encode()
            if encoding == "base64":
                whole = len(pending) - len(pending) % BASE64_UNIT
                data, pending = base64.b64encode(pending[:whole]), pending[whole:]
            else:
                data, pending = pending, b""
            await anyio.to_thread.run_sync(file.write, data)
        await anyio.to_thread.run_sync(file.write, base64.b64encode(pending) if encoding == "base64" else pending)
        return await anyio.to_thread.run_sync(file.commit, relative)
