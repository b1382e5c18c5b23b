"""What a model name in a request stands for: a fine-tuned model, one of its checkpoints, or a base."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, cast

import msgspec

from projections import jobs as jobs_view
from projections import models as models_view
from projections import permissions as permissions_view
from rose.api.services import Services
from rose.domain import bases
from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel, BaseRequest, ParentModel
from rose.domain.jobs import JobState
from rose.errors import NotFound
from rose.language_models.locate import RoseFacts, imported_facts

MAX_NAMES_SHOWN = 8


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuned model, or the checkpoint of one."""

    name: str
    kind: Literal["adapter", "full"]
    artifact: Artifact
    base: BaseModel
    created_at: int
    step: int
    job_id: str
    project: str
    """Whose it is; another project needs a permission."""
    lora: dict[str, Any] | None
    """The adapter's LoraSettings as JSON."""
    thinking: bool = False
    """Whether it was trained to think before it answers."""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """A base model, by alias, hub id, folder, built-in or imported name."""

    name: str
    source: str


Named = Tuned | Base


async def find_model(services: Services, project: str, name: str) -> Named:
    """Return what `name` stands for in a project. Raises: NotFound saying which names there are."""
    tuned = await find_tuned(services, project, name) or await find_aliased(services, project, name)
    if tuned is not None:
        return tuned
    source = bases.resolve_alias(name, services.settings.model_aliases)
    if not _is_source(services, source, through_alias=source != name):
        raise await _unknown(services, project, name)
    return Base(name=name, source=source)


async def find_tuned(services: Services, project: str, name: str) -> Tuned | None:
    """Return the fine-tuned model or checkpoint that a project calls `name`, or None.

    Its own comes first, then one of another project that it has a permission for.

    Raises: NotFound when it is not made yet.
    """
    own = await _own(services, project, name)
    if own is not None:
        return own
    for permission in await permissions_view.of_grantee(services.pool, project, name):
        lent = await _own(services, permission.project, name)
        if lent is not None:
            return lent
    return None


async def find_aliased(services: Services, project: str, name: str) -> Tuned | None:
    """Return the fine-tuned model or checkpoint that the alias `name` leads to, or None.

    Raises: NotFound when it is not made yet.
    """
    target = bases.resolve_alias(name, services.settings.model_aliases)
    return None if target == name or bases.source_kind(target) else await find_tuned(services, project, target)


async def _own(services: Services, project: str, name: str) -> Tuned | None:
    model = await models_view.by_name(services.pool, project, name)
    if model is not None and model.artifact is not None and model.base is not None:
        return Tuned(
            name=model.name,
            kind=cast(Literal["adapter", "full"], model.kind),
            artifact=model.artifact,
            base=model.base,
            created_at=model.created_at,
            step=model.step,
            job_id=model.job_id,
            project=model.project,
            lora=_json(model.lora),
            thinking=model.thinking,
        )
    stem, step = bases.split_checkpoint(name)
    job = await jobs_view.by_model_name(services.pool, project, stem)
    if job is None:
        return None
    if step is None:
        if job.is_terminal:
            return None
        raise _missing(name, f"The job {job.id} that makes it is {job.status}; it answers once the job has succeeded.")
    if job.status == "succeeded" and await models_view.of_job(services.pool, job.id) is None:
        return None
    return _checkpoint(job, name, step)


def base_request(named: Named) -> BaseRequest:
    """Return what a new job on `named` starts from."""
    if isinstance(named, Base):
        return BaseRequest(source=named.source)
    parent = ParentModel(name=named.name, kind=named.kind, artifact=named.artifact, lora=named.lora)
    return BaseRequest(source=named.base.source, parent=parent, pinned=named.base)


def known_bases(services: Services) -> dict[str, str]:
    """Return the base models that have a name here: name -> source."""
    names = {name: name for name in (*bases.BUILT_IN, *bases.FETCHED, *imported_bases(services))}
    led = _led_to(services)
    return names | {alias: target for alias, target in led.items() if bases.source_kind(target, names) is not None}


def tuned_aliases(services: Services) -> dict[str, str]:
    """Return the aliases that lead to no base, so to a fine-tuned model if there is one: alias -> its name."""
    imported, led = imported_bases(services), _led_to(services)
    return {alias: target for alias, target in led.items() if bases.source_kind(target, imported) is None}


def _led_to(services: Services) -> dict[str, str]:
    """Return where each alias leads."""
    aliases = services.settings.model_aliases
    return {alias: bases.resolve_alias(alias, aliases) for alias in aliases}


def imported_bases(services: Services) -> dict[str, RoseFacts]:
    """Return what is known of each base that was imported on this machine, by name."""
    return {facts.name: facts for facts in imported_facts(services.settings.models)}


def _checkpoint(job: JobState, name: str, step: int) -> Tuned:
    for checkpoint in job.checkpoints:
        if checkpoint.step == step and job.base is not None and job.hyperparameters is not None:
            # An adapter trained on a whole fine-tuned model is saved merged into it (trainer/trained_model.py).
            parent = job.base_request.parent
            merged = parent is not None and parent.kind == "full"
            lora = None if merged else job.hyperparameters.lora_config
            return Tuned(
                name=name,
                kind="adapter" if lora else "full",
                artifact=checkpoint.artifact,
                base=job.base,
                created_at=checkpoint.created_at,
                step=step,
                job_id=job.id,
                project=job.project,
                lora=_json(lora),
                thinking=job.hyperparameters.thinking,
            )
    steps = ", ".join(str(checkpoint.step) for checkpoint in job.checkpoints) or "none yet"
    raise _missing(name, f"Steps of {job.id} with a checkpoint: {steps}.")


def _json(lora: LoraSettings | None) -> dict[str, Any] | None:
    """Return the shape as an event holds it: what comes back from JSON, so lists and no tuples."""
    return None if lora is None else msgspec.json.decode(msgspec.json.encode(lora))


def _is_source(services: Services, source: str, *, through_alias: bool) -> bool:
    """Say whether a base can be looked for there. A request may name a folder only by its full, plain path."""
    kind = bases.source_kind(source, imported_bases(services))
    if kind == "folder" and not through_alias:
        return source.startswith("/") and str(PurePosixPath(source)) == source and ".." not in source.split("/")
    return kind is not None


def _missing(name: str, hint: str) -> NotFound:
    return NotFound(f"The model '{name}' does not exist.", code="model_not_found", param="model", hint=hint)


async def _unknown(services: Services, project: str, name: str) -> NotFound:
    target = tuned_aliases(services).get(name)
    if target is not None:
        return _missing(name, f"It is an alias of {target}, and there is no model of that name.")
    tuned = [model.name for model in await models_view.newest_first(services.pool, project)]
    names = [*known_bases(services), *tuned]
    shown = ", ".join(names[:MAX_NAMES_SHOWN]) + (", …" if len(names) > MAX_NAMES_SHOWN else "")
    return _missing(
        name, f"Known are {shown}; a hub id `org/name` or the full path of a folder on the server works, too."
    )
