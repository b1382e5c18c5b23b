"""Help, terminals, colours, Ctrl-C, and an environment variable for every flag."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import msgspec
import pytest
from anyio.abc import SocketAttribute, SocketStream
from cyclopts import App

from rose.api import wire
from rose.domain.jobs import initial
from tests.api.running import Running, Trainer
from tests.cli.conftest import Rose, call

pytestmark = pytest.mark.anyio

ESCAPE = "\x1b["


async def test_help_names_every_command_with_its_sentence() -> None:
    shown = (await call("--help")).out
    for name in ("chat", "db", "doctor", "down", "events", "files", "finetune", "logs", "models", "projections"):
        assert f"│ {name} " in shown
    for name in ("quickstart", "serve", "status", "up", "upload"):
        assert f"│ {name} " in shown
    assert (await call()).out == shown


async def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "transformers", "litestar", "asyncpg", "nats", "httpx2"}
    code = f"import sys; from cli.app import main; main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def every_command(app: App, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    """Yield every command below `app` with its words."""
    for name in app:
        if name.startswith("-"):
            continue
        command = app[name]
        if command.default_command is not None:
            yield (*path, name), command
        yield from every_command(command, (*path, name))


def test_every_flag_has_an_environment_variable_and_every_command_its_help() -> None:
    from cli.app import app

    commands = dict(every_command(app))
    assert ("finetune", "create") in commands
    for words, command in commands.items():
        assert command.help, words
        for argument in command.assemble_argument_collection(parse_docstring=True):
            flags = [name for name in argument.names if name.startswith("--")]
            if flags and argument.show:
                assert argument.parameter.env_var, f"{' '.join(words)} {flags[0]} has no environment variable"
                assert argument.parameter.help, f"{' '.join(words)} {flags[0]} has no help"


async def in_a_terminal(*arguments: str, typed: Sequence[str] = (), **environment: str) -> str:
    """Return what `rose` shows on a terminal at which each text of `typed` answers one prompt."""
    main, child = pty.openpty()
    variables = {**os.environ, "COLUMNS": "160", "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-m", "cli.app", *arguments]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=variables)
    os.close(child)
    to_type = list(typed)
    shown = b""
    try:
        with anyio.fail_after(60):
            while piece := await anyio.to_thread.run_sync(_read, main, abandon_on_cancel=True):
                shown += piece
                if to_type and shown.endswith(b"> "):
                    os.write(main, to_type.pop(0).encode())
    finally:
        process.kill()
        await anyio.to_thread.run_sync(process.wait)
        os.close(main)
    return shown.decode()


def _read(main: int) -> bytes:
    try:
        return os.read(main, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


async def test_a_terminal_gets_a_table_and_colours_unless_told_otherwise(api: Running, seed_file: Path) -> None:
    file_id = await api.upload(seed_file)
    url = api.services.settings.url
    table = await in_a_terminal("files", "list", ROSE_URL=url, COLUMNS="30")
    assert "created" in table.splitlines()[0]
    assert "\t" not in table
    assert file_id in table, "however narrow the terminal, an id is shown whole: it is copied"
    problem = await in_a_terminal("files", "get", "file_aaaaaaaaaaaaaaaaaaaa", ROSE_URL=url)
    assert ESCAPE in problem
    plain = await in_a_terminal("files", "get", "file_aaaaaaaaaaaaaaaaaaaa", ROSE_URL=url, NO_COLOR="1")
    assert ESCAPE not in plain
    assert "No such File object" in plain


async def test_the_watch_on_a_terminal_shows_a_bar_with_its_numbers(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    await Trainer(api.services, job.id).run_to_success()
    shown = await in_a_terminal("finetune", "watch", job.id, ROSE_URL=api.services.settings.url)
    for fact in ("step 50/50", "epoch 25.00", "loss 0.0200", "tokens/s", "━"):
        assert fact in shown


async def test_an_error_in_a_conversation_does_not_end_it(api: Running) -> None:
    url = api.services.settings.url
    shown = await in_a_terminal(
        "chat", "--model", "nobody", ROSE_URL=url, TERM="dumb", typed=["first\n", "second\n", "\x04"]
    )
    assert "Ctrl-D ends" in shown
    assert shown.count("The model 'nobody' does not exist") == 2


@pytest.mark.parametrize("command", ["watch", "events"])
async def test_ctrl_c_detaches_and_says_how_to_come_back(api: Running, seed_file: Path, command: str) -> None:
    job = await api.job(seed_file)
    arguments = [sys.executable, "-m", "cli.app", "finetune", command, job.id]
    environment = {**os.environ, "ROSE_URL": api.services.settings.url, "PYTHONUNBUFFERED": "1"}
    async with await anyio.open_process(arguments, env=environment, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with anyio.fail_after(60):
            assert b"Created fine-tuning job" in await process.stdout.receive()
            process.send_signal(signal.SIGINT)
            said = b"".join([piece async for piece in process.stderr])
            assert await process.wait() == 130
    assert f"Come back with: rose finetune {command} {job.id}" in said.decode()
    assert (await api.openai.fine_tuning.jobs.retrieve(job.id)).status == "validating_files"


async def test_a_stream_that_breaks_goes_on_where_it_was_and_says_so() -> None:
    """What a restarted server does to a watcher: a cut, refusals while Postgres recovers, then the rest."""
    asked: list[bytes] = []
    away = b'{"error": {"message": "Postgres does not answer.", "type": "server_error", "code": null}}'
    rest = b'"created_at": 0, "level": "info", "type": "message", "data": {}'
    frame = b'id: ftevent_%b\ndata: {"id": "ftevent_x", "message": "%b", ' + rest + b"}\n\n"
    ended = wire.job(msgspec.structs.replace(initial, status="succeeded"), now=0.0)
    streams = [
        (200, frame % (b"1", b"one")),
        (503, away),
        (503, away),
        (200, frame % (b"2", b"two") + b"data: [DONE]\n\n"),
    ]

    async def serve(stream: SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive())
            if b"/events" in asked[-1]:
                status, body = streams.pop(0)
                kind = b"text/event-stream" if status == 200 else b"application/json"
            else:
                status, kind, body = 200, b"application/json", msgspec.json.encode(ended)
            await stream.send(b"HTTP/1.1 %d x\r\nconnection: close\r\ncontent-type: %b\r\n\r\n" % (status, kind) + body)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        done = await call("finetune", "events", f"ftjob_{'a' * 20}", environment={"ROSE_URL": url})
        tasks.cancel_scope.cancel()
    assert done.status == 0, done.err
    assert [line.split()[-1] for line in done.out.splitlines()] == ["one", "two"]
    assert done.err == "Postgres does not answer. Trying again…\n"
    assert b"ftevent_1" not in asked[0]
    assert all(b"last-event-id: ftevent_1\r\n" in request.lower() for request in asked[1:4])


async def test_a_closed_pipe_is_no_error(rose: Rose, api: Running, seed_file: Path) -> None:
    await api.upload(seed_file)
    command = f"{sys.executable} -m cli.app files list | true; echo ${{PIPESTATUS[0]}}"
    variables = {**os.environ, "ROSE_URL": api.services.settings.url}
    done = await anyio.run_process(["bash", "-c", command], env=variables, stderr=subprocess.PIPE)
    assert b"Traceback" not in done.stderr


async def test_a_prompt_may_come_from_a_pipe(rose: Rose) -> None:
    done = await rose("chat", "--model", "tiny", text="")
    assert done.status == 2
    assert "There is no prompt" in done.err
