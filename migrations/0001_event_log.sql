-- The event log, the entity rows that every append writes with it, and the operational tables beside it.
-- What each column means is said here once; the functions that write are in append.sql.

create schema if not exists rose;

-- Identity and end of this log: one row, whose lock makes commit order and position order the same.
create table rose.log_head (
    singleton boolean primary key default true check (singleton),
    log_id    uuid    not null default gen_random_uuid(),
    position  bigint  not null default 0
) with (fillfactor = 50);
insert into rose.log_head default values;

-- One row per stream; its lock is the mutex of the entity.
create table rose.streams (
    stream_id  text   primary key,
    version    bigint not null default 0,           -- events in the stream
    project_id text   not null default 'default'    -- one project until there are several
) with (fillfactor = 70);

create table rose.events (
    position    bigint      primary key,            -- 1, 2, 3, ... without a gap, in commit order
    stream_id   text        not null,
    version     bigint      not null,               -- 1, 2, 3, ... in the stream
    event_id    uuid        not null unique default gen_random_uuid(),
    type        text        not null,               -- wire name, for example job.created
    schema      smallint    not null,
    data        jsonb       not null,
    metadata    jsonb       not null,               -- actor, request_id, command_id
    epoch       bigint,                             -- lease epoch, for what a trainer wrote
    recorded_at timestamptz not null default clock_timestamp(),
    unique (stream_id, version)
);
create index events_stream_position on rose.events (stream_id, position);

create function rose.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'the event log is immutable: % of rose.events is refused', lower(tg_op)
        using errcode = 'RS005', hint = 'Append an event that says what changed instead.';
end
$$;
create trigger events_immutable before update or delete on rose.events
    for each row execute function rose.refuse_change();
create trigger events_never_truncated before truncate on rose.events
    for each statement execute function rose.refuse_change();
alter table rose.events enable always trigger events_immutable;
alter table rose.events enable always trigger events_never_truncated;

-- Every command that was accepted, so that asking again with the same id gives the same answer.
create table rose.commands (
    command_id   text        primary key,           -- the Idempotency-Key, or derived, or random
    request_hash text,
    response     bytea,
    position     bigint      not null default 0,    -- of its last event
    created_at   timestamptz not null default clock_timestamp()
) with (fillfactor = 70);
create index commands_request on rose.commands (request_hash, created_at) where request_hash is not null;

-- Entity rows: doc is the state that the stream's events make, version how many they are.
-- created_position is the position of the entity's first event: lists are ordered by it, newest first.
create table rose.jobs (
    id               text   primary key,
    doc              jsonb  not null,
    version          bigint not null,
    created_position bigint,
    status           text   generated always as (doc ->> 'status') stored,
    model_name       text   generated always as (doc ->> 'model_name') stored,
    constraint jobs_model_name_taken unique (model_name)
) with (fillfactor = 70);
create index jobs_created on rose.jobs (created_position);
create index jobs_unfinished on rose.jobs (status, created_position)
    where status in ('validating_files', 'queued', 'running', 'paused');

create table rose.files (
    id               text    primary key,
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    purpose          text    generated always as (doc ->> 'purpose') stored,
    deleted          boolean generated always as ((doc ->> 'deleted_at') is not null) stored
);
create index files_created on rose.files (created_position);

create table rose.models (
    id               text    primary key,            -- the job that made it
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    name             text    generated always as (doc ->> 'name') stored,
    deleted          boolean generated always as ((doc ->> 'deleted_at') is not null) stored
);
create index models_created on rose.models (created_position);
create unique index models_name_taken on rose.models (name) where not deleted;

-- How far each asynchronous view has read. Several versions exist while one is rebuilt.
create table rose.projections (
    name       text        not null,
    version    int         not null,
    position   bigint      not null default 0,
    status     text        not null default 'running',   -- running, building, or stopped
    error      text,                                     -- why it stopped
    updated_at timestamptz not null default clock_timestamp(),
    primary key (name, version)
);

-- Who owns a job. Not a view: no rebuild touches it. Times are of the database's clock.
create table rose.leases (
    job_id      text   primary key,
    kind        text   not null check (kind in ('validation', 'training')),
    epoch       bigint not null,                    -- fencing token; only ever rises
    owner       text   not null,
    lease_until timestamptz,                        -- null: given back or revoked
    not_before  timestamptz,                        -- earliest next claim
    attempts    int    not null default 0           -- claims so far; the count that matters is in the job's state
) with (fillfactor = 50);

-- Processes that are there.
create table rose.workers (
    id           text        primary key,
    kind         text        not null,              -- api, projections, trainer, inference
    host         text        not null,
    url          text,
    capabilities jsonb       not null default '{}',
    pid          int         not null,
    started_at   timestamptz not null default clock_timestamp(),
    last_seen    timestamptz not null default clock_timestamp()
) with (fillfactor = 50);
