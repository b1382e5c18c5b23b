"""The command `rose`: its commands by name, loaded only when called, and the one place that turns errors into exits."""

from __future__ import annotations

import sys

from cyclopts import App

import rose
from cli import output
from rose.errors import RoseError

INTERRUPTED = 130

app = App(
    name="rose",
    help="The fine-tuning API on your own hardware.",
    help_epilogue="Begin with `rose quickstart`, or `rose up` and then `rose upload data.jsonl`.",
    version=rose.__version__,
    help_format="plaintext",
    result_action="return_value",
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)


def _command(parent: App, name: str, target: str, text: str) -> None:
    parent.command(f"cli.commands.{target}", name=name, help=text)


_command(app, "up", "server:up", "Start everything on this machine: Postgres, NATS, API, trainer and inference.")
_command(app, "down", "server:down", "Stop what `rose up --detach` started.")
_command(app, "status", "server:status", "Say what runs here and how it is.")
_command(app, "serve", "server:serve", "Run one service: api, projections, trainer or inference.")
_command(app, "logs", "server:logs", "Print the log of a service or of a run.")
_command(app, "doctor", "doctor:doctor", "Check this machine and this installation, and say what mends each problem.")
_command(app, "quickstart", "quickstart:quickstart", "Fine-tune a small model from upload to chat, and compare.")
_command(app, "upload", "files:upload", "Upload a file; training data is checked first.")
_command(app, "chat", "chat:chat", "Ask a model; without a prompt, have a conversation.")

files = App(name="files", help="Uploaded files.")
_command(files, "list", "files:list_files", "List files, newest first.")
_command(files, "get", "files:get", "Show a file.")
_command(files, "download", "files:download", "Download a file's content.")
_command(files, "delete", "files:delete", "Delete a file.")
_command(files, "check", "files:check", "Check training data without a server.")
_command(files, "preview", "preview:preview", "Show lines as a model sees them, with what is learned marked.")
_command(files, "convert", "convert:convert", "Convert data of other services and tools to chat JSONL.")
app.command(files)

finetune = App(name="finetune", help="Fine-tuning jobs.")
_command(finetune, "create", "finetune:create", "Create a job from an uploaded file, or from a path.")
_command(finetune, "list", "finetune:list_jobs", "List jobs, newest first.")
_command(finetune, "get", "finetune:get", "Show a job: its state, what it waits for, every setting and why.")
_command(finetune, "events", "finetune:events", "Stream a job's events until it ends.")
_command(finetune, "watch", "finetune:watch", "Watch a job train: step, epoch, loss, speed, time left.")
_command(finetune, "checkpoints", "finetune:checkpoints", "List a job's checkpoints.")
_command(finetune, "metrics", "metrics:metrics", "Show what a job measured, step by step or at a glance.")
_command(finetune, "cancel", "finetune:cancel", "End a job.")
_command(finetune, "pause", "finetune:pause", "Hold a job until it is resumed.")
_command(finetune, "resume", "finetune:resume", "Go on with a paused job.")
app.command(finetune)

models = App(name="models", help="Base models and fine-tuned models.")
_command(models, "list", "models:list_models", "List models.")
_command(models, "get", "models:get", "Show a model and where its files are.")
_command(models, "delete", "models:delete", "Delete a fine-tuned model.")
_command(models, "download", "models:download", "Download a fine-tuned model's adapter as an archive.")
_command(models, "import", "models:import_file", "Make a base model of a GGUF or of a model folder.")
_command(models, "pull", "models:pull", "Download a base model: smollm2, or one of the hub.")
_command(models, "build", "models:build", "Build the toy model `tiny` on this machine; no download.")
app.command(models)

graders = App(name="graders", help="Graders: what an answer is worth.")
_command(graders, "run", "graders:run", "Grade one answer, and say what went wrong.")
_command(graders, "validate", "graders:validate", "Check that a grader can be used.")
app.command(graders)

projects = App(name="projects", help="Projects: each sees nothing of the others.")
_command(projects, "create", "projects:create_project", "Create a project.")
_command(projects, "list", "projects:list_projects", "List projects, newest first.")
_command(projects, "usage", "projects:show_usage", "Show what a project has done, stores and may.")
_command(projects, "archive", "projects:archive_project", "End a project's use.")
app.command(projects)

keys = App(name="keys", help="API keys; from the first one on every call needs one.")
_command(keys, "create", "projects:create_key", "Create a key and print it, this once.")
_command(keys, "list", "projects:list_keys", "List the keys in use.")
_command(keys, "nats-users", "database:nats_users", "Print the users that another's NATS server needs.")
_command(keys, "revoke", "projects:revoke_key", "End a key's use at once.")
app.command(keys)

webhooks = App(name="webhooks", help="Who is told when a job ends.")
_command(webhooks, "create", "webhooks:create", "Send events to an address and print the secret, this once.")
_command(webhooks, "list", "webhooks:list_webhooks", "List webhook endpoints, newest first.")
_command(webhooks, "get", "webhooks:get", "Show a webhook endpoint, and why it is switched off.")
_command(webhooks, "update", "webhooks:update", "Change a webhook endpoint, or switch it off and on.")
_command(webhooks, "delete", "webhooks:delete", "Delete a webhook endpoint.")
_command(webhooks, "test", "webhooks:try_out", "Send a made-up event and say what the receiver answers.")
_command(webhooks, "rotate-secret", "webhooks:rotate_secret", "Sign with a new secret, and print it, this once.")
app.command(webhooks)

db = App(name="db", help="The database.")
_command(db, "migrate", "database:migrate", "Bring the database to this version's tables.")
_command(db, "status", "database:status", "Show which migrations are in.")
app.command(db)

projections = App(name="projections", help="The views that are made from the log.")
_command(projections, "list", "database:list_projections", "List the views and how far they have read.")
_command(projections, "rebuild", "database:rebuild", "Make a view anew from the log.")
_command(projections, "verify", "database:verify", "Compare the views with the log; exit 1 when they differ.")
app.command(projections)

events = App(name="events", help="The log of all events.")
_command(events, "tail", "database:tail", "Print events, and new ones as they come.")
_command(events, "asyncapi", "documents:asyncapi", "Print the AsyncAPI document of the NATS subjects.")
_command(events, "rebuild-stream", "database:rebuild_stream", "Make the NATS stream anew from the log.")
app.command(events)


def main(arguments: list[str] | None = None) -> int:
    """Run `rose` and return its exit status, 0 when done; the others: docs/api.md, "Errors"."""
    from cyclopts import CycloptsError

    try:
        result = app(arguments, print_error=True, exit_on_error=False)
    except CycloptsError:
        return 2
    except RoseError as problem:
        output.error(problem, getattr(problem, "details", ()))
        return problem.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as problem:  # a file, folder or disk of this machine
        where = f"{problem.filename}: " if problem.filename else ""
        output.error(RoseError(f"{where}{problem.strerror or problem}", code="system_error"))
        return 1
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


if __name__ == "__main__":
    sys.exit(main())
