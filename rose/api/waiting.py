"""Says in one sentence why nothing happens to a job; computed at read, so it is never out of date."""

from __future__ import annotations

from collections.abc import Sequence

from rose import integrations
from rose.api.services import Services
from rose.domain.jobs import JobState
from rose.leases import MOST_COUNTED, WaitingFacts, Worker, waiting_facts


async def waiting_for(services: Services, project: str, states: Sequence[JobState]) -> dict[str, str]:
    """Return by id what jobs of the project wait for; nothing of those that somebody works on or that are finished.

    One query, however many there are.
    """
    waiting = [state for state in states if not state.is_terminal and state.status != "paused"]
    facts = await waiting_facts(services.pool, project, [state.id for state in waiting]) if waiting else {}
    reasons = {state.id: explain(state, facts[state.id]) for state in waiting if state.id in facts}
    reasons |= {state.id: why_paused(state) for state in states if state.status == "paused"}
    return {job_id: reason for job_id, reason in reasons.items() if reason is not None}


def why_paused(state: JobState) -> str:
    """Return why a paused job is held, and what ends that. Pure."""
    if state.paused_because != "no_space":
        return "it is paused (requested); resume it to go on"
    full = f"the disk is full: {state.pause_detail}" if state.pause_detail else "the disk is full"
    return f"it is paused ({full}); it goes on once there is room"


def explain(state: JobState, facts: WaitingFacts) -> str | None:
    """Return the reason in words. Pure."""
    lease = facts.lease
    if lease is not None and lease.alive:
        return "its former run to end" if state.status == "queued" else None
    if not facts.trainers:
        return "no trainer is connected"
    if lease is not None and lease.seconds_held_back > 0:
        return f"the next attempt, in {max(1, round(lease.seconds_held_back))} seconds"
    if state.run is not None:
        return "a trainer to take it up again: the last one stopped answering"
    lacking = _lacking(state, facts.trainers)
    if lacking:
        return lacking
    if state.status == "validating_files":
        return "a trainer to check its files"
    if facts.queued_before >= MOST_COUNTED:
        return f"{MOST_COUNTED} jobs or more before it"
    if facts.queued_before:
        return "1 job before it" if facts.queued_before == 1 else f"{facts.queued_before} jobs before it"
    if facts.running_now:
        return "the running job to finish" if facts.running_now == 1 else f"one of {facts.running_now} running jobs"
    return "a trainer to start it"


def _lacking(state: JobState, trainers: tuple[Worker, ...]) -> str | None:
    logging = [integrations.missing(state.integrations, integrations.announced(one.capabilities)) for one in trainers]
    if all(logging):
        return f"no trainer can log to {logging[0]} (pip install 'rose[{logging[0]}]' where they run)"
    device = state.needs.get("device")
    if device not in (None, "cpu", "any", "auto") and not any(_device(one) == device for one in trainers):
        return "no trainer has a GPU" if device == "cuda" else f"no trainer has the device {device}"
    memory = state.needs.get("memory_bytes")
    known = [limit for one in trainers if isinstance(limit := one.capabilities.get("memory_bytes"), int)]
    if isinstance(memory, int) and len(known) == len(trainers) and known and max(known) < memory:
        return f"no trainer has {memory / 1e9:.1f} GB of memory; the largest has {max(known) / 1e9:.1f} GB"
    return None


def _device(trainer: Worker) -> str:
    return str(trainer.capabilities.get("device", "")).partition(":")[0]
