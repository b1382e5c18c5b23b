"""OpenAI batch: requests and answers in two files, joined by `custom_id` whatever the order of the answers.

The answers wait in a temporary SQLite file, so memory does not grow with them; lines come out in the requests' order.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rose.conversion.building import Message, chat, encoded, message, tools_of
from rose.conversion.chat import messages_of
from rose.conversion.responses import answer_of_response, question_of_response
from rose.conversion.rows import Context, Drop, Row, kind, shortened
from rose.errors import InvalidDataset, NoSpace


def joined(rows: Iterable[Row], context: Context) -> Iterator[tuple[Row, list[dict[str, Any]] | Drop]]:
    """Yield each request with what it and its answers make, then what has no request.

    Raises: InvalidDataset when there are only requests, or only answers.
    """
    with _kept() as store:
        yield from _sorted_in(rows, store)
        requests, answers = (_count(store, table) for table in ("requests", "answers"))
        if not requests or not answers:
            given, lacking = ("answers", "requests") if answers else ("requests", "answers")
            raise InvalidDataset(
                f"These are the {given} of a batch; the {lacking} are in another file.",
                hint="Name both: rose files convert requests.jsonl output.jsonl -o OUT.jsonl",
            )
        yield from _pairs(store, context)
        orphans = store.execute(
            "SELECT place, id FROM answers WHERE id NOT IN (SELECT id FROM requests) ORDER BY at", ()
        )
        for place, custom_id in orphans:
            yield Row(place=place), Drop(f"answers {_shown(custom_id)}, which is no request of these files")


@contextlib.contextmanager
def _kept() -> Generator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory(prefix="rose-convert-") as folder:
        store = sqlite3.connect(Path(folder) / "batch.db")
        try:
            store.execute("PRAGMA journal_mode = OFF")
            store.execute("PRAGMA synchronous = OFF")
            for table in ("requests", "answers"):
                store.execute(f"CREATE TABLE {table} (at INTEGER PRIMARY KEY, id TEXT UNIQUE, place TEXT, body BLOB)")
            yield store
        except sqlite3.OperationalError as problem:
            raise NoSpace(
                f"The answers cannot be kept in {folder}: {problem}.", hint="Free space, or set TMPDIR."
            ) from None
        finally:
            store.close()


def _count(store: sqlite3.Connection, table: str) -> int:
    return store.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def _sorted_in(rows: Iterable[Row], store: sqlite3.Connection) -> Iterator[tuple[Row, Drop]]:
    """Store all rows by kind; yield those that cannot be."""
    for row in rows:
        try:
            if row.value is None:
                raise Drop(row.problem or "could not be read")
            _store(row.value, row.place, store)
        except Drop as drop:
            yield row, drop


def _store(value: Mapping[str, Any], place: str, store: sqlite3.Connection) -> None:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        raise Drop(f"custom_id is {kind(custom_id)}; expected a text")
    table = "requests" if value.get("body") is not None else "answers"
    try:
        store.execute(
            f"INSERT INTO {table} (id, place, body) VALUES (?, ?, ?)", (custom_id, place, encoded(value).encode())
        )
    except sqlite3.IntegrityError:
        raise Drop(f"is a second one of {table} with custom_id {_shown(custom_id)}") from None


def _pairs(store: sqlite3.Connection, context: Context) -> Iterator[tuple[Row, list[dict[str, Any]] | Drop]]:
    query = """
        SELECT requests.place, requests.body, answers.place, answers.body
        FROM requests LEFT JOIN answers ON answers.id = requests.id ORDER BY requests.at
    """
    for asked_at, asked, answered_at, answered in store.execute(query):
        row = Row(place=answered_at or asked_at)
        try:
            if answered is None:
                raise Drop("has no answer in these files")
            yield row, _lines(msgspec.json.decode(asked), msgspec.json.decode(answered), context)
        except Drop as drop:
            yield row, drop


def _lines(request: Mapping[str, Any], output: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """Return a conversation for each answer that was asked for (`n`)."""
    asked, body = request["body"], _answer_body(output)
    if not isinstance(asked, dict):
        raise Drop(f"the request's body is {kind(asked)}; expected an object")
    if body.get("object") == "response" or "output" in body:
        return [chat([*question_of_response(asked), answer_of_response(body)], tools_of(asked.get("tools")))]
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Drop("the answer has no choices; it is of no chat")
    before = _question(asked, context)
    tools = tools_of(asked.get("tools", asked.get("functions")))
    return [chat([*before, _choice(one, context)], tools) for one in choices]


def _answer_body(output: Mapping[str, Any]) -> Mapping[str, Any]:
    response = output.get("response")
    if not isinstance(response, dict):
        error = output.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        raise Drop(f"the batch has no answer: {_shown(code or 'an error')}")
    if response.get("status_code") != 200:
        raise Drop(f"the answer's status_code is {_shown(response.get('status_code'))}")
    if not isinstance(response.get("body"), dict):
        raise Drop("the answer has no body")
    return response["body"]


def _question(asked: Mapping[str, Any], context: Context) -> list[Message]:
    if isinstance(asked.get("prompt"), str):
        return [message("user", asked["prompt"])]
    return messages_of(asked.get("messages"), "body.messages", context)


def _choice(choice: Any, context: Context) -> Message:
    if not isinstance(choice, dict):
        raise Drop("a choice is no object")
    if choice.get("finish_reason") in ("length", "content_filter"):
        raise Drop(f"the answer was cut off (finish_reason {choice['finish_reason']})")
    if isinstance(choice.get("text"), str):
        return message("assistant", choice["text"])
    return messages_of([choice.get("message")], "choices", context)[0]


def _shown(value: Any) -> str:
    return repr(shortened(value)) if isinstance(value, str) else shortened(str(value))
