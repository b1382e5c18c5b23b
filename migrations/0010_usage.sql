-- Limits and usage of projects.

-- What a project stores: rose.stored_bytes in append.sql adds it up.
alter table rose.files add column bytes bigint generated always as ((doc -> 'artifact' ->> 'bytes')::bigint) stored;
create index files_stored on rose.files (project) include (bytes, expires_at) where not deleted;
alter table rose.uploads
    add column project    text    generated always as (doc ->> 'project') stored,
    add column bytes      bigint  generated always as ((doc ->> 'bytes')::bigint) stored,
    add column expires_at bigint  generated always as ((doc ->> 'expires_at')::bigint) stored,
    add column ended      boolean generated always as
        (doc ->> 'completed_at' is not null or doc ->> 'cancelled_at' is not null) stored;
create index uploads_pending on rose.uploads (project, expires_at) include (bytes) where not ended;

-- Tokens of answers, counted by the API processes (rose/usage.py). Operational: no rebuild touches it. Each process
-- writes totals of its own, so that writing again counts nothing twice; who reads adds them up.
create table rose.usage (
    project           text   not null,
    hour              bigint not null,                -- Unix seconds of its beginning
    model             text   not null,
    process           text   not null,
    requests          bigint not null,
    prompt_tokens     bigint not null,
    completion_tokens bigint not null,
    primary key (project, hour, model, process)
);
create index usage_hour on rose.usage (hour);

-- A view (projections/runs.py): one row for each training run of a job, from its start to the last that was heard of it.
create table rose.runs (
    version    int         not null,
    job_id     text        not null,
    epoch      bigint      not null,                  -- lease epoch
    started_at timestamptz not null,
    last_at    timestamptz not null,
    primary key (version, job_id, epoch)
);
