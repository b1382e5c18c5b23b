"""The key view: one row per key, written by the append itself, and what recognises a secret."""

from __future__ import annotations

import hashlib

import anyio
import bcrypt
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
select exists(select from rose.keys where not revoked and kind = 'api') as guarded,
       (select keys.doc from rose.keys join rose.key_hashes on key_hashes.key_id = keys.id
        where key_hashes.sha256 = $1 and not revoked and kind = 'api'
          and not exists (select from rose.projects where projects.id = keys.project and archived)) as doc
"""
REMEMBER = "insert into rose.key_hashes (sha256, key_id) values ($1, $2) on conflict do nothing"
IN_USE = "select count(*) as count from rose.keys where not revoked and kind = 'api'"
OTHERS = """
select count(*) as count from rose.keys
where not revoked and kind = 'api' and id <> $1 and doc ->> 'scope' = 'admin'
"""
REMEMBER_PASSWORD = "insert into rose.nats_passwords (key_id, bcrypt) values ($1, $2) on conflict do nothing"
READERS = """
select id, project, bcrypt from rose.keys join rose.nats_passwords on key_id = id
where not revoked and kind = 'nats'
  and not exists (select from rose.projects where projects.id = keys.project and archived)
  and coalesce((doc ->> 'expires_at')::bigint > $1, true)
order by id
"""
TAKEN = "update rose.nats_passwords set taken = true where key_id = any($1) and not taken"
IS_TAKEN = "select taken from rose.nats_passwords where key_id = $1"
BCRYPT_ROUNDS = 4
"""The least there is: a password of 256 random bits needs no slow hash, and nats-server checks it at each reload."""
POLL_SECONDS = 0.05


class Reader(msgspec.Struct, frozen=True, kw_only=True):
    """A key in use that opens its project's subjects in NATS."""

    key_id: str
    project: str
    bcrypt: str
    """Its password as nats-server checks it."""


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


async def remember_password(pool: Pool, password: str, key_id: str) -> None:
    """Keep what nats-server recognises the password of a key by. Raises: Unavailable."""
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(BCRYPT_ROUNDS))
    await fetch(pool, REMEMBER_PASSWORD, key_id, hashed.decode())


async def readers(pool: Pool, now: int) -> tuple[Reader, ...]:
    """Return the keys that open NATS at `now` (Unix seconds), by id. Raises: Unavailable."""
    rows = await fetch(pool, READERS, now)
    return tuple(Reader(key_id=row["id"], project=row["project"], bcrypt=row["bcrypt"]) for row in rows)


async def note_taken(pool: Pool, key_ids: list[str]) -> None:
    """Note that a nats-server lets the holders of these keys in. Raises: Unavailable."""
    await fetch(pool, TAKEN, key_ids)


async def wait_taken(pool: Pool, key_id: str, timeout_seconds: float) -> bool:
    """Return whether a nats-server has taken the key over, at the latest after `timeout_seconds`.

    Raises: Unavailable.
    """
    with anyio.move_on_after(timeout_seconds):
        while True:
            found = await fetch_row(pool, IS_TAKEN, key_id)
            if found is not None and found["taken"]:
                return True
            await anyio.sleep(POLL_SECONDS)
    return False


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
