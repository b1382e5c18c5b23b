"""Job events as OpenAI's clients see them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose.domain import job_events as happened
from rose.domain.catalogue import EVENTS
from rose.domain.job_values import ServedAsTrained
from rose.domain.messages import event_id, job_messages, parse_event_id
from rose.errors import InvalidRequest
from tests.unit.samples import SAMPLES, step

POSITIONS = st.integers(0, 2**63 - 1)
INDEXES = st.integers(0, 32**3 - 1)


@given(POSITIONS, INDEXES)
def test_an_id_is_reversible(position: int, index: int) -> None:
    assert parse_event_id(event_id(position, index)) == (position, index)


@given(st.tuples(POSITIONS, INDEXES), st.tuples(POSITIONS, INDEXES))
def test_ids_sort_like_positions(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (event_id(*one) < event_id(*other)) == (one < other)


@pytest.mark.parametrize(
    "text", ["", "ftevent_", "after", "ftevent_0000", "ftevent_" + "z" * 16, "ftevent_" + "-" * 16]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_event_id(text)


def test_a_whole_run_reads_as_scripts_expect() -> None:
    texts = [message.message for event in SAMPLES[:17] for message in job_messages(1, event)]  # type: ignore[arg-type]
    assert texts[0].startswith("Created fine-tuning job: ftjob_")
    assert texts[1].startswith("Validating training file: file_")
    assert any(text.startswith("Files validated, moving job to queued state") for text in texts)
    assert "Fine-tuning job started" in texts
    assert "Step 2/50: training loss=0.50, validation loss=0.50" in texts
    assert "Checkpoint created at step 2 with Snapshot ID: m:ckpt-step-2" in texts
    assert texts.index("New fine-tuned model created: m") + 1 == texts.index("The job has successfully completed")


def test_what_takes_long_before_training_is_said() -> None:
    [building] = job_messages(5, happened.PhaseEntered(epoch=1, phase="build"))
    assert building.message.startswith("Building the base model")
    [downloading] = job_messages(5, happened.PhaseEntered(epoch=1, phase="download"))
    assert downloading.message == "Downloading the base model"
    assert job_messages(5, happened.PhaseEntered(epoch=1, phase="train")) == ()


def test_a_metrics_event_has_the_keys_of_the_contract_and_no_nulls() -> None:
    [message] = job_messages(5, happened.StepsReported(epoch=1, steps=(step(1),)))
    assert message.type == "metrics"
    assert {"step", "total_steps", "train_loss", "train_mean_token_accuracy", "learning_rate"} <= set(message.data)
    assert None not in message.data.values()


def test_every_job_event_has_its_messages() -> None:
    job_events = [
        sample for sample in SAMPLES if type(sample) in {k for n, (_, k) in EVENTS.items() if n[:4] == "job."}
    ]
    for event in job_events:
        for message in job_messages(9, event):  # type: ignore[arg-type]
            assert message.message
            assert isinstance(message.data, dict)


def test_a_pause_says_what_happened() -> None:
    for pause, text in (
        (happened.JobPaused(at=1, reason="requested"), "Job paused: requested"),
        (happened.JobPaused(at=1, reason="no_space", detail="3 MiB are free."), "Job paused: The disk is full: 3 MiB"),
        (happened.JobPaused(at=1, reason="no_space"), "Job paused: The disk is full"),
    ):
        [message] = job_messages(5, pause)
        assert message.message.startswith(text)


def test_how_the_model_is_served_is_said_before_it_is_created() -> None:
    (succeeded,) = [event for event in SAMPLES if isinstance(event, happened.JobSucceeded)]
    found = ServedAsTrained(
        status="proven", rows=3, tokens=812, largest_difference=3.1e-5, mean_difference=1e-6, largest_allowed=0.01
    )
    first, *rest = job_messages(5, msgspec.structs.replace(succeeded, served_as_trained=found))
    assert first.message == (
        "The served model gives the trainer's numbers: largest difference 3.1e-05 over 812 tokens (bound 0.01)"
    )
    assert first.data["tokens"] == 812
    assert [message.message for message in rest] == [message.message for message in job_messages(5, succeeded)]
    lonely = ServedAsTrained(status="not_proven", reason="no inference engine is connected")
    first, *_ = job_messages(5, msgspec.structs.replace(succeeded, served_as_trained=lonely))
    assert first.message == "Not proven to be served as it was trained: no inference engine is connected"
