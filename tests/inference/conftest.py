"""A base with two adapters on disk, and engines on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from rose.blobs import Blobs
from rose.inference.engine import TorchEngine
from rose.inference.loading import Loader
from rose.language_models.locate import locate
from tests.inference.asking import World, make_adapter

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(fixture_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    base = locate(str(fixture_base), models_dir=fixture_base.parent).base_model()
    whole = blobs.temporary_folder()
    shutil.copytree(fixture_base, whole, dirs_exist_ok=True)
    return World(
        folder=fixture_base,
        blobs=blobs,
        base=base,
        red=make_adapter(fixture_base, blobs, base, 1),
        white=make_adapter(fixture_base, blobs, base, 2),
        full=blobs.publish_folder(whole, "jobs/ftjob_full/e1/model"),
    )


@pytest.fixture
def start_engine(world: World) -> Iterator[Callable[..., TorchEngine]]:
    """Factory of engines that end with the test; keywords go to TorchEngine, `free_bytes` to its loader."""
    with ExitStack() as stack:

        def start(free_bytes: Any = None, **options: Any) -> TorchEngine:
            loader = Loader(
                world.blobs, models_dir=world.folder.parent, offline=True, device="cpu", free_bytes=free_bytes
            )
            engine = TorchEngine(loader, **options)
            stack.callback(lambda: engine.join(30))
            stack.callback(engine.stop)
            return engine

        yield start


@pytest.fixture(scope="session")
def engine(world: World) -> Iterator[TorchEngine]:
    """One engine for the tests that change nothing about it."""
    running = TorchEngine(Loader(world.blobs, models_dir=world.folder.parent, offline=True, device="cpu"))
    yield running
    running.stop()
    assert running.join(30)
