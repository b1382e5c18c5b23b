"""The room never promises what it cannot keep, and a row's keys and values stay what was written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from rose.inference.batching.memory import Slots, whole_pages
from rose.inference.batching.room import LayerShape, Pool, Room
from rose.inference.rows import Row

LAYERS = (LayerShape(2, 3, 5), LayerShape(1, 2, 2))
TOKEN_BYTES = 20 * 4
UNITS = 10
"""The limit, in slots of the smallest class."""
ROWS = 7
CPU = torch.device("cpu")


def make_room(*, units: int = UNITS, context: int = 4096, layers: tuple[LayerShape, ...] = LAYERS) -> Room:
    return Room(
        layers,
        dtype=torch.float32,
        device=CPU,
        limit_bytes=units * 256 * TOKEN_BYTES + 100,
        context_tokens=context,
        slots=ROWS,
    )


def make_row(prompt: int, most: int) -> Row:
    return Row([0] * prompt, adapter=None, most_tokens=most)


def sides(row: Row) -> Iterator[tuple[float, Tensor]]:
    """Yield all that is kept of a row, [H, T, D], each with a number of its own."""
    pool: Pool = row.place.pool
    for number, view in enumerate((*pool.keys, *pool.values)):
        yield number / 8, view[row.place.slot]


def number_of(row: Row) -> int:
    return row.tokens[0]


def write(row: Row, until: int) -> None:
    """Write recognisable numbers into the tokens up to `until`."""
    for side, view in sides(row):
        places = torch.arange(row.read, until, dtype=torch.float32)[None, :, None]
        view[:, row.read : until] = number_of(row) * 5000 + places + side
    row.read = until


def assert_kept(row: Row) -> None:
    for side, view in sides(row):
        expected = number_of(row) * 5000 + torch.arange(row.read, dtype=torch.float32)[None, :, None] + side
        assert torch.equal(view[:, : row.read], expected.expand_as(view[:, : row.read]))
        assert not view[:, row.read :].any()


class Life(RuleBasedStateMachine):
    """Rows come, grow token by token, end or leave."""

    lazy = True

    def __init__(self) -> None:
        super().__init__()
        self.patched = patch("rose.inference.batching.room.is_lazy", lambda _: self.lazy)
        self.patched.start()
        self.room = make_room()
        self.rows: list[Row] = []
        self.made = 0

    def new_row(self, prompt: int, answer: int) -> Row:
        self.made += 1
        row = make_row(prompt, prompt + answer)
        row.tokens[0] = self.made % 1000
        return row

    @rule(
        prompt=st.one_of(st.integers(1, 300), st.sampled_from([255, 256, 511, 512])),
        answers=st.lists(st.one_of(st.integers(1, 60), st.integers(200, 2300)), min_size=1, max_size=4),
    )
    def admit(self, prompt: int, answers: list[int]) -> None:
        rows = [self.new_row(prompt, answer) for answer in answers]
        fits = self.room.ever_fits(rows)
        admitted = self.room.admit(rows)
        assert fits or not admitted
        assert admitted or self.rows or not fits
        assert [row.place is not None for row in rows] == [admitted] * len(rows)
        if admitted:
            for row in rows:
                write(row, prompt)
            self.rows += rows

    def grow(self, row: Row, tokens: int) -> bool:
        """Let a row grow; return whether it did at all. At its end it leaves."""
        for made in range(tokens):
            if row.read == row.most_tokens - 1:  # the last token is chosen and not read
                self.room.release(row)
                self.rows.remove(row)
                return True
            if not self.room.grow(row):
                return made > 0
            write(row, row.read + 1)
        return True

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.sampled_from([1, 40, 300]))
    def grow_one(self, data: st.DataObject, tokens: int) -> None:
        self.grow(data.draw(st.sampled_from(self.rows)), tokens)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        self.room.release(row)
        self.room.release(row)
        assert row.place is None

    @invariant()
    def bytes_are_counted(self) -> None:
        held = sum(row.place.pool.capacity for row in self.rows) * TOKEN_BYTES
        assert self.room.held_bytes == held <= self.room.limit_bytes

    @invariant()
    def numbers_stay(self) -> None:
        for row in self.rows:
            assert row.place.pool.rows[row.place.slot] is row
            assert_kept(row)

    @invariant()
    def the_rest_is_empty(self) -> None:
        for pool in self.room._pools.values():
            for view in (*pool.keys, *pool.values):
                assert not view[len(pool.rows) :].any()

    def teardown(self) -> None:
        """Nobody is ever stuck: as long as there are rows, one of them can go on."""
        while self.rows:
            grown = [self.grow(row, 300) for row in list(self.rows)]
            assert any(grown)
        assert self.room.held_bytes == 0
        self.patched.stop()


class LifeOnADevice(Life):
    """Where zeros take memory at once, pools grow and shrink with their rows."""

    lazy = False

    @invariant()
    def pools_are_not_much_larger_than_their_rows(self) -> None:
        for pool in self.room._pools.values():
            assert pool.count <= max(4, 4 * len(pool.rows))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestLifeOnADevice = LifeOnADevice.TestCase
TestLifeOnADevice.settings = TestLife.settings


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=st.integers(1, 3000), answer=st.integers(1, 3000), units=st.integers(1, 20))
def test_a_row_within_the_context_is_admitted_into_an_empty_room(prompt: int, answer: int, units: int) -> None:
    room = make_room(units=units)
    most = prompt + answer
    row = make_row(prompt, most)
    fits = most <= room.context_tokens
    assert room.context_tokens <= units * 256
    if fits:
        assert room.ever_fits([row])
    if room.ever_fits([row]):
        assert most <= units * 256
        assert room.admit([row])


@pytest.mark.parametrize("tokens", [255, 256, 257, 511, 512])
def test_a_text_that_is_only_read_may_be_as_long_as_all_memory(tokens: int) -> None:
    room = make_room(units=2)
    assert room.context_tokens == 512
    scored = Row([0] * tokens, adapter=None, most_tokens=tokens, scored=True)
    assert room.admit([scored])
    assert scored.place.pool.capacity >= tokens


def test_no_more_rows_than_slots() -> None:
    room = make_room(units=20)
    rows = [make_row(1, 5) for _ in range(ROWS + 1)]
    assert not room.ever_fits(rows)
    assert not room.admit(rows)
    assert room.admit(rows[:ROWS])
    assert not room.admit(rows[ROWS:])
    room.release(rows[3])
    assert room.admit(rows[ROWS:])


def test_rows_that_may_grow_are_not_admitted_to_a_deadlock() -> None:
    """Two rows that hold half of the memory each and both need more would wait for each other."""
    room = make_room(units=4)
    one, other = make_row(500, 1000), make_row(500, 1000)
    assert room.admit([one])
    assert not room.admit([other])
    small = make_row(400, 512)
    assert room.admit([small])
    one.read = 512
    assert not room.grow(one)  # `small` has to end first
    room.release(small)
    assert room.grow(one)


def test_what_a_row_that_diverged_left_is_gone_when_another_fills_its_place() -> None:
    room = make_room()
    bad, good = make_row(200, 256), make_row(10, 256)
    for row in (bad, good):
        assert room.admit([row])
        write(row, row.prompt_tokens)
    for _, view in sides(bad):
        view[:] = float("nan")
    room.release(bad)
    assert good.place.slot == 0
    assert_kept(good)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_when_it_is_written_and_given_back() -> None:
    slots = Slots(4, whole_pages(4 << 20, torch.float32), torch.empty(0))
    assert slots.numbers.shape == (4, 4 << 20)
    before = resident_bytes()
    slots.numbers[1] = 1
    slots.numbers[2] = 2
    assert resident_bytes() - before > 30 << 20
    slots.clear(1)
    assert resident_bytes() - before < 20 << 20
    assert not slots.numbers[1].any()
    assert bool((slots.numbers[2] == 2).all())
