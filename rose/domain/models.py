"""Fine-tuned models: commands, events, state, decide, evolve. A model's stream is `model/<its job's id>`."""

from __future__ import annotations

from typing import assert_never

import msgspec

from rose.domain.artifacts import Artifact
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import BaseModel
from rose.errors import InvalidState
from rose.missing import missing_model


class RegisterModel(msgspec.Struct, frozen=True, kw_only=True):
    """Make a finished job's model answer under its name."""

    project: str
    job_id: str
    name: str
    at: int
    kind: str
    artifact: Artifact
    base: BaseModel
    lora: LoraSettings | None
    step: int
    thinking: bool = False


class DeleteModel(msgspec.Struct, frozen=True, kw_only=True):
    """End a model's use."""

    at: int


Command = RegisterModel | DeleteModel


class ModelRegistered(msgspec.Struct, frozen=True, kw_only=True):
    """A model answers under its name."""

    project: str
    job_id: str
    name: str
    created_at: int
    kind: str
    """`adapter` (PEFT LoRA on `base`) or `full` (a whole model)."""
    artifact: Artifact
    base: BaseModel
    lora: LoraSettings | None
    step: int
    thinking: bool = False
    """Whether it was trained to think before it answers, and is asked so."""


class ModelDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The model no longer answers."""

    at: int


Event = ModelRegistered | ModelDeleted


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """A model as its events make it; its JSON is the entity row's `doc`."""

    job_id: str = ""
    name: str = ""
    project: str = ""
    created_at: int = 0
    kind: str = "adapter"
    artifact: Artifact | None = None
    base: BaseModel | None = None
    lora: LoraSettings | None = None
    step: int = 0
    thinking: bool = False
    deleted_at: int | None = None


initial = ModelState()


def decide(command: Command, state: ModelState) -> tuple[Event, ...]:
    """Return the events of `command`. Raises: InvalidState, NotFound."""
    match command:
        case RegisterModel():
            if state.job_id:
                raise InvalidState(f"The job {state.job_id} has its model already.")
            return (
                ModelRegistered(
                    project=command.project,
                    job_id=command.job_id,
                    name=command.name,
                    created_at=command.at,
                    kind=command.kind,
                    artifact=command.artifact,
                    base=command.base,
                    lora=command.lora,
                    step=command.step,
                    thinking=command.thinking,
                ),
            )
        case DeleteModel():
            if not state.job_id or state.deleted_at is not None:
                raise missing_model(state.name)
            return (ModelDeleted(at=command.at),)
        case _:
            assert_never(command)


def evolve(state: ModelState, event: Event) -> ModelState:
    """Return the state after `event`."""
    match event:
        case ModelRegistered():
            return ModelState(
                project=event.project,
                job_id=event.job_id,
                name=event.name,
                created_at=event.created_at,
                kind=event.kind,
                artifact=event.artifact,
                base=event.base,
                lora=event.lora,
                step=event.step,
                thinking=event.thinking,
            )
        case ModelDeleted():
            return msgspec.structs.replace(state, deleted_at=event.at)
        case _:
            assert_never(event)
