"""Lines of training data as a model sees them, through the API and a real engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from rose import leases
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import Running, free_port
from tests.cli.conftest import call
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

PLAIN = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four <|im_end|>."}]}
BAD = {"messages": [{"role": "bot", "content": "2+2?"}]}
LONG = {"messages": [{"role": "user", "content": "2+2? " * 200}, {"role": "assistant", "content": "Four."}]}
ROWS = [PLAIN, BAD, PLAIN, LONG]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
async def api(settings: Any, database_dsn: str, pool: Pool) -> AsyncIterator[Running]:
    from rose.app import PROCESSES

    given: Settings = settings(port=free_port(), database_url=database_dsn, device="cpu", hub_offline=True)
    stop = anyio.Event()
    async with serving(given, pool) as running, anyio.create_task_group() as tasks:
        tasks.start_soon(PROCESSES["inference"], given, stop)
        await eventually(lambda: leases.workers(pool, "inference"))
        yield running
        stop.set()


async def test_lines_of_a_file_and_of_a_text_are_shown_with_what_is_learned(api: Running, fixture_base: Path) -> None:
    file = await api.openai.files.create(file=("a.jsonl", CONTENT.encode()), purpose="fine-tune")
    asked = {"model": str(fixture_base), "line": 1, "count": 3}
    stored = await api.http.post(f"/v1/files/{file.id}/preview", json=asked)
    given = await api.http.post("/v1/files/preview", json={**asked, "content": CONTENT})
    assert stored.status_code == given.status_code == 200
    assert stored.json() == given.json()
    first, second, third = stored.json()["data"]
    [pieces] = first["sequences"]
    assert "".join(piece["text"] for piece in pieces) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nFour <|im_end|>.<|im_end|>\n"
    )
    assert [piece["text"] for piece in pieces if piece["learned"]] == ["Four <|im_end|>.<|im_end|>"]
    assert first["learned_tokens"] == sum(piece["tokens"] for piece in pieces if piece["learned"]) > 3
    assert second["problem"].startswith('messages[0].role is "bot"')
    assert (third["line"], third["tokens"]) == (3, first["tokens"])
    assert stored.json()["thinking"] is False


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"content": 7}, "content"),
        ({"line": 9}, "line"),
        ({"line": 0}, "line"),
        ({"count": 51}, "count"),
        ({"thinking": "x"}, "thinking"),
    ],
)
async def test_what_cannot_be_shown_is_named(api: Running, fixture_base: Path, more: Any, param: str) -> None:
    answer = await api.http.post("/v1/files/preview", json={"model": str(fixture_base), "content": CONTENT, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_an_unknown_file_or_model_is_a_404(api: Running, fixture_base: Path) -> None:
    gone = await api.http.post("/v1/files/file_none/preview", json={"model": str(fixture_base)})
    assert gone.status_code == 404
    nobody = await api.http.post("/v1/files/preview", json={"model": "nobody", "content": CONTENT})
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_command_line_brackets_what_is_learned_in_a_pipe(
    api: Running, fixture_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(CONTENT)
    rose = partial(call, environment={"ROSE_URL": api.services.settings.url})
    shown = await rose("files", "preview", str(path), "--model", str(fixture_base), "--line", "2", "--count", "2")
    assert shown.status == 0, shown.err
    assert shown.out.startswith('line 2: cannot be learned from: messages[0].role is "bot"')
    assert "line 3: 1 sequence, " in shown.out
    assert "<|im_start|>assistant\n⟦Four <|im_end|>.<|im_end|>⟧\n" in shown.out
    await api.openai.files.create(file=("a.jsonl", CONTENT.encode()), purpose="fine-tune")
    stored = await rose("files", "preview", "last", "--model", str(fixture_base), "--line", "2", "--count", "2")
    assert stored.out == shown.out
    past = await rose("files", "preview", str(path), "--model", str(fixture_base), "--line", "9")
    assert (past.status, past.err) == (2, f"error[invalid_value]: {path} has no line 9.\n")
