"""`/v1/models`: bases that have a name here, fine-tuned models, their checkpoints and their files as an archive."""

from __future__ import annotations

import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from litestar import Response
from litestar.params import FromPath
from litestar.response import Stream

from projections import models as models_view
from projections import permissions as permissions_view
from projections.damage import DamagedRow
from rose.api import schema, wire
from rose.api.asking import asked, stored_answer
from rose.api.content import attachment, read_blob
from rose.api.errors import AnyRequest
from rose.api.model_names import Tuned, find_aliased, find_tuned, imported_bases, known_bases, tuned_aliases
from rose.api.principal import ThePrincipal
from rose.api.routes import delete, get
from rose.api.services import Services, TheServices
from rose.decoding import check_values
from rose.errors import InvalidRequest, NotFound
from rose.missing import missing_model

TAR_BLOCK = 512
TAR_END = bytes(2 * TAR_BLOCK)


@get("/v1/models")
async def list_models(services: TheServices, principal: ThePrincipal) -> schema.ModelListing:
    """List fine-tuned models, newest first, then the bases that have a name here."""
    tuned = [
        wire.damaged_model(state)
        if isinstance(state, models_view.DamagedModel)
        else wire.fine_tuned_model(state, _folder(services, state.artifact.path if state.artifact else ""))
        for state in await models_view.newest_first(services.pool, principal.project)
    ]
    for name in await _lent_names(services, principal.project):
        with suppress(DamagedRow):  # whose it is sees that
            lent = await find_tuned(services, principal.project, name)
            if lent is not None:
                tuned.append(_tuned(services, lent, principal.project))
    imported = imported_bases(services)
    bases = [wire.base_model(name, source, imported.get(source)) for name, source in known_bases(services).items()]
    return schema.ModelListing(data=[*tuned, *await _aliased(services, principal.project), *bases])


@get("/v1/models/{model:path}")
async def get_model(services: TheServices, principal: ThePrincipal, model: FromPath[str]) -> schema.Model:
    """Describe a model, a checkpoint or a base."""
    name = _name(model)
    try:
        tuned = await find_tuned(services, principal.project, name) or await find_aliased(
            services, principal.project, name
        )
    except DamagedRow as error:
        damaged = error.remains
        if isinstance(damaged, models_view.DamagedModel) and damaged.project == principal.project:
            return wire.damaged_model(damaged)
        raise
    if tuned is not None:
        return _tuned(services, tuned, principal.project)
    known = known_bases(services)
    if name in known or name in known.values():
        source = known.get(name, name)
        return wire.base_model(name, source, imported_bases(services).get(source))
    raise missing_model(name)


@delete("/v1/models/{model:path}", answer=schema.Deleted)
async def delete_model(
    request: AnyRequest, services: TheServices, principal: ThePrincipal, model: FromPath[str]
) -> Response[Any]:
    """End a fine-tuned model's use for new requests; its checkpoints go with it."""
    name = _name(model)
    asking, answered = await asked(request, services, b"")
    if answered is not None:
        return stored_answer(answered)
    found = await models_view.by_name(services.pool, principal.project, name)
    if found is None:
        raise await _undeletable(services, principal.project, name)
    gone = msgspec.json.encode(schema.Deleted(id=name, object="model"))
    await services.commands.delete_model(found.job_id, int(time.time()), asking, respond=lambda _: gone)
    return Response(gone, status_code=200, media_type="application/json")


@get("/v1/adapters/{model:path}", other="application/x-tar")
async def download_model(services: TheServices, principal: ThePrincipal, model: FromPath[str]) -> Stream:
    """Send the files of a fine-tuned model or checkpoint (PEFT's format, or a whole model) as a tar archive."""
    name = _name(model)
    tuned = await find_tuned(services, principal.project, name)
    if tuned is None or tuned.project != principal.project:
        raise missing_model(name)
    folder = services.blobs.path(tuned.artifact.path)
    await anyio.to_thread.run_sync(services.blobs.verify, tuned.artifact)
    files = await anyio.to_thread.run_sync(_files, folder)
    archive = name.replace(":", "-").replace("/", "-")
    return Stream(
        _tar(folder, files, archive, tuned.created_at),
        media_type="application/x-tar",
        headers={"content-disposition": attachment(f"{archive}.tar")},
    )


async def _tar(folder: Path, files: list[Path], top: str, created_at: int) -> AsyncIterator[bytes]:
    """Yield a tar archive of `files` with one folder `top` in it; memory is bounded by one piece."""
    for file in files:
        entry = tarfile.TarInfo(f"{top}/{file.relative_to(folder).as_posix()}")
        entry.size = (await anyio.Path(file).stat()).st_size
        entry.mtime = created_at
        yield entry.tobuf(tarfile.PAX_FORMAT)
        async for piece in read_blob(anyio.Path(file)):
            yield piece
        yield bytes(-entry.size % TAR_BLOCK)
    yield TAR_END


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def _aliased(services: Services, project: str) -> list[schema.Model]:
    """Return the fine-tuned models of a project that have an alias, under that."""
    found: list[schema.Model] = []
    for alias, target in tuned_aliases(services).items():
        with suppress(NotFound, DamagedRow):  # it is being made; or the list shows it under its own name
            tuned = await find_tuned(services, project, target)
            if tuned is not None:
                found.append(msgspec.structs.replace(_tuned(services, tuned, project), id=alias))
    return found


async def _lent_names(services: Services, project: str) -> list[str]:
    """Return the names of other projects' models that this one may use, without those that it has itself."""
    own = {state.name for state in await models_view.newest_first(services.pool, project)}
    names = [permission.model for permission in await permissions_view.of_grantee(services.pool, project)]
    return [name for name in dict.fromkeys(names) if name not in own]


def _tuned(services: Services, tuned: Tuned, project: str) -> schema.Model:
    """Return a model as a project sees it: of a lent one only what it needs to use it."""
    own = tuned.project == project
    return schema.Model(
        id=tuned.name,
        object="model",
        created=tuned.created_at,
        owned_by=schema.ORGANIZATION,
        kind=tuned.kind,
        source=tuned.base.source,
        job_id=tuned.job_id if own else msgspec.UNSET,
        base_model=tuned.base,
        step=tuned.step,
        artifact=tuned.artifact if own else msgspec.UNSET,
        folder=_folder(services, tuned.artifact.path) if own else msgspec.UNSET,
    )


def _folder(services: Services, path: str) -> str:
    return str(services.blobs.path(path))


def _name(parameter: str) -> str:
    """Return the model's name; a path parameter starts with a slash of its own."""
    name = parameter.removeprefix("/")
    check_values({"model": name})
    return name


async def _undeletable(services: Services, project: str, name: str) -> InvalidRequest | NotFound:
    known = known_bases(services)
    if name in known or name in known.values():
        return InvalidRequest(
            f"{name} is a base model; only fine-tuned models can be deleted.", code="base_model", param="model"
        )
    target = tuned_aliases(services).get(name)
    if target is not None:
        return InvalidRequest(
            f"{name} is an alias of {target}; the setting model_aliases has it.", code="alias", param="model"
        )
    tuned = await find_tuned(services, project, name)
    if tuned is not None and tuned.project == project:
        return InvalidRequest(
            f"{name} is a checkpoint; it goes when its model is deleted.", code="checkpoint", param="model"
        )
    return missing_model(name)


HANDLERS = (list_models, get_model, delete_model, download_model)
