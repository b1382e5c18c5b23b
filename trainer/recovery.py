"""Recovery points: the whole state of a run on disk, so that a later attempt goes on exactly where it was.

A point is a folder: state.json, weights, Adam's moments, random states, the method's reference and, once an evaluation
was the best so far, the best weights; safetensors and JSON only, nothing that executes. It is no model, never served.
The supervisor deletes older points, since it knows which ones the job's events name.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers
from safetensors.torch import load_file, save_file

from rose.blobs import BlobMismatch, Blobs
from rose.domain.artifacts import Artifact
from rose.domain.job_values import RecoveryPoint, StepMetrics
from trainer.hardware import Hardware
from trainer.saving import bytes_of, save_folder

FORMAT = 1
RENDERING = 2
"""How conversations become tokens; a new number where that changes for any model, so that a resume can say so."""
STATE_FILE = "state.json"
WEIGHTS_FILE = "weights.safetensors"
MOMENTS_FILE = "moments.safetensors"
BEST_FILE = "best.safetensors"
RANDOM_FILE = "random.safetensors"
REFERENCE_FILE = "reference.safetensors"


class RunState(msgspec.Struct, kw_only=True):
    """Everything that changes during a run, besides tensors."""

    token_budget: int
    """Tokens per micro-batch; halved when memory runs out."""
    checkpointing: bool = False
    """Activations are recomputed in the backward pass, because memory ran out without that."""
    step: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    """Consecutive steps that were not applied because their loss or gradient was not finite."""
    first_loss: float | None = None
    """Loss before anything was learned, by which a later explosion is known."""
    exploded: int = 0
    """Consecutive steps whose loss was far above it."""
    best_loss: float | None = None
    best_step: int = 0
    misses: int = 0
    """Consecutive evaluations without improvement."""
    unfinished: bool = False
    """A step was taken, but not its evaluation: the run was drained in between."""
    metrics: StepMetrics | None = None
    """Numbers of the unfinished step; None when it was skipped."""


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Content of state.json."""

    format: int
    plan: str
    """Hash over data, hyperparameters and base; see batches.plan_hash."""
    environment: dict[str, str]
    """What may differ, but then the numbers agree only nearly: versions, device, threads."""
    state: RunState
    python_random: tuple[Any, ...]
    rendering: int = 1


class Restored(NamedTuple):
    """What a recovery point held, besides what was put back."""

    state: RunState
    best: dict[str, torch.Tensor] | None
    """The best weights so far (CPU, fp32)."""
    reference: torch.Tensor | None
    """[documents] fp32: how likely the model found them before the first step, for methods that compare with that."""
    difference: str | None
    """What is different about this machine."""


