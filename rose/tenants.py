"""Projects and API keys: what can be asked of them, as rose/commands.py does for files, jobs and models."""

from __future__ import annotations

import secrets
from functools import reduce
from typing import TYPE_CHECKING

import bcrypt
import msgspec

from projections import keys as keys_view
from projections import projects as projects_view
from rose.commands import Outcome, Request, Respond
from rose.domain import keys, projects
from rose.errors import Conflict, InvalidState, NotFound
from rose.log import read
from rose.log.append import Appended, StreamWrite, append

if TYPE_CHECKING:
    from rose.log.pool import Pool

PREFIXES: dict[keys.Kind, str] = {"api": "sk-rose-", "nats": "nk-rose-"}
SECRET_BYTES = 32
HINT_CHARACTERS = 4
BCRYPT_ROUNDS = 4
"""The fewest: a secret of 256 random bits needs no slow hash, and NATS compares it at each connection."""
MAX_TRIES = 10


def new_secret(kind: keys.Kind = "api") -> str:
    """Return a fresh key: `sk-rose-`, of NATS `nk-rose-`, and 43 characters, 256 random bits."""
    return PREFIXES[kind] + secrets.token_urlsafe(SECRET_BYTES)


class Tenants:
    """Everything that can be asked of projects and keys. Safe to share between tasks; holds no state of its own."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create_project(
        self, command: projects.CreateProject, request: Request, respond: Respond
    ) -> Outcome[projects.ProjectState]:
        """Create a project. Raises: Unavailable."""
        return await self._project(command.project, command, projects.initial, 0, request, respond)

    async def change_project(
        self, project: str, command: projects.RenameProject | projects.ArchiveProject, request: Request
    ) -> projects.ProjectState:
        """Rename or archive a project. Raises: NotFound; InvalidState for the default one; Unavailable."""
        if project == projects.DEFAULT_PROJECT:
            raise InvalidState("The default project is always there and keeps its name.", code="default_project")
        for _ in range(MAX_TRIES):
            found = await read.load_row(self._pool, "projects", project)
            if found is None:
                raise missing_project(project)
            state = msgspec.json.decode(found[0], type=projects.ProjectState)
            try:
                return (await self._project(project, command, state, found[1], request)).state
            except Conflict:
                continue
        raise Conflict(f"Another writer was first {MAX_TRIES} times in a row.")

    async def create_key(self, command: keys.CreateKey, secret: str, request: Request) -> keys.KeyState:
        """Create a key that is recognised by `secret`, which is kept as a hash only: one of NATS by NATS alone.

        Raises: InvalidState for the first key of all when it cannot administer, and when the request is repeated;
        Unavailable.
        """
        if command.kind == "nats":
            password_hash = bcrypt.hashpw(secret.encode(), bcrypt.gensalt(BCRYPT_ROUNDS)).decode()
            await keys_view.remember_password(self._pool, command.key_id, password_hash)
            return await self._create_key(command, request)
        if command.scope != "admin" and not await keys_view.other_administrators(self._pool, command.key_id):
            raise InvalidState(
                "The first key must have the scope admin.",
                code="first_key",
                hint="From the first key on every call needs one, and somebody must be able to make more.",
            )
        await keys_view.remember(self._pool, secret, command.key_id)
        return await self._create_key(command, request)

    async def _create_key(self, command: keys.CreateKey, request: Request) -> keys.KeyState:
        state, write = _key_write(command, keys.initial, 0)
        done = await self._append([write], request)
        # An append whose answer was lost is asked again and then counts as repeated, too; but then this key is there.
        if done.replayed and await keys_view.get(self._pool, command.project, command.key_id) is None:
            raise InvalidState(
                "This request was answered before, and the key's secret was shown then; it is not kept.",
                code="secret_gone",
                hint="If the secret is lost, revoke that key and create another with a fresh Idempotency-Key.",
            )
        return state

    async def revoke_keys(self, states: list[keys.KeyState], at: int, request: Request) -> None:
        """End the use of keys at once, all or none. Raises: NotFound, InvalidState for the last administrator's."""
        for state in states:
            if state.scope == "admin":
                await self._require_another_administrator(state)
        for _ in range(MAX_TRIES):
            writes: list[StreamWrite] = []
            for state in states:
                found = await read.load_row(self._pool, "keys", state.id)
                if found is None:
                    raise missing_key(state.id)
                loaded = msgspec.json.decode(found[0], type=keys.KeyState)
                writes.append(_key_write(keys.RevokeKey(at=at), loaded, found[1])[1])
            try:
                await self._append(writes, request)
                return
            except Conflict:
                continue
        raise Conflict(f"Another writer was first {MAX_TRIES} times in a row.")

    async def _require_another_administrator(self, state: keys.KeyState) -> None:
        in_use = await keys_view.in_use(self._pool)
        others = await keys_view.other_administrators(self._pool, state.id)
        if not others and in_use > 1:
            raise InvalidState(
                f"{state.id} is the last key that may administer.",
                code="last_administrator",
                hint="Create another key with the scope admin first, or revoke the other keys before this one.",
            )

    async def _project(
        self,
        project: str,
        command: projects.Command,
        state: projects.ProjectState,
        version: int,
        request: Request,
        respond: Respond | None = None,
    ) -> Outcome[projects.ProjectState]:
        events = projects.decide(command, state)
        after = reduce(projects.evolve, events, state)
        outcome = Outcome(state=after, version=version + len(events), events=events, position=None)
        if not events:
            return outcome
        write = StreamWrite(
            stream_id=f"project/{project}", expected_version=version, events=events, row=projects_view.row(after)
        )
        appended = await self._append([write], request, respond(after) if respond else None)
        return msgspec.structs.replace(outcome, replayed=appended.replayed, response=appended.response)

    async def _append(self, writes: list[StreamWrite], request: Request, response: bytes | None = None) -> Appended:
        return await append(
            self._pool,
            writes,
            command_id=request.command_id,
            request_hash=request.request_hash,
            response=response,
            actor=request.actor,
        )


def missing_project(project: str) -> NotFound:
    """Return the error for a project that there is not."""
    return NotFound(
        f"There is no project {project}.",
        code="project_not_found",
        param="project_id",
        hint="`rose projects list` shows the projects there are.",
    )


def missing_key(key_id: str) -> NotFound:
    """Return the error for a key that there is not, or not any more."""
    return NotFound(
        f"There is no API key {key_id}.",
        code="key_not_found",
        param="key_id",
        hint="`rose keys list` shows the keys there are.",
    )


def _key_write(command: keys.Command, state: keys.KeyState, version: int) -> tuple[keys.KeyState, StreamWrite]:
    events = keys.decide(command, state)
    after = reduce(keys.evolve, events, state)
    write = StreamWrite(stream_id=f"key/{after.id}", expected_version=version, events=events, row=keys_view.row(after))
    return after, write
