"""A training child that ends in ways that the real one cannot be brought to; `ROSE_TEST_SCRIPT` says how."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec

from rose.blobs import Blobs
from rose.domain.artifacts import Artifact
from tests.unit import samples
from trainer.child import Channel, open_channel, read_spec
from trainer.protocol import Failed, Finished, PhaseChanged, RunSpec, ScoredRow, ScoredRows, StepDone

STEADY_STEPS = 600
LONG_STEPS = 1500
STEADY_SECONDS = 0.01


def model(spec: RunSpec) -> Artifact:
    """Publish something where a model belongs."""
    blobs = Blobs(Path(spec.blob_root))
    folder = blobs.temporary_folder()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return blobs.publish_folder(folder, f"jobs/{spec.job_id}/e{spec.epoch}/model")


def finished(artifact: Artifact) -> Finished:
    return Finished(artifact=artifact, kind="adapter", step=3, steps_run=3, trained_tokens=30)


def comparable(artifact: Artifact) -> Finished:
    """Report two learned tokens with their numbers, too."""
    row = ScoredRow(ids=[5, 6, 7], learned=[1, 2], logprobs=[-0.5, -1.0])
    return msgspec.structs.replace(finished(artifact), scored=ScoredRows(rows=[row], held_out=False, trained_as="fp32"))


def step_steadily(spec: RunSpec, channel: Channel, steps: int) -> int:
    """Report a step every ten milliseconds."""
    for step in range(1, steps + 1):
        channel.report(StepDone(metrics=samples.step(step)))
        threading.Event().wait(STEADY_SECONDS)
    channel.report(finished(model(spec)))
    return 0


def play(script: str, spec: RunSpec, channel: Channel) -> int:
    """Do what the script says and return the exit status."""
    channel.report(PhaseChanged(phase="train"))
    if script == "steps steadily":
        return step_steadily(spec, channel, STEADY_STEPS)
    if script == "steps steadily for long":
        return step_steadily(spec, channel, LONG_STEPS)
    for step in range(1, 4):
        channel.report(StepDone(metrics=samples.step(step)))
    match script:
        case "leaves without a word":
            print("the last line of its log", flush=True)
            return 0
        case "speaks nonsense":
            os.write(int(os.environ["ROSE_REPORT_FD"]), b"Traceback (most recent call last):\n")
            threading.Event().wait()
        case "has a full disk once":
            if not spec.recovery_points and spec.epoch == 1:
                channel.report(Failed(code="no_space", message="The disk is full."))
                return 1
            channel.report(finished(model(spec)))
        case "asks for another try":
            channel.report(Failed(code="hub_away", message="The hub does not answer.", retryable=True))
            return 1
        case "diverges":
            channel.report(Failed(code="training_diverged", message="The loss is not a number.", param="learning_rate"))
            return 1
        case "finishes":
            channel.report(comparable(model(spec)))
        case "never exits":
            channel.report(finished(model(spec)))
            os.close(int(os.environ["ROSE_REPORT_FD"]))
            threading.Event().wait()
        case "names a model that is not there":
            path = f"jobs/{spec.job_id}/e{spec.epoch}/model"
            channel.report(finished(Artifact(path=path, bytes=7, sha256="0" * 64)))
        case "names another run's model":
            channel.report(finished(Artifact(path=f"jobs/{spec.job_id}/e1/model", bytes=7, sha256="0" * 64)))
        case "hangs":
            threading.Event().wait()
        case "ignores orders":
            while True:
                threading.Event().wait()
        case _:
            raise AssertionError(script)
    return 0


if __name__ == "__main__":
    given = read_spec(sys.argv[1:], RunSpec)
    sys.exit(play(os.environ["ROSE_TEST_SCRIPT"], given, open_channel(given.abandon_seconds)))
