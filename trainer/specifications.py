"""What a child is told: the specification of a run or of a validation, made from the job's state and the settings."""

from __future__ import annotations

from rose.blobs import Blobs
from rose.domain.job_values import PinnedFile
from rose.domain.jobs import JobState
from rose.settings import Settings
from trainer.protocol import RunSpec, ValidationSpec

TRAINING_MODULE = "trainer.run"
WARM_MODULE = "trainer.warm"
VALIDATION_MODULE = "trainer.validate"


def training_spec(state: JobState, epoch: int, settings: Settings, blobs: Blobs) -> RunSpec:
    """Return the specification of a training run. The job is validated, so base and hyperparameters are known."""
    assert state.base is not None
    assert state.hyperparameters is not None
    return RunSpec(
        job_id=state.id,
        epoch=epoch,
        model_name=state.model_name,
        method=state.method,
        base=state.base,
        parent=state.base_request.parent if state.base_request else None,
        blob_root=str(blobs.root),
        training_file=_path(state.training_file, blobs) or "",
        validation_file=_path(state.validation_file, blobs),
        hyperparameters=state.hyperparameters,
        recovery_points=state.recovery_points,
        trained_tokens=state.recovery_points[0].trained_tokens if state.recovery_points else 0,
        models_dir=str(settings.models),
        device=settings.device,
        threads=settings.torch_threads,
        recovery_seconds=settings.recovery_seconds,
        recovery_steps=settings.recovery_steps,
        abandon_seconds=settings.abandon_seconds,
        min_free_bytes=settings.min_free_bytes,
        hub_offline=settings.hub_offline,
    )


def validation_spec(state: JobState, settings: Settings, blobs: Blobs) -> ValidationSpec:
    """Return the specification of a validation."""
    assert state.base_request is not None
    assert state.training_file is not None
    return ValidationSpec(
        job_id=state.id,
        base=state.base_request,
        blob_root=str(blobs.root),
        training_file_id=state.training_file.id,
        training_file=_path(state.training_file, blobs) or "",
        validation_file_id=state.validation_file.id if state.validation_file else None,
        validation_file=_path(state.validation_file, blobs),
        method=state.method,
        requested=state.requested,
        seed=state.seed,
        minimum_examples=settings.minimum_examples,
        base_learning_rates=settings.base_learning_rates,
        models_dir=str(settings.models),
        hub_offline=settings.hub_offline,
        abandon_seconds=settings.abandon_seconds,
    )


def _path(file: PinnedFile | None, blobs: Blobs) -> str | None:
    return None if file is None else str(blobs.path(file.artifact.path))
