-- The functions that write the log; rose/log/migrate.py applies this file again whenever it has changed.
-- A function whose parameters change is dropped by a numbered migration first: here it would only get a sister.
--
-- Refusals carry an SQLSTATE of their own, which rose/log/append.py turns into rose.errors:
--   RS001  a stream is not at the expected version, or a live lease is in the way    Conflict
--   RS002  the writer's lease is lost                                                StaleEpoch
--   RS003  the command id was used for another request                               InvalidRequest
--   RS004  the call itself is wrong                                                  a bug in ROSE
--   RS005  the log is immutable (migration 0001)                                     a bug, or a hand in the database
--   RS006  the project would have more than a limit allows                           QuotaExceeded
--
-- Locks are always taken in this order, so appends cannot deadlock:
--   command id < a project's quota < stream rows, sorted < entity rows < lease rows < log_head.

-- Store the entity row of one write: insert or replace, found by its id. The kind is the table.
create or replace function rose.store_row(p_row jsonb, p_version bigint) returns void
language plpgsql as $$
begin
    if to_regclass(format('rose.%I', p_row ->> 'kind')) is null then
        raise exception 'there is no entity row of kind %', p_row ->> 'kind' using errcode = 'RS004';
    end if;
    execute format('insert into rose.%I (id, doc, version) values ($1, $2, $3) '
                   'on conflict (id) do update set doc = excluded.doc, version = excluded.version', p_row ->> 'kind')
    using p_row ->> 'id', p_row -> 'doc', p_version;
end
$$;

-- Give a new entity row its place in lists, once its first event has a position.
create or replace function rose.place_row(p_row jsonb, p_stream_id text) returns void
language plpgsql as $$
begin
    execute format('update rose.%I set created_position = $1 where id = $2', p_row ->> 'kind')
    using (select position from rose.events where stream_id = p_stream_id and version = 1), p_row ->> 'id';
end
$$;

-- Return until when the epoch owns the stream's job. Raises RS002 when it does not.
create or replace function rose.check_lease(p_stream_id text, p_epoch bigint) returns timestamptz
language plpgsql as $$
declare
    owned rose.leases;
begin
    select * into owned from rose.leases where job_id = split_part(p_stream_id, '/', 2);
    if owned.epoch is distinct from p_epoch then
        raise exception 'epoch % of % is stale: the newest is %', p_epoch, p_stream_id, coalesce(owned.epoch, 0)
            using errcode = 'RS002';
    end if;
    if owned.lease_until is null or owned.lease_until <= clock_timestamp() then
        raise exception 'the lease of epoch % on % has ended', p_epoch, p_stream_id using errcode = 'RS002';
    end if;
    return owned.lease_until;
end
$$;

-- Claim, give back or revoke the lease of the stream's job. The caller holds the stream's row.
create or replace function rose.change_lease(p_stream_id text, p_change jsonb) returns void
language plpgsql as $$
declare
    job      text := p_change ->> 'job_id';
    wanted   bigint := (p_change ->> 'epoch')::bigint;
    at       timestamptz := clock_timestamp();
    existing rose.leases;
begin
    if p_stream_id <> 'job/' || job then
        raise exception 'the lease of % is changed only with its own stream, not with %', job, p_stream_id
            using errcode = 'RS004';
    end if;
    select * into existing from rose.leases where job_id = job for update;
    case p_change ->> 'action'
    when 'claim' then
        if existing.lease_until > at then
            raise exception '% is owned by % (epoch %)', job, existing.owner, existing.epoch using errcode = 'RS001';
        end if;
        if existing.epoch >= wanted then
            raise exception 'epoch % of % was claimed before', wanted, job using errcode = 'RS001';
        end if;
        if existing.not_before > at then
            raise exception '% may not be claimed before %', job, existing.not_before using errcode = 'RS001';
        end if;
        insert into rose.leases (job_id, kind, epoch, owner, lease_until, not_before, attempts)
        values (job, p_change ->> 'kind', wanted, p_change ->> 'owner',
                at + make_interval(secs => (p_change ->> 'lease_seconds')::float8), null, 1)
        on conflict (job_id) do update set
            kind = excluded.kind, epoch = excluded.epoch, owner = excluded.owner,
            lease_until = excluded.lease_until, not_before = null, attempts = rose.leases.attempts + 1;
    when 'release' then
        if existing.epoch is distinct from wanted or existing.lease_until is null or existing.lease_until <= at then
            raise exception 'epoch % does not own % any more', wanted, job using errcode = 'RS002';
        end if;
        update rose.leases set
            lease_until = null,
            not_before = at + make_interval(secs => (p_change ->> 'not_before_seconds')::float8)
        where job_id = job;
    when 'revoke' then
        update rose.leases set lease_until = null where job_id = job;
    else
        raise exception 'there is no lease action %', p_change ->> 'action' using errcode = 'RS004';
    end case;
