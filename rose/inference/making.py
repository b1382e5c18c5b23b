"""Makes the engine of an inference process from its settings. The one module of that process that imports torch."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from rose.blobs import Blobs
from rose.inference.engine import TorchEngine
from rose.inference.loading import Loader
from rose.inference.preview import Previews
from rose.settings import Settings


class Made(NamedTuple):
    """What an inference process is made of."""

    engine: TorchEngine
    """Running."""
    previews: Previews
    threads: int


def make(settings: Settings) -> Made:
    """Return a running engine, and what previews training data by its models' templates."""
    threads = settings.inference_threads or max(1, (os.cpu_count() or 2) - 1)
    torch.set_num_threads(threads)
    loader = Loader(
        Blobs(settings.blobs),
        models_dir=settings.models,
        offline=settings.hub_offline,
        device=settings.device,
        weights=settings.inference_weights,
        cache_bytes=settings.inference_cache_bytes,
    )
    engine = TorchEngine(loader, idle_seconds=settings.inference_idle_seconds, max_adapters=settings.inference_adapters)
    return Made(engine, Previews(loader), threads)
