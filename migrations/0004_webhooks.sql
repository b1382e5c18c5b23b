-- Webhook endpoints: rose/domain/webhooks.py.
create table rose.webhooks (
    id               text    primary key,
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    project          text    generated always as (doc ->> 'project') stored,
    enabled          boolean generated always as ((doc ->> 'disabled') is null) stored,
    deleted          boolean generated always as ((doc ->> 'deleted_at') is not null) stored
);
create index webhooks_created on rose.webhooks (project, created_position) where not deleted;

-- What signs is not in the log; the log names it. Not a view: no rebuild touches it.
create table rose.webhook_secrets (
    id         text        primary key,
    secret     text        not null,
    created_at timestamptz not null default clock_timestamp()
);

-- What goes to which endpoint, planned from the log (rose/webhooks/delivery.py). Operational: no rebuild touches it.
create table rose.webhook_deliveries (
    webhook_id       text        not null,
    position         bigint      not null,                  -- of the event in the log
    project          text        not null,
    type             text        not null,                  -- for example fine_tuning.job.succeeded
    subject_id       text        not null,                  -- id of the job
    happened_at      bigint      not null,                  -- Unix seconds
    state            text        not null default 'pending',-- pending, delivered, failed or given_up
    attempts         int         not null default 0,
    first_attempt_at timestamptz,
    next_at          timestamptz default clock_timestamp(), -- null when there is nothing more to do
    last_status      int,                                   -- what the receiver answered; null when it did not
    last_error       text,
    finished_at      timestamptz,
    primary key (webhook_id, position)
);
create index webhook_deliveries_due on rose.webhook_deliveries (webhook_id, next_at, position) where next_at is not null;
create index webhook_deliveries_finished on rose.webhook_deliveries (finished_at) where finished_at is not null;
