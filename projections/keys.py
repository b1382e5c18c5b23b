"""The key view: one row per API key, written by the append itself, and what recognises a secret."""

from __future__ import annotations

import hashlib

import msgspec

from projections.paging import Page
from rose.domain.keys import KeyState, ServiceAccount
from rose.log.append import EntityRow
from rose.log.pool import Pool, fetch, fetch_row

# Of a project, newest first. $2: id to start behind; an unknown one gives no row. $4: service account.
LIST = """
select doc from rose.keys
where project = $1 and not revoked
  and ($2::text is null or created_position < (select created_position from rose.keys where id = $2 and project = $1))
  and ($4::text is null or doc -> 'account' ->> 'id' = $4)
order by created_position desc limit $3
"""
# Accounts of a project with a key in use, by the position of their first key, newest first.
ACCOUNTS = """
with found as (
    select doc -> 'account' ->> 'id' as id, min(created_position) as first,
           (array_agg(doc -> 'account'))[1]::text as account
    from rose.keys where project = $1 and not revoked group by 1
)
select account from found
where $2::text is null or first < (select first from found where id = $2)
order by first desc limit $3
"""
GET = "select doc from rose.keys where project = $1 and id = $2 and not revoked"
RECOGNISE = """
select exists(select from rose.keys where not revoked and coalesce(doc ->> 'kind', 'api') = 'api') as guarded,
       (select keys.doc from rose.keys join rose.key_hashes on key_hashes.key_id = keys.id
        where key_hashes.sha256 = $1 and not revoked
          and not exists (select from rose.projects where projects.id = keys.project and archived)) as doc
"""
REMEMBER = "insert into rose.key_hashes (sha256, key_id) values ($1, $2) on conflict do nothing"
IN_USE = "select count(*) as count from rose.keys where not revoked and coalesce(doc ->> 'kind', 'api') = 'api'"
OTHERS = "select count(*) as count from rose.keys where not revoked and id <> $1 and doc ->> 'scope' = 'admin'"


REMEMBER_PASSWORD = "insert into rose.nats_passwords (key_id, bcrypt) values ($1, $2) on conflict do nothing"
NATS_READERS = """
select keys.id, keys.project, nats_passwords.bcrypt
from rose.keys join rose.nats_passwords on nats_passwords.key_id = keys.id
where not revoked and coalesce((doc ->> 'expires_at')::bigint, 9223372036854775807) > $1
  and not exists (select from rose.projects where projects.id = keys.project and archived)
order by keys.id
"""


class NatsReader(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who may read a project's events on NATS."""

    key_id: str
    project: str
    bcrypt: str
    """Hash of the password, as nats-server compares it."""


def row(state: KeyState) -> EntityRow:
    """Return the row that stands for `state`; its document is the state, so it is also the snapshot."""
    return EntityRow(kind="keys", id=state.id, doc=msgspec.json.encode(state))


async def get(pool: Pool, project: str, key_id: str) -> KeyState | None:
    """Return the project's key, or None when it has none of that id or it was revoked. Raises: Unavailable."""
    found = await fetch_row(pool, GET, project, key_id)
    return None if found is None else msgspec.json.decode(found["doc"], type=KeyState)


async def newest_first(
    pool: Pool, project: str, *, limit: int, after: str | None = None, account: str | None = None
) -> Page[KeyState]:
    """Return up to `limit` keys of the project (and account) that were not revoked, newest first.

    Raises: Unavailable.
    """
    rows = await fetch(pool, LIST, project, after, limit + 1, account)
    return Page.cut([msgspec.json.decode(found["doc"], type=KeyState) for found in rows], limit)


async def accounts(pool: Pool, project: str, *, limit: int, after: str | None = None) -> Page[ServiceAccount]:
    """Return up to `limit` service accounts of the project that have a key in use. Raises: Unavailable."""
    rows = await fetch(pool, ACCOUNTS, project, after, limit + 1)
    return Page.cut([msgspec.json.decode(found["account"], type=ServiceAccount) for found in rows], limit)


async def recognise(pool: Pool, secret: str) -> tuple[bool, KeyState | None]:
    """Say whether there is any key in use, and which one the secret belongs to, in a project that is not archived.

    Raises: Unavailable.
    """
    found = await fetch_row(pool, RECOGNISE, digest(secret))
    assert found is not None
    return found["guarded"], msgspec.json.decode(found["doc"], type=KeyState) if found["doc"] else None


async def remember(pool: Pool, secret: str, key_id: str) -> None:
    """Keep what recognises the secret of a key that is about to be created. Raises: Unavailable."""
    await fetch(pool, REMEMBER, digest(secret), key_id)


async def remember_password(pool: Pool, key_id: str, password_hash: str) -> None:
    """Keep the bcrypt hash of a NATS key that is about to be created. Raises: Unavailable."""
    await fetch(pool, REMEMBER_PASSWORD, key_id, password_hash)


async def nats_readers(pool: Pool, now: int) -> list[NatsReader]:
    """Return who may read on NATS at `now` (Unix seconds). Raises: Unavailable."""
    return [
        NatsReader(key_id=found["id"], project=found["project"], bcrypt=found["bcrypt"])
        for found in await fetch(pool, NATS_READERS, now)
    ]


async def other_administrators(pool: Pool, key_id: str) -> int:
    """Return how many keys in use besides this one may administer. Raises: Unavailable."""
    found = await fetch_row(pool, OTHERS, key_id)
    assert found is not None
    return found["count"]


async def in_use(pool: Pool) -> int:
    """Return how many keys were not revoked. Raises: Unavailable."""
    found = await fetch_row(pool, IN_USE)
    assert found is not None
    return found["count"]


def digest(secret: str) -> bytes:
    """Return what is kept of a secret. It has 256 random bits, so a plain hash is as good as a slow one."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