end
$$;

-- What a project stores, by kind. Uploads count with what was announced; deleted and expired things do not count.
create or replace function rose.stored_bytes(
    p_project text, out file_bytes bigint, out upload_bytes bigint, out model_bytes bigint
)
language plpgsql stable as $$
declare
    now_seconds bigint := extract(epoch from clock_timestamp());
begin
    select coalesce(sum(bytes), 0) into file_bytes from rose.files
    where project = p_project and not deleted and coalesce(expires_at > now_seconds, true);

    select coalesce(sum(bytes), 0) into upload_bytes from rose.uploads
    where project = p_project and not ended and expires_at > now_seconds;

    select coalesce(sum(bytes), 0) into model_bytes from (
        select (doc -> 'artifact' ->> 'bytes')::bigint as bytes from rose.models
        where project = p_project and not deleted
        union all
        select (checkpoint -> 'artifact' ->> 'bytes')::bigint
        from rose.jobs, jsonb_array_elements(doc -> 'checkpoints') as checkpoint
        where project = p_project
          and not exists (select from rose.models where models.id = jobs.id and models.deleted)
    ) as stored;
end
$$;

-- Refuse what would take a project over a limit. Until the commit no other append of the project passes here with the
-- same quota, so what was counted stays true.
create or replace function rose.check_quota(p_quota jsonb) returns void
language plpgsql as $$
declare
    owner text := p_quota ->> 'project';
    used  bigint;
begin
    perform pg_advisory_xact_lock(hashtextextended('rose.quota/' || (p_quota ->> 'of') || '/' || owner, 0));
    case p_quota ->> 'of'
    when 'jobs' then
        select count(*) into used from rose.jobs
        where project = owner and status in ('validating_files', 'queued', 'running', 'paused');
    when 'bytes' then
        select file_bytes + upload_bytes + model_bytes into used from rose.stored_bytes(owner);
    else
        raise exception 'there is no quota of %', p_quota ->> 'of' using errcode = 'RS004';
    end case;
    if used + (p_quota ->> 'adds')::bigint > (p_quota ->> 'most')::bigint then
        raise exception '% has % of % %', owner, used, p_quota ->> 'most', p_quota ->> 'of' using errcode = 'RS006';
    end if;
end
$$;

