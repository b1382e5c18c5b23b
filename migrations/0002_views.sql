-- Views that projections/runner.py fills from the log, after the append; each can be rebuilt at any time.
-- version is that of rose.projections: a rebuild writes a new one beside the one that is read, then switches.

create table rose.metrics (
    version  int    not null,
    job_id   text   not null,
    step     int    not null,
    doc      jsonb  not null,                       -- StepMetrics
    position bigint not null,                       -- of the event that reported it
    primary key (version, job_id, step)
);

create table rose.checkpoints (
    version  int    not null,
    id       text   not null,
    job_id   text   not null,
    step     int    not null,
    doc      jsonb  not null,                       -- Checkpoint
    position bigint not null,
    primary key (version, id)
);
create index checkpoints_job on rose.checkpoints (version, job_id, position);