def environment(hardware: Hardware) -> dict[str, str]:
    """Return what the last bits of a run's numbers depend on besides its plan."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": hardware.device.type,
        "threads": str(hardware.threads),
    }


class Recovery:
    """Reads and writes the recovery points of one run."""

    def __init__(
        self,
        blobs: Blobs,
        *,
        folder: str,
        owner: str,
        plan: str,
        hardware: Hardware,
        known: Sequence[RecoveryPoint],
        min_free_bytes: int,
    ) -> None:
        self._blobs = blobs
        self._folder = folder
        self._owner = owner
        self._plan = plan
        self._hardware = hardware
        self._min_free_bytes = min_free_bytes
        self._known = known
        self.last_step = 0
        """Step of the newest point that this run made or began from."""
        self.plan_changed = False
        """A point was found whose run learned otherwise than this one will."""

    def newest(self) -> tuple[RecoveryPoint | None, tuple[str, ...]]:
        """Return the newest known point that is whole and of this plan, and why each newer one is not used."""
        rejected: list[str] = []
        for point in self._known:
            reason = self._flaw(point)
            if reason is None:
                self.last_step = point.step
                return point, tuple(rejected)
            rejected.append(f"step {point.step}: {reason}")
        return None, tuple(rejected)

    def _flaw(self, point: RecoveryPoint) -> str | None:
        try:
            self._blobs.verify(point.artifact)
            stored = self._read(self._blobs.path(point.artifact.path))
        except (BlobMismatch, OSError, msgspec.DecodeError) as error:
            return str(error)
        if stored.format != FORMAT:
            return f"it has format {stored.format}, this version of ROSE reads {FORMAT}"
        if stored.plan != self._plan:
            self.plan_changed = True
            if stored.rendering != RENDERING:
                return "it was made by another version of ROSE, which rendered the file's conversations otherwise"
            return "it was made from other data, settings or another base"
        return None

    def restore(
        self, point: RecoveryPoint, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Restored:
        """Put weights, moments and random states back, and return the rest."""
        folder = self._blobs.path(point.artifact.path)
        stored = self._read(folder)
        weights, moments = load_file(folder / WEIGHTS_FILE), load_file(folder / MOMENTS_FILE)
        with torch.no_grad():
            for name, parameter in parameters.items():
                # Copied into memory that torch allocated itself: vectorised sums depend on alignment.
                parameter.copy_(weights[name])
                if f"{name}/step" in moments:
                    optimizer.state[parameter] = {
                        "step": moments[f"{name}/step"].clone(),
                        "exp_avg": torch.empty_like(parameter).copy_(moments[f"{name}/exp_avg"]),
                        "exp_avg_sq": torch.empty_like(parameter).copy_(moments[f"{name}/exp_avg_sq"]),
                    }
        best = (
            {name: t.clone() for name, t in load_file(folder / BEST_FILE).items()} if stored.state.best_step else None
        )
        self._hardware.set_random_state({name: t.clone() for name, t in load_file(folder / RANDOM_FILE).items()})
        version, numbers, gauss = stored.python_random
        random.setstate((version, tuple(numbers), gauss))
        now = environment(self._hardware)
        differences = [f"{k} {v} -> {now[k]}" for k, v in stored.environment.items() if now.get(k) != v]
        reference = folder / REFERENCE_FILE
        return Restored(
            state=stored.state,
            best=best,
            reference=load_file(reference)["logprobs"] if reference.exists() else None,
            difference=", ".join(differences) or None,
        )

    def write(
        self,
        state: RunState,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        best: Mapping[str, torch.Tensor] | None,
        reference: torch.Tensor | None = None,
    ) -> Artifact:
        """Make a point of the present state; it is on disk, synced, when this returns.

        Raises: NoSpace, after which nothing of it is left.
        """
        tensors = {name: _contiguous(parameter) for name, parameter in parameters.items()}
        moments = {
            f"{name}/{key}": _contiguous(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        stored = _Stored(
            format=FORMAT,
            plan=self._plan,
            environment=environment(self._hardware),
            state=state,
            python_random=random.getstate(),
            rendering=RENDERING,
        )

        def fill(folder: Path) -> None:
            save_file(tensors, folder / WEIGHTS_FILE)
            save_file(moments, folder / MOMENTS_FILE)
            save_file(self._hardware.random_state(), folder / RANDOM_FILE)
            if best is not None:
                save_file(dict(best), folder / BEST_FILE)
            if reference is not None:
                save_file({"logprobs": reference}, folder / REFERENCE_FILE)
            (folder / STATE_FILE).write_bytes(msgspec.json.encode(stored))

        artifact = save_folder(
            self._blobs,
            f"{self._folder}/step-{state.step}",
            fill,
            owner=self._owner,
            needed_bytes=bytes_of([*tensors.values(), *moments.values(), *(best or {}).values()]),
            min_free_bytes=self._min_free_bytes,
        )
        self.last_step = state.step
        return artifact

    def sweep(self, job_id: str) -> None:
        """Delete what former attempts wrote and no event names: they ended before it was said."""
        named = {point.artifact.path for point in self._known}
        for folder in self._blobs.root.glob(f"jobs/{job_id}/e*/recovery/*"):
            relative = folder.relative_to(self._blobs.root).as_posix()
            if relative not in named:
                self._blobs.delete(relative)

    def _read(self, folder: Path) -> _Stored:
        return msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=_Stored)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()
