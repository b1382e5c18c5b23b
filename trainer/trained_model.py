"""What a run trains: an adapter on a frozen base or all of a model's weights, and how it becomes a usable model folder.

Hides the four beginnings (base or fine-tuned model, adapter or full) from the loop. Knows no steps and no data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rose.blobs import Blobs
from rose.domain.hyperparameters import LoraSettings
from rose.domain.job_values import ParentModel
from rose.errors import InvalidRequest
from rose.language_models.adapters import merge_adapter_into, read_adapter
from rose.language_models.load import is_out_of_memory, load_model
from rose.language_models.locate import FACTS_FILE, LocatedBase, check_base, locate
from rose.language_models.lora import LoraAdapter, attach
from rose.language_models.template import load_tokenizer
from trainer.hardware import Hardware, OutOfMemory
from trainer.protocol import RunSpec
from trainer.saving import bytes_of


class TrainedModel:
    """The model of a run with its trainable parameters, fp32, always in the same order."""

    def __init__(
        self, model: Any, parameters: Mapping[str, torch.nn.Parameter], kind: str, save: Callable[[Path], None]
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.kind = kind
        """`adapter` or `full`: what `save` writes."""
        self.save = save
        """Writes a usable model folder from the present weights."""
        self.trains_weights = not any(".lora_" in name for name in self.parameters)
        """True for full fine-tuning, where the model's own weights change."""

    def saved_bytes(self) -> int:
        """Return about how much `save` writes."""
        return bytes_of(self.parameters.values() if self.kind == "adapter" else self.model.parameters())

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return copies of the trainable weights on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go back to the weights of a snapshot."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])


def locate_base(spec: RunSpec) -> LocatedBase:
    """Find the base that the job was validated with.

    Raises: ModelNotAvailable; BaseChanged when its content is another by now.
    """
    located = locate(
        spec.base.source, revision=spec.base.revision, models_dir=Path(spec.models_dir), offline=spec.hub_offline
    )
    check_base(located, spec.base, f"the job {spec.job_id}")
    return located


def load_trained_model(spec: RunSpec, located: LocatedBase, blobs: Blobs, hardware: Hardware) -> TrainedModel:
    """Load what the run starts from and make its trainable parameters.

    Raises: BlobMismatch when the fine-tuned model to go on from is damaged; InvalidRequest when it does not fit;
    OutOfMemory.
    """
    try:
        return _load(spec, located, blobs, hardware)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        total = hardware.total_memory_bytes() / (1 << 30)
        smaller = "a smaller base model" if spec.hyperparameters.use_lora else "LoRA (use_lora true)"
        raise OutOfMemory(
            f"The model does not fit into the {total:.0f} GiB of memory of {hardware.describe()}.",
            hint=f"What would fit: {smaller}, or a trainer with more memory.",
        ) from error


def _load(spec: RunSpec, located: LocatedBase, blobs: Blobs, hardware: Hardware) -> TrainedModel:
    lora = spec.hyperparameters.lora_config
    parent = spec.parent
    if parent is not None:
        blobs.verify(parent.artifact)
    full_parent = parent is not None and parent.kind == "full"
    folder = blobs.path(parent.artifact.path) if parent is not None and full_parent else located.path
    dtype = hardware.dtype(located.parameters, trains_weights=lora is None)
    model = load_model(folder, device=hardware.device, dtype=dtype)
    write_rest = _model_files(located.path)
    if lora is None:
        return _full(model, blobs, parent, write_rest)
    adapter = attach(model, lora, spec.hyperparameters.seed)
    if parent is not None and not full_parent:
        _go_on_from(adapter, lora, blobs.path(parent.artifact.path), spec)
    if full_parent:
        # An adapter is served on the job's base. This one belongs to other weights, so it is merged into these.
        return TrainedModel(
            model, _named(adapter), "full", lambda target: _save_merged(model, adapter, target, write_rest)
        )
    return TrainedModel(model, _named(adapter), "adapter", lambda target: adapter.save(target, spec.base))


def _full(model: Any, blobs: Blobs, parent: ParentModel | None, write_rest: Callable[[Path], None]) -> TrainedModel:
    if parent is not None and parent.kind == "adapter":
        merge_adapter_into(model, read_adapter(blobs.path(parent.artifact.path)))
    model.requires_grad_(True)

    def save(target: Path) -> None:
        model.save_pretrained(target)
        write_rest(target)

    # Weights that are tied to others appear once.
    return TrainedModel(model, dict(model.named_parameters()), "full", save)


def _named(adapter: LoraAdapter) -> dict[str, torch.nn.Parameter]:
    return {
        f"{name}.lora_{half}": parameter
        for name, layer in adapter.layers.items()
        for half, parameter in (("a", layer.lora_a), ("b", layer.lora_b))
    }


def _go_on_from(adapter: LoraAdapter, lora: LoraSettings, folder: Path, spec: RunSpec) -> None:
    """Take over a stored adapter. Where lora_alpha differs, B is rescaled, so that the model begins as it was."""
    stored = read_adapter(folder, spec.base)
    if stored.layers.keys() != adapter.layers.keys() or stored.rank != lora.r:
        raise InvalidRequest(
            f"The adapter of {spec.parent.name if spec.parent else folder} has rank {stored.rank} on "
            f"{len(stored.layers)} layers; this job trains rank {lora.r} on {len(adapter.layers)}.",
            code="adapter_does_not_fit",
            hint="Leave lora_config out, so that it is taken from the adapter.",
        )
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            a, b = stored.layers[name]
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b.float() * (stored.scale / layer.scale))


def _save_merged(model: Any, adapter: LoraAdapter, target: Path, write_rest: Callable[[Path], None]) -> None:
    """Write the model with W + s·BA in place of each adapted W, which itself stays as it is."""
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if ".lora_" in key:
            continue
        name, _, last = key.rpartition(".")
        layer = adapter.layers.get(name.removesuffix(".base"))
        if layer is None:
            weights[key] = tensor
            continue
        merged = tensor
        if last == "weight":
            update = (layer.lora_b.detach() @ layer.lora_a.detach()) * layer.scale
            merged = (tensor.float() + update).to(tensor.dtype)
        weights[f"{name.removesuffix('.base')}.{last}"] = merged
    model.save_pretrained(target, state_dict=weights)
    write_rest(target)


def _model_files(base: Path) -> Callable[[Path], None]:
    """Return what adds tokenizer, chat template and ROSE's own facts to a folder of weights."""

    def write(target: Path) -> None:
        load_tokenizer(base).save_pretrained(target)
        facts = base / FACTS_FILE
        if facts.is_file():
            shutil.copyfile(facts, target / FACTS_FILE)

    return write