-- Append events to one or several streams, with their entity rows and lease changes, all or nothing.
--
-- p_writes is an array of {stream_id, expected_version, events: [{type, schema, data}], row: {kind, id, doc} | null,
-- epoch | null, lease | null, quota: {of, project, adds, most} | null}. Answers with the position of the last event; for a command id that was used before,
-- with what was stored then. One statement in autocommit, so that no client can pause while it holds log_head.
create or replace function rose.append(
    p_command_id   text,
    p_request_hash text,
    p_response     bytea,
    p_metadata     jsonb,
    p_writes       jsonb,
    out last_position   bigint,
    out replayed        boolean,
    out stored_response bytea
)
language plpgsql as $$
declare
    known       rose.commands;
    write       record;
    actual      bigint;
    event_count int;
    total       int := 0;
    owned_until timestamptz := 'infinity';
    recorded    timestamptz;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'rose.append needs read committed: each statement must see what the locks waited for'
            using errcode = 'RS004';
    end if;

    -- 1. The command id. A second command of the same id waits here until the first has committed or failed.
    insert into rose.commands (command_id, request_hash, response)
    values (p_command_id, p_request_hash, p_response)
    on conflict (command_id) do nothing;
    if not found then
        select * into known from rose.commands where command_id = p_command_id;
        if not found then  -- it was there a moment ago: the sweeper has forgotten it
            raise exception 'the command id % has just been forgotten', p_command_id using errcode = 'RS001';
        end if;
        if known.request_hash is distinct from p_request_hash then
            raise exception 'the command id % belongs to another request', p_command_id using errcode = 'RS003';
        end if;
        last_position := known.position;
        replayed := true;
        stored_response := known.response;
        return;
    end if;

    -- 2. The project's limit. Only here is a lock waited for while just the command id is held.
    perform rose.check_quota(value -> 'quota')
    from jsonb_array_elements(p_writes) where value -> 'quota' <> 'null';

    -- 3. Create, then lock, the stream rows, sorted by id. In statements of their own: one that also read the versions
    --    would read them from a snapshot taken before the lock was granted.
    insert into rose.streams (stream_id, project_id)
    select value ->> 'stream_id', coalesce(value -> 'row' -> 'doc' ->> 'project', 'default')
    from jsonb_array_elements(p_writes)
    where (value ->> 'expected_version')::bigint = 0
    order by 1
    on conflict (stream_id) do nothing;
    perform 1 from rose.streams
    where stream_id in (select value ->> 'stream_id' from jsonb_array_elements(p_writes))
    order by stream_id
    for update;

    for write in
        select value ->> 'stream_id' as stream_id, (value ->> 'expected_version')::bigint as expected_version,
               jsonb_array_length(value -> 'events') as event_count, nullif(value -> 'row', 'null') as row,
               (value ->> 'epoch')::bigint as epoch, nullif(value -> 'lease', 'null') as lease
        from jsonb_array_elements(p_writes)
        order by 1
    loop
        -- 4. Version and epoch.
        select version into actual from rose.streams where stream_id = write.stream_id;
        if coalesce(actual, 0) <> write.expected_version then
            raise exception '% is at version %, not %', write.stream_id, coalesce(actual, 0), write.expected_version
                using errcode = 'RS001';
        end if;
        if write.epoch is not null and write.lease ->> 'action' is distinct from 'claim' then
            owned_until := least(owned_until, rose.check_lease(write.stream_id, write.epoch));
        end if;
        -- 5. Stream, entity row, lease.
        update rose.streams set version = version + write.event_count where stream_id = write.stream_id;
        if write.row is not null then
            perform rose.store_row(write.row, write.expected_version + write.event_count);
        end if;
        if write.lease is not null then
            perform rose.change_lease(write.stream_id, write.lease);
        end if;
        total := total + write.event_count;
    end loop;

    -- 6. Last: the positions. From here to the commit no other append can pass, so nothing below waits for a lock.
    update rose.log_head set position = position + total returning position into last_position;
    recorded := clock_timestamp();
    if owned_until <= recorded then
        raise exception 'the lease ended while the append waited for its turn' using errcode = 'RS002';
    end if;
    insert into rose.events (position, stream_id, version, type, schema, data, metadata, epoch, recorded_at)
    select last_position - total + row_number() over (order by writes.ordinality, events.ordinality),
           writes.value ->> 'stream_id',
           (writes.value ->> 'expected_version')::bigint + events.ordinality,
           events.value ->> 'type',
           (events.value ->> 'schema')::smallint,
           events.value -> 'data',
           p_metadata,
           coalesce(
               (writes.value ->> 'epoch')::bigint,
               case when writes.value -> 'lease' ->> 'action' = 'claim'
                    then (writes.value -> 'lease' ->> 'epoch')::bigint end
           ),
           recorded
    from jsonb_array_elements(p_writes) with ordinality as writes,
         jsonb_array_elements(writes.value -> 'events') with ordinality as events;
    perform rose.place_row(value -> 'row', value ->> 'stream_id')
    from jsonb_array_elements(p_writes)
    where (value ->> 'expected_version')::bigint = 0 and value -> 'row' <> 'null';
    update rose.commands set position = last_position where command_id = p_command_id;
    perform pg_notify('rose', last_position::text);
    replayed := false;
    stored_response := p_response;
end
$$;
