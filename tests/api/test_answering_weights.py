"""`x-rose-adapter`: an answer names the weights that wrote it, as the engine says, and no other one is passed on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import serving
from tests.api.running import Running
from tests.api.test_chat import QUESTION, Chat, chat
from tests.api.test_engine_away import CHAT, Play, answer, api, engine

__all__ = ["api", "chat", "serving"]  # fixtures

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_names_the_weights_that_wrote_it(chat: Chat, streams: bool) -> None:
    tuned = (await chat.api.openai.models.retrieve(chat.tuned)).model_extra
    assert tuned is not None
    named: dict[str, str] = {}
    for model in (chat.tuned, f"{chat.tuned}:ckpt-step-5", chat.base):
        body = {"model": model, "messages": QUESTION, "max_tokens": 2, "stream": streams}
        named[model] = (await chat.api.http.post("/v1/chat/completions", json=body)).headers["x-rose-adapter"]
    assert named[chat.tuned] == tuned["artifact"]["sha256"]
    assert named[chat.base] == "none"
    assert len(set(named.values())) == 3


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_by_other_weights_is_not_passed_on(api: Running, streams: bool) -> None:
    async with engine(api, answer("200 OK", {"choices": []}, "x-rose-adapter: " + "0" * 64)):
        refused = await api.http.post("/v1/chat/completions", json={**CHAT, "stream": streams})
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "engine_error"
    assert "x-rose-adapter" not in refused.headers


@pytest.mark.parametrize(
    ("play", "says"),
    [(answer("200 OK", {"choices": []}), None), (answer("200 OK", {"choices": []}, "x-rose-adapter: none"), "none")],
)
async def test_an_engine_that_does_not_say_is_not_spoken_for(api: Running, play: Play, says: Any) -> None:
    async with engine(api, play):
        answered = await api.http.post("/v1/chat/completions", json=CHAT)
    assert answered.status_code == 200
    assert answered.headers.get("x-rose-adapter") == says
