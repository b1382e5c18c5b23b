"""Uploads in parts, pure: what is allowed when, and that no order of commands makes a wrong file."""

from __future__ import annotations

from functools import reduce
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rose.domain import uploads
from rose.domain.artifacts import Artifact
from rose.domain.uploads import (
    LIFE_SECONDS,
    MAX_PARTS,
    AddPart,
    CancelUpload,
    CompleteUpload,
    CreateUpload,
    Part,
    UploadState,
    decide,
    evolve,
    initial,
)
from rose.errors import InvalidRequest, InvalidState

NOW = 1_718_109_296
UPLOAD = "upload_aaaaaaaaaaaaaaaaaaaa"
CREATE = CreateUpload(
    project="default",
    upload_id=UPLOAD,
    at=NOW,
    filename="data.jsonl",
    purpose="fine-tune",
    bytes=10,
    mime_type="text/jsonl",
)


def add(part_id: str, size: int, at: int = NOW) -> AddPart:
    """Add a part of some bytes."""
    return AddPart(
        part_id=part_id, at=at, artifact=Artifact(path=f"uploads/{UPLOAD}/{part_id}", bytes=size, sha256="0" * 64)
    )


def complete(*part_ids: str, at: int = NOW, **more: Any) -> CompleteUpload:
    """Complete with parts in an order."""
    artifact = Artifact(path="files/file_x", bytes=10, sha256="0" * 64)
    return CompleteUpload(at=at, part_ids=part_ids, file_id="file_x", artifact=artifact, **{"md5": None, **more})


def given(*commands: uploads.Command) -> UploadState:
    """Return the state after commands that are all allowed."""
    state = initial
    for command in (CREATE, *commands):
        state = reduce(evolve, decide(command, state), state)
    return state


def test_the_parts_make_the_file_in_the_order_that_is_asked_for() -> None:
    state = given(add("part_b", 4), add("part_a", 6))
    assert [part.id for part in uploads.chosen_parts(state, ["part_a", "part_b"], NOW)] == ["part_a", "part_b"]
    done = given(add("part_b", 4), add("part_a", 6), complete("part_a", "part_b"))
    assert (done.status(NOW), done.file_id, done.part_ids) == ("completed", "file_x", ("part_a", "part_b"))
    assert done.parts == ()


def test_a_part_that_was_sent_twice_need_not_be_named() -> None:
    state = given(add("part_a", 10), add("part_again", 10))
    assert [part.id for part in uploads.chosen_parts(state, ["part_again"], NOW)] == ["part_again"]


@pytest.mark.parametrize(
    ("part_ids", "words"),
    [
        (["part_a"], "have 6 bytes together; bytes was 10"),
        ([], "have 0 bytes together"),
        (["part_a", "part_x"], r"part_ids\[1\] is 'part_x'; this upload has no such part"),
        (["part_a", "part_b", "part_a"], r"part_ids\[2\] is part_a, as part_ids\[0\] is"),
        (["part_a", "part_b", "part_c"], "have 13 bytes together"),
    ],
)
def test_other_parts_are_refused_by_name(part_ids: list[str], words: str) -> None:
    state = given(add("part_a", 6), add("part_b", 4), add("part_c", 3))
    with pytest.raises(InvalidRequest, match=words) as refused:
        uploads.chosen_parts(state, part_ids, NOW)
    assert refused.value.param == "part_ids"


def test_an_empty_file_is_refused() -> None:
    state = reduce(evolve, decide(msgspec.structs.replace(CREATE, bytes=0), initial), initial)
    with pytest.raises(InvalidRequest, match="empty") as refused:
        uploads.chosen_parts(state, [], NOW)
    assert refused.value.code == "empty_file"


@pytest.mark.parametrize(("size", "code"), [(0, "empty_file"), (11, "part_too_large")])
def test_a_part_of_no_use_is_refused(size: int, code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decide(add("part_a", size), given())
    assert (refused.value.param, refused.value.code) == ("data", code)


def test_all_parts_together_have_a_bound() -> None:
    state = given(add("part_a", 10), add("part_b", 9), add("part_c", 1))
    with pytest.raises(InvalidRequest, match="more than twice") as refused:
        decide(add("part_d", 1), state)
    assert (refused.value.param, refused.value.code) == ("data", "too_many_parts")
    parts = tuple(Part(id=f"part_{number}", bytes=1, sha256="0" * 64) for number in range(MAX_PARTS))
    many = msgspec.structs.replace(state, bytes=MAX_PARTS * 9, parts=parts)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PARTS}"):
        decide(add("part_x", 1), many)


ENDED = {
    "completed": given(add("part_a", 10), complete("part_a")),
    "cancelled": given(add("part_a", 10), CancelUpload(at=NOW)),
    "expired": given(add("part_a", 10)),
}


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize(
    "command",
    [
        add("part_b", 1, at=NOW + LIFE_SECONDS),
        complete("part_b", at=NOW + LIFE_SECONDS),
        CancelUpload(at=NOW + LIFE_SECONDS),
    ],
)
def test_an_ended_upload_changes_no_more(status: str, command: uploads.Command) -> None:
    if status == "cancelled" and isinstance(command, CancelUpload):
        assert decide(command, ENDED[status]) == ()
        return
    with pytest.raises(InvalidState, match=f"is {status}") as refused:
        decide(command, ENDED[status])
    assert (refused.value.param, refused.value.code) == ("upload_id", "invalid_upload_state")


def test_to_its_last_second_an_upload_can_be_completed() -> None:
    state = given(add("part_a", 10, at=NOW + LIFE_SECONDS - 1))
    assert decide(complete("part_a", at=NOW + LIFE_SECONDS - 1), state)


def test_the_same_completion_again_changes_nothing_and_another_is_refused() -> None:
    state = given(add("part_a", 6), add("part_b", 4), complete("part_a", "part_b", md5="f" * 32))
    assert decide(complete("part_a", "part_b", md5="f" * 32, at=NOW + LIFE_SECONDS), state) == ()
    for other in (complete("part_b", "part_a", md5="f" * 32), complete("part_a", "part_b")):
        with pytest.raises(InvalidState):
            decide(other, state)


class AnyOrder(RuleBasedStateMachine):
    """Commands in any order at any time: the file has exactly the announced bytes, and an end is an end."""

    def __init__(self) -> None:
        super().__init__()
        self.state = given()
        self.now = NOW
        self.added: dict[str, int] = {}
        self.ended: UploadState | None = None

    def ask(self, command: uploads.Command) -> bool:
        try:
            happened = decide(command, self.state)
        except InvalidRequest:
            return False
        self.state = reduce(evolve, happened, self.state)
        return bool(happened)

    @rule(seconds=st.integers(0, 2000))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(size=st.integers(0, 12))
    def add(self, size: int) -> None:
        part_id = f"part_{len(self.added)}"
        if self.ask(add(part_id, size, at=self.now)):
            assert self.now < NOW + LIFE_SECONDS
            self.added[part_id] = size

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([*self.added, "part_x"]), max_size=4))
        if self.ask(complete(*chosen, at=self.now)):
            assert len(set(chosen)) == len(chosen)
            assert sum(self.added[part_id] for part_id in chosen) == self.state.bytes
            assert self.now < NOW + LIFE_SECONDS

    @rule()
    def cancel(self) -> None:
        self.ask(CancelUpload(at=self.now))

    @invariant()
    def an_end_is_an_end(self) -> None:
        if self.ended is not None:
            assert self.state == self.ended
        elif self.state.status(self.now) != "pending":
            self.ended = self.state
            assert self.state.ended_at <= self.now


TestAnyOrder = AnyOrder.TestCase
