"""Output and exit status of the commands: data on stdout, talk on stderr, the same facts in every form."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest
from anyio.abc import SocketAttribute, SocketStream

from rose.domain.job_values import ServedAsTrained
from rose.local import state
from tests.api.running import Running, Trainer
from tests.cli.conftest import Rose, call

pytestmark = pytest.mark.anyio

ID = "[a-z2-7]{20}"


async def test_upload_prints_the_line_that_the_workflow_promises(rose: Rose, seed_file: Path) -> None:
    done = await rose("upload", str(seed_file), "--purpose", "fine-tune")
    assert done.status == 0, done.err
    assert done.out.startswith("File uploaded: file_")
    assert done.err == ""


async def test_every_form_of_a_list_has_the_same_facts(rose: Rose, seed_file: Path) -> None:
    file_id = (await rose("upload", str(seed_file), "--quiet")).out.strip()
    plain = (await rose("files", "list")).out
    assert plain.startswith(f"{file_id}\ttraining_data.jsonl\tfine-tune\t")
    [thing] = msgspec.json.decode((await rose("files", "list", "--json")).out)
    assert (thing["id"], thing["object"]) == (file_id, "file")
    assert (await rose("files", "list", "-q")).out == f"{file_id}\n"
    shown = (await rose("files", "get", "last")).out
    assert f"id        {file_id}" in shown
    assert f"size      {seed_file.stat().st_size} B" in shown


async def test_ids_may_be_shortened_while_they_are_unique(rose: Rose, seed_file: Path) -> None:
    ids = [(await rose("upload", str(seed_file), "-q")).out.strip() for _ in range(2)]
    assert (await rose("files", "get", ids[0][:16], "-q")).out.strip() == ids[0]
    both = await rose("files", "get", "file_")
    assert both.status == 2
    assert "is the beginning of 2 ids" in both.err
    assert (await rose("files", "get", "last", "-q")).out.strip() == ids[1]


async def test_a_download_is_the_upload(rose: Rose, seed_file: Path, tmp_path: Path) -> None:
    await rose("upload", str(seed_file))
    assert (await rose("files", "download", "last")).out == seed_file.read_text()
    target = tmp_path / "copy.jsonl"
    assert (await rose("files", "download", "last", "--to", str(target))).status == 0
    assert target.read_bytes() == seed_file.read_bytes()
    assert not target.with_name("copy.jsonl.part").exists()
    nowhere = await rose("files", "download", "last", "--to", str(tmp_path / "no" / "x"))
    assert nowhere.status == 3
    assert f"There is no folder {tmp_path / 'no'}" in nowhere.err
    onto = await rose("files", "download", "last", "--to", str(tmp_path))
    assert (onto.status, onto.err.splitlines()[0]) == (2, f"error[no_such_file]: {tmp_path} is a folder.")


async def test_broken_data_is_refused_by_line_and_nothing_is_uploaded(rose: Rose, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"messages": [{"role": "bot", "content": "a"}]}\n\n{"messages": [{"role": "user", "content": "a"}]}\n{"a" 1}\n'
    )
    for command in (["upload", str(broken)], ["finetune", "create", str(broken), "--model", "tiny"]):
        done = await rose(*command)
        assert done.status == 6
        assert done.err.splitlines()[0] == "error[invalid_dataset]: broken.jsonl has 3 problems; nothing was uploaded"
        assert [line.split()[1] for line in done.err.splitlines()[1:]] == ["2", "4", "5"]
    assert (await rose("files", "list", "-q")).out == ""
    assert (await call("files", "check", str(broken))).status == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data.json", "Convert it: rose files convert FILE -o OUT.jsonl"),
        ("data.jsonl.gz", "Convert it: rose files convert FILE -o OUT.jsonl"),
        ("data", "If it holds one conversation per line, rename it so that its name ends in .jsonl."),
    ],
)
async def test_check_upload_and_server_give_one_answer_about_a_name(
    rose: Rose, seed_file: Path, tmp_path: Path, name: str, hint: str
) -> None:
    """The content is good, and nobody takes it under this name."""
    other = tmp_path / name
    other.write_bytes(seed_file.read_bytes())
    said = f"Invalid file format for Fine-Tuning API. Must be .jsonl; this file is named '{name}'."
    asked = [
        ["files", "check", str(other)],
        ["upload", str(other)],
        ["upload", str(other), "--no-check"],
        ["finetune", "create", str(other), "--model", "tiny"],
    ]
    for command in asked:
        done = await rose(*command)
        assert done.status in (2, 6), command
        assert done.err.splitlines()[0].startswith(f"error[invalid_file_format]: {said}"), (command, done.err)
        assert hint in done.err
    assert (await rose("files", "list", "-q")).out == ""
    upper = tmp_path / "DATA.JSONL"
    upper.write_bytes(seed_file.read_bytes())
    for command in (["files", "check", str(upper)], ["upload", str(upper)]):
        assert (await rose(*command)).status == 0


async def test_a_good_file_passes_the_check_without_a_server(seed_file: Path) -> None:
    done = await call("files", "check", str(seed_file), environment={"ROSE_URL": "http://127.0.0.1:1"})
    assert (done.status, done.out) == (0, "training_data.jsonl: 2 examples, no problems\n")
    assert done.err.startswith("warning: 2 examples are few")


async def test_create_from_a_path_uploads_once(rose: Rose, seed_file: Path) -> None:
    for said in ("File uploaded", "Already uploaded"):
        done = await rose("finetune", "create", str(seed_file), "--model", "tiny", "--suffix", "a")
        assert done.status == 0, done.err
        assert done.out.startswith("Fine-tuning job created: ftjob_")
        assert said in done.err
        assert "no trainer is connected" in done.err
    assert len((await rose("files", "list", "-q")).out.split()) == 1


async def test_every_knob_reaches_the_job(rose: Rose, seed_file: Path) -> None:
    flags = {
        "--epochs": "5",
        "--batch-size": "8",
        "--learning-rate": "2.0",
        "--validation-split": "0.5",
        "--early-stopping-patience": "3",
        "--warmup-ratio": "0.1",
        "--thinking": "on",
        "--lora-r": "4",
        "--lora-alpha": "8",
        "--lora-dropout": "0.05",
        "--target-modules": "q_proj",
        "--seed": "7",
        "--metadata": "team=a",
    }
    arguments = [part for pair in flags.items() for part in pair]
    done = await rose("finetune", "create", str(seed_file), "--model", "tiny", *arguments, "--use-lora", "--json")
    job = msgspec.json.decode(done.out)
    assert job["hyperparameters"] == {
        "n_epochs": 5,
        "batch_size": 8,
        "learning_rate_multiplier": 2.0,
        "validation_split": 0.5,
        "early_stopping_patience": 3,
        "warmup_ratio": 0.1,
        "thinking": True,
        "use_lora": True,
        "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj"]},
    }
    assert (job["seed"], job["metadata"]) == (7, {"team": "a"})


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["files", "get", "file_aaaaaaaaaaaaaaaaaaaa"], 3, "No such File object"),
        (["finetune", "get", "ftjob_aaaaaaaaaaaaaaaaaaaa"], 3, "Could not find fine tune"),
        (["finetune", "get", "last"], 3, "There is no job yet"),
        (["models", "get", "no-such-model"], 3, "does not exist"),
        (["upload", "no-such-file.jsonl"], 3, "There is no file no-such-file.jsonl"),
        (["finetune", "create", "no-such-file.jsonl", "--model", "tiny"], 2, "There is no file"),
        (["finetune", "create", "x"], 2, "--model"),
        (["finetune", "creat"], 2, 'Did you mean "create"'),
        (["chat"], 3, "There is no fine-tuned model yet"),
        (["chat", "hi", "--model", "no-such-model"], 3, "does not exist"),
        (["models", "build", "huge"], 2, "ROSE can build tiny"),
        (["models", "import", "/nowhere.gguf"], 2, "There is no file or folder /nowhere.gguf"),
        (["models", "import", __file__, "--name", "tiny"], 2, "A base cannot be called 'tiny': ROSE uses that name"),
        (["models", "import", __file__, "--name", "qwen-coder"], 2, "it is an alias"),
        (["models", "import", __file__, "--chat-template", "/none"], 2, "There is no file /none"),
        (["models", "pull", "not a model"], 2, "neither an alias nor a hub id"),
        (["finetune", "list", "--limit", "0"], 2, "Must be >= 1"),
        (["logs", "api", "-n", "-1"], 2, "Must be >= 0"),
        (["logs", "no-such-log"], 3, "`rose logs` lists those there are"),
        (["upload", "/"], 2, "/ is a folder"),
        (["files", "get", "nope"], 3, "`rose files list` shows"),
        (["finetune", "watch", "nope"], 3, "`rose finetune list` shows"),
        (["models", "delete", "nope"], 3, "`rose models list` shows"),
        (["projections", "rebuild", "nope"], 7, "There is no database"),
    ],
)
async def test_errors_name_the_thing_and_have_their_status(
    shared_rose: Rose, private_folder: Path, arguments: list[str], status: int, says: str
) -> None:
    done = await shared_rose(*arguments, ROSE_DATA_DIR=str(private_folder))
    assert (done.status, done.out) == (status, "")
    assert says in done.err


async def test_a_wrong_number_names_the_flag(rose: Rose, seed_file: Path) -> None:
    done = await rose("finetune", "create", str(seed_file), "--model", "tiny", "--epochs", "many")
    assert done.status == 2
    assert "--epochs is 'many'; it must be a number or auto" in done.err
    done = await rose("finetune", "create", str(seed_file), "--model", "tiny", "--epochs", "99")
    assert done.status == 2
    assert "n_epochs is 99; it must be auto or a whole number from 1 to 50" in done.err


@pytest.mark.parametrize("command", [["list"], ["events", f"ftjob_{'a' * 20}"], ["watch", f"ftjob_{'a' * 20}"]])
async def test_no_server_says_how_to_get_one(command: list[str]) -> None:
    done = await call("finetune", *command, environment={"ROSE_URL": "http://127.0.0.1:1"})
    assert done.status == 7
    assert "No ROSE server answers at http://127.0.0.1:1" in done.err
    assert "rose up" in done.err


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "502 Bad Gateway"])
async def test_another_server_at_the_address_is_named(status: str) -> None:
    async def greet(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(f"HTTP/1.1 {status}\r\ncontent-length: 5\r\n\r\nhello".encode())

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)
        url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        done = await call("files", "list", environment={"ROSE_URL": url})
        tasks.cancel_scope.cancel()
    assert done.status == 7
    assert f"What answers at {url} is no ROSE server (status {status[:3]})" in done.err


async def test_without_an_address_the_rose_of_the_data_folder_is_meant(api: Running) -> None:
    given = api.services.settings
    running = state.Running(pid=1, url=given.url, data_dir=str(given.data_dir), started_at="2026-01-01T00:00:00")
    environment = {"ROSE_DATA_DIR": str(given.data_dir), "ROSE_PORT": "1"}
    with state.hold(given):
        state.store(given, running)
        assert (await call("files", "list", environment=environment)).status == 0
    assert (await call("files", "list", environment=environment)).status == 7


async def test_events_stream_until_the_job_ends(api: Running, rose: Rose, seed_file: Path) -> None:
    job = await api.job(seed_file, suffix="x")
    await Trainer(api.services, job.id).run_to_success()
    done = await rose("finetune", "events", "last")
    lines = done.out.splitlines()
    assert done.status == 0
    assert f"Created fine-tuning job: {job.id}" in lines[0]
    assert lines[-1].endswith("The job has successfully completed")
    assert sum("Step " in line for line in lines) == 50
    listed = (await rose("finetune", "events", "last", "--no-follow")).out.splitlines()
    assert listed == lines
    watched = await rose("finetune", "watch", job.id)
    assert watched.status == 0
    assert f"Model: {job.id and (await rose('models', 'get', 'last', '-q')).out.strip()}" in watched.out


async def test_how_a_job_ended_is_the_exit_status(api: Running, rose: Rose, seed_file: Path) -> None:
    failing = await api.job(seed_file)
    trainer = Trainer(api.services, failing.id)
    await trainer.validate()
    await trainer.start()
    await trainer.fail("training_diverged", "the loss is not a number")
    done = await rose("finetune", "watch", failing.id)
    assert done.status == 8
    assert "the loss is not a number" in done.err
    shown = (await rose("finetune", "get", failing.id)).out
    assert "error       training_diverged: the loss is not a number" in shown
    assert "log         /logs/run.log" in shown
    cancelled = await api.job(seed_file)
    assert (await rose("finetune", "cancel", cancelled.id)).out == f"Job cancelled: {cancelled.id}\n"
    assert (await rose("finetune", "watch", cancelled.id)).status == 9
    again = await rose("finetune", "cancel", cancelled.id)
    assert again.status == 5
    assert "is cancelled; cancel is possible only when" in again.err


async def test_get_shows_every_setting_with_its_reason(api: Running, rose: Rose, seed_file: Path) -> None:
    job = await api.job(seed_file)
    waiting = (await rose("finetune", "get", job.id)).out
    assert "waits       no trainer is connected" in waiting
    await Trainer(api.services, job.id).validate()
    shown = (await rose("finetune", "get", job.id)).out
    assert "n_epochs = 25   (3 epochs over 2 examples are under 100, so min(25, 100 // 2))" in shown
    assert "base        tiny" in shown


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            ServedAsTrained(
                status="proven",
                rows=32,
                tokens=812,
                held_out=True,
                largest_difference=3.1e-5,
                mean_difference=2e-6,
                largest_allowed=0.01,
                trained_as="fp32",
                served_as="fp16",
            ),
            "as trained: largest difference 3.1e-05 (bound 0.01), mean 2e-06, over 812 tokens of 32 held-out rows; "
            "trained in fp32, served in fp16",
        ),
        (
            ServedAsTrained(status="not_proven", reason="no inference engine is connected"),
            "not proven to be as trained: no inference engine is connected",
        ),
    ],
)
async def test_get_says_how_the_model_is_served(
    api: Running, rose: Rose, seed_file: Path, found: ServedAsTrained, line: str
) -> None:
    job = await api.job(seed_file)
    trainer = Trainer(api.services, job.id)
    await trainer.validate()
    await trainer.start()
    await trainer.succeed(served_as_trained=found)
    assert f"served      {line}\n" in (await rose("finetune", "get", job.id)).out
    assert (await api.openai.fine_tuning.jobs.retrieve(job.id)).model_extra["served_as_trained"][
        "status"
    ] == found.status  # type: ignore[index]


async def test_pause_and_resume(api: Running, rose: Rose, seed_file: Path) -> None:
    job = await api.job(seed_file)
    assert (await rose("finetune", "pause", job.id)).status == 5
    await Trainer(api.services, job.id).validate()
    assert (await rose("finetune", "pause", "last")).out == f"Job paused: {job.id}\n"
    assert (await rose("finetune", "resume", "last")).out == f"Job resumed: {job.id}\n"
    rows = (await rose("finetune", "list")).out
    assert rows.startswith(f"{job.id}\tqueued\ttiny\t")


async def test_the_log_and_its_views_from_the_command_line(api: Running, seed_file: Path, database_dsn: str) -> None:
    job = await api.job(seed_file)
    on = {"ROSE_DATABASE_URL": database_dsn, "ROSE_DATA_DIR": str(api.services.settings.data_dir)}
    tail = await call("events", "tail", "--no-follow", environment=on)
    assert [line.split("\t")[3] for line in tail.out.splitlines()] == ["file.uploaded", "job.created"]
    assert (await call("db", "status", environment=on)).out.splitlines()[0].endswith("\tapplied")
    assert (await call("db", "migrate", environment=on)).out == "Nothing to do: all migrations are in.\n"
    assert (await call("projections", "verify", environment=on)).status == 0
    await api.services.pool.execute("update rose.jobs set doc = jsonb_set(doc, '{model}', '\"other\"')")
    named = await call("projections", "verify", environment=on)
    assert named.status == 1
    assert job.id in named.out
    assert (await call("projections", "rebuild", "jobs", environment=on)).status == 0
    assert (await call("projections", "verify", environment=on)).status == 0
    listed = (await call("projections", "list", environment=on)).out
    assert {line.split("\t")[0] for line in listed.splitlines()} >= {"metrics", "checkpoints"}
