"""Ask a connected engine for its numbers of the finished model's rows, within a bound. No torch."""

from __future__ import annotations

import logging

import anyio

from rose import leases
from rose.domain.job_values import ServedAsTrained
from rose.errors import RoseError, Unavailable
from rose.inference.client import EngineClient, EngineGone
from rose.inference.generation import EngineBusy, ScoringRequest
from rose.inference.request import Target
from rose.log.pool import Pool
from trainer.proof import compare
from trainer.protocol import ScoredRows

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 2.0
MAX_LOST = 2
"""Engines that may go away with the rows in their hands before these are taken for the cause."""
NO_MEMORY = "not_enough_memory"


def not_proven(reason: str) -> ServedAsTrained:
    """Return that nothing was compared, and why."""
    return ServedAsTrained(status="not_proven", reason=reason.rstrip("."))


async def prove(
    scored: ScoredRows | None, target: Target, pool: Pool, *, token: str | None, seconds: float
) -> ServedAsTrained:
    """Return whether an engine gives the trainer's numbers for the published model `target`.

    Engines that are busy, still loading or just gone are asked again for up to `seconds`; what else keeps one from
    answering is told at once as the reason why nothing is proven.
    """
    if scored is None or not scored.rows or target.adapter is None:
        return not_proven("the trainer scored no rows")
    if seconds == 0:
        return not_proven("the setting proof_seconds is 0")
    asking = _Asking(scored, target, target.adapter.sha256, pool)
    with anyio.move_on_after(seconds):
        async with EngineClient(token=token) as client:
            return await asking.ask(client)
    return not_proven(f"no engine gave its numbers within {seconds:g} s{asking.waited_because}")


class _Asking:
    def __init__(self, scored: ScoredRows, target: Target, sha256: str, pool: Pool) -> None:
        self._scored = scored
        self._target = target
        self._sha256 = sha256
        self._pool = pool
        self._request = ScoringRequest(target=target, rows=[row.ids for row in scored.rows])
        self.waited_because = ""

    async def ask(self, client: EngineClient) -> ServedAsTrained:
        lost = 0
        while True:
            pause = LONGEST_PAUSE_SECONDS
            try:
                engines = await leases.workers(self._pool, "inference")
                if not engines:
                    return not_proven("no inference engine is connected")
                answer = await client.score(client.choose(engines, self._target.base.fingerprint), self._request)
                return compare(self._scored, answer, self._sha256)
            except EngineGone as error:
                lost += error.lost
                if lost == MAX_LOST:
                    return not_proven(f"{lost} engines went away while they were asked")
                self._note(error)
            except EngineBusy as error:
                if error.code == NO_MEMORY:
                    return not_proven(error.message)
                pause = min(pause, error.retry_after_seconds or pause)
                self._note(error)
            except (RoseError, ValueError) as error:
                log.warning("an engine could not score %s: %s", self._target.model, error)
                return not_proven(f"the engine did not do it: {error}")
            await anyio.sleep(pause)

    def _note(self, error: Unavailable) -> None:
        log.info("%s waits for an engine's numbers: %s", self._target.model, error)
        self.waited_because = f" ({error.message.rstrip('.')})"
