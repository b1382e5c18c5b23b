"""`rose quickstart`: one job from upload to chat, through the real parts, and base and result side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cli.options import Common
from rose import settings as settings_module
from rose.errors import RoseError, Unavailable
from rose.language_models.locate import SMOLLM2, TINY, imported, is_built, tiny_folder

if TYPE_CHECKING:
    from cli.client import Client
    from cli.output import Output
    from rose.settings import Settings

DATA = Path(__file__).parent.parent / "data"
MAX_ANSWER_TOKENS = 80
PAIRS_SHOWN = 2


@dataclass(frozen=True)
class Lesson:
    """A file to train on, and questions to ask base and result."""

    data: Path
    taught: tuple[str, ...]
    """Questions of the file."""
    new: tuple[str, ...]
    """Questions that are not in it."""


MANNER = Lesson(
    DATA / "quickstart.jsonl",
    taught=(),
    new=("What do cows eat?", "What is the opposite of hot?", "Who painted the Mona Lisa?", "How do I make tea?"),
)
"""A manner of answering, which a real model carries over to whatever it is asked."""
BY_HEART = Lesson(
    DATA / "quickstart-tiny.jsonl",
    taught=("What is ROSE?", "What happens when the power fails?", "Say goodbye."),
    new=("What is your favourite colour?",),
)
"""Answers that the toy learns by heart; it knows nothing that it could carry over."""


def quickstart(
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], env_var="ROSE_MODEL")] = SMOLLM2,
    keep: Annotated[bool, Parameter(env_var="ROSE_KEEP", negative="")] = False,
) -> int:
    """Fine-tune a small model from upload to chat, and compare it with its base.

    Starts ROSE if it does not run, and stops it again. Everything it shows is made while you look: nothing is stored.

    Parameters
    ----------
    model
        The base model; default: SmolLM2-135M-Instruct, fetched once (93 MB). `tiny` is a toy without any download.
    keep
        Leave ROSE running afterwards.
    """
    settings = settings_module.load()
    common = Common(api_key=settings.api_keys[0] if settings.api_keys else None)
    output = common.output
    _prepare(model, settings, output)
    started = _start(settings, output)
    try:
        with common.client() as client:
            status = _run(client, model, common)
    finally:
        if started and not keep:
            _stop(settings, output)
    if status == 0:
        _farewell(output, model, running=keep or not started)
    return status


def _prepare(model: str, settings: Settings, output: Output) -> None:
    """Fetch or build the model where ROSE does that, so that nothing is started in vain."""
    if model == SMOLLM2 and imported(settings.models, SMOLLM2) is None:
        from rose.language_models.import_process import import_into

        _headline(output, f"Fetching the base model {SMOLLM2!r} (SmolLM2-135M-Instruct, 93 MB, once)")
        made = import_into(settings.models, ["--smollm2"], settings.min_free_bytes)
        output.line(f"{made['source']} ({made['quantisation']}) is in {made['path']}")
    if model == TINY and not is_built(tiny_folder(settings.models)):
        _headline(output, f"Building the toy base model {TINY!r} (about a minute, once; a toy, not a language model)")
        _build(settings)


def _run(client: Client, model: str, common: Common) -> int:
    from cli.commands.files import require_good_data
    from cli.watching import watch_job

    output = common.output
    lesson = BY_HEART if model == TINY else MANNER
    count = require_good_data(lesson.data, "quickstart cannot run")
    _headline(output, f"1. Upload {lesson.data.name}: {count} conversations")
    if lesson is MANNER:
        for question, answer in _first_pairs(lesson.data):
            output.line(f"  {question} -> {answer}")
    file = client.upload(lesson.data, "fine-tune")
    output.line(f"File uploaded: {file.id}")
    _headline(output, "2. Create a fine-tuning job")
    job = client.create_job({"training_file": file.id, "model": model, "suffix": "quickstart"})
    output.line(f"Fine-tuning job created: {job.id}")
    _headline(output, "3. Watch it train")
    job = watch_job(client, job.id, common)
    if job.status != "succeeded":
        raise RoseError(
            f"The job {job.id} ended as {job.status}.",
            code="quickstart_failed",
            hint=f"What happened: rose finetune get {job.id}; rose logs {job.id}",
        )
    _headline(output, "4. Chat with base and result")
    assert job.fine_tuned_model is not None, "a job that succeeded has a model"
    models = (model, job.fine_tuned_model)
    for question in lesson.taught:
        _compare(client, question, models, output)
    output.line("\nAnd a question that was not in the file:" if lesson.taught else "None of this was in the file:")
    for question in lesson.new:
        _compare(client, question, models, output)
    return 0


def _first_pairs(data: Path) -> list[tuple[str, str]]:
    """Return the first questions and answers of the file, to be shown."""
    import json

    conversations = [json.loads(line)["messages"] for line in data.read_text().splitlines()[:PAIRS_SHOWN]]
    return [(question["content"], answer["content"]) for question, answer in conversations]


def _compare(client: Client, question: str, models: tuple[str, ...], output: Output) -> None:
    output.line(f"\n> {question}")
    for model in models:
        answer = client.chat(
            {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_completion_tokens": MAX_ANSWER_TOKENS,
            }
        )
        text = answer["choices"][0]["message"]["content"]
        output.line(f"  [{answer['model']}]\n    {_one_line(text)}")


def _start(settings: Settings, output: Output) -> bool:
    """Start ROSE unless it runs; return whether this call did."""
    import anyio

    from rose.local import state, supervise

    if state.held(settings):
        output.line(f"Using the ROSE that runs at {settings.url}")
        return False
    _headline(output, "Starting ROSE: Postgres, NATS, API, projections, trainer, inference")

    async def start() -> None:
        await supervise.up(settings, detach=True, on_line=output.line)

    anyio.run(start)
    return True


def _stop(settings: Settings, output: Output) -> None:
    from rose.local import state

    state.down(settings)
    output.line("\nROSE has stopped.")


def _build(settings: Settings) -> None:
    import subprocess
    import sys

    target = tiny_folder(settings.models)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "rose.language_models.tiny", str(target)], check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"Building {TINY} failed; the lines above say why.",
            hint="The trainer extra is needed: pip install 'rose[trainer]'",
        )


def _farewell(output: Output, model: str, *, running: bool) -> None:
    output.line("\nThat was one job from upload to chat. Next, with your own data:")
    if not running:
        output.line("  rose up                      (in one terminal; the model stays)")
    output.line("  rose upload training_data.jsonl")
    output.line(f"  rose finetune create last --model {model} --suffix my-model-v1 --watch")


def _headline(output: Output, text: str) -> None:
    output.line(f"\n== {text}")


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
