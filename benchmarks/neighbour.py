"""A training run beside what is measured: the trainer's own code on SmolLM2, until it is ended.

`python -m benchmarks.neighbour MODELS THREADS` prints `training` once it has made a step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Neighbour:
    """A training run that can be halted and let go on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def halt(self) -> None:
        """Stop its clock."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again. Raises: RuntimeError when it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError("the training run beside has ended")
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def training_beside(models: Path, threads: int) -> Generator[Neighbour]:
    """Yield a training run that has begun. Raises: RuntimeError when it does not begin."""
    command = [sys.executable, "-m", "benchmarks.neighbour", str(models), str(threads)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"training\n":
                raise RuntimeError("the training run beside does not begin")
            yield Neighbour(process)
        finally:
            process.kill()  # also when it is halted


def main(arguments: Sequence[str]) -> None:
    """Train for ever."""
    from benchmarks.quality_run import Training, spec
    from benchmarks.quality_tasks import tasks
    from trainer.child import Channel
    from trainer.hardware import Hardware
    from trainer.run import Run

    models, threads = arguments
    task = tasks()[0]
    for seed in range(1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            training = Training(
                task=task.name,
                asked={"n_epochs": 50},
                seed=seed,
                models=models,
                folder=folder,
                threads=int(threads),
                asks_base=False,
            )
            run = Run(spec(training, task), Channel(os.open(os.devnull, os.O_WRONLY), 0, 60.0))
            run.hardware = Hardware(run.spec)
            run.load()
            while not run.is_over():
                run.train_step()
                run.state.unfinished = False
                if seed == 0 and run.state.step == 1:
                    print("training", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
