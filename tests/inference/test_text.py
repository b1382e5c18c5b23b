"""Whole characters and stop strings, whatever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from rose.inference.text import Detokeniser, StopFilter


def decode_bytes(ids: Sequence[int]) -> str:
    """Act as a tokenizer with one token per byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def detokenise(ids: Sequence[int]) -> list[str]:
    detokeniser = Detokeniser(decode_bytes)
    return [*(detokeniser.push(token) for token in ids), detokeniser.finish()]


@given(st.text(max_size=80))
def test_valid_text_comes_out_whole_and_never_in_parts_of_a_character(text: str) -> None:
    pieces = detokenise(text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=120))
def test_any_bytes_come_out_as_a_decode_of_the_whole(data: bytes) -> None:
    assert "".join(detokenise(data)) == decode_bytes(data)


def test_a_character_of_four_tokens_comes_with_its_last_token() -> None:
    assert detokenise("a🌹b".encode()) == ["a", "", "", "", "🌹", "b", ""]


def test_an_unfinished_character_shows_at_the_end_only() -> None:
    assert detokenise("a🌹".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_endless_junk_is_given_out_and_stays_cheap() -> None:
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode_bytes(ids)

    detokeniser = Detokeniser(decode)
    pieces = [detokeniser.push(0xFF) for _ in range(1000)]
    assert "".join([*pieces, detokeniser.finish()]) == "\ufffd" * 1000
    assert max(decoded) < 100


def test_a_leading_space_that_depends_on_the_left_neighbour_is_kept() -> None:
    words = ["▁rose", "▁is", "▁a", "▁rose"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    detokeniser = Detokeniser(decode)
    assert "".join([*(detokeniser.push(token) for token in range(4)), detokeniser.finish()]) == "rose is a rose"


def run_filter(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    shown = ""
    for piece in pieces:
        shown += stop_filter.push(piece)
        if stop_filter.stopped:
            return shown, True
    return shown + stop_filter.finish(), False


def test_a_stop_string_over_three_pieces_is_not_shown() -> None:
    assert run_filter(["Hello E", "N", "D and more"], ["END"]) == ("Hello ", True)


def test_a_beginning_that_was_no_stop_string_is_shown_after_all() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push("an E"), stop_filter.push("NT")] == ["an ", "ENT"]
    assert run_filter(["an EN"], ["END"]) == ("an EN", False)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4), st.data())
def test_the_borders_between_pieces_do_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, stopped = run_filter(pieces, stops)
    assert (shown, stopped) == run_filter(list(text), stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
