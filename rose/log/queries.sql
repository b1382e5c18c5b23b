-- Every query of rose/log and rose/leases.py, by name. What writes events is in migrations/append.sql.

-- name: append
-- Append events with their entity rows and lease changes; the only statement that writes the log.
select last_position, replayed, stored_response
from rose.append($1::text, $2::text, $3::bytea, $4::jsonb, $5::jsonb);

-- name: read_stream
-- Events of one stream after a position, in order. A null limit means all.
select position, stream_id, version, event_id, type, schema, data, epoch, metadata, recorded_at
from rose.events where stream_id = $1 and position > $2 order by position limit $3;

-- name: read_all
-- Events of the whole log after a position, in order.
select position, stream_id, version, event_id, type, schema, data, epoch, metadata, recorded_at
from rose.events where position > $1 order by position limit $2;

-- name: head
-- Position of the newest event, and the log's identity.
select position, log_id from rose.log_head;

-- name: end_of_stream
-- Position of a stream's newest event.
select coalesce(max(position), 0) as position from rose.events where stream_id = $1;

-- name: load_jobs
-- State and version of one job.
select doc, version from rose.jobs where id = $1;

-- name: load_files
-- State and version of one file.
select doc, version from rose.files where id = $1;

-- name: load_models
-- State and version of one model.
select doc, version from rose.models where id = $1;

-- name: load_projects
-- State and version of one project.
select doc, version from rose.projects where id = $1;

-- name: load_keys
-- State and version of one key.
select doc, version from rose.keys where id = $1;

-- name: load_uploads
-- State and version of one upload in parts.
select doc, version from rose.uploads where id = $1;

-- name: load_permissions
-- State and version of one checkpoint permission.
select doc, version from rose.permissions where id = $1;

-- name: find_command
-- The stored answer of a command.
select command_id, request_hash, response, position, created_at from rose.commands where command_id = $1;

-- name: find_request
-- The newest answer to an equal request of the last seconds, for retries that carry no key.
select command_id, request_hash, response, position, created_at from rose.commands
where request_hash = $1 and created_at > clock_timestamp() - make_interval(secs => $2)
order by created_at desc limit 1;

-- name: forget_commands
-- Remove up to $2 commands that are older than $1 seconds; those that another process is removing are its affair.
-- (statement_timestamp, since an index cannot be searched for what clock_timestamp says anew for each row.)
with old as (
    select command_id from rose.commands
    where created_at < statement_timestamp() - make_interval(secs => $1)
    order by created_at limit $2
    for update skip locked
), gone as (
    delete from rose.commands using old where commands.command_id = old.command_id returning 1
)
select count(*)::int as gone from gone;

-- name: renew_lease
-- Prolong a lease that is still alive; an expired one is never revived.
update rose.leases set lease_until = clock_timestamp() + make_interval(secs => $5)
where job_id = $1 and kind = $2 and epoch = $3 and owner = $4 and lease_until > clock_timestamp()
returning job_id;

-- name: training_candidates
-- Jobs that a trainer may claim: queued ones whose time has come, and running ones whose owner is gone. Those of the
-- project that has the fewest runs come first, in a project the oldest. $2, $3: runs and position to go on behind.
with runs as (
    select jobs.project, count(*)::int as count from rose.jobs join rose.leases on leases.job_id = jobs.id
    where jobs.status = 'running' and leases.lease_until > clock_timestamp() group by 1
),
chosen as (
    select jobs.id, jobs.created_position, coalesce(runs.count, 0) as runs
    from rose.jobs left join rose.leases on leases.job_id = jobs.id left join runs on runs.project = jobs.project
    where jobs.status in ('queued', 'running')
      and (leases.lease_until is null or leases.lease_until <= clock_timestamp())
      and (leases.not_before is null or leases.not_before <= clock_timestamp())
      and (coalesce(runs.count, 0), jobs.created_position) > ($2::int, $3::bigint)
    order by runs, jobs.created_position limit $1
)
select jobs.id, jobs.doc, jobs.version, chosen.created_position, chosen.runs,
       coalesce(jobs.doc -> 'run', 'null') <> 'null' as expired
from chosen join rose.jobs on jobs.id = chosen.id order by chosen.runs, chosen.created_position;

-- name: validation_candidates
-- Jobs whose files nobody validates, in the same order.
with runs as (
    select jobs.project, count(*)::int as count from rose.jobs join rose.leases on leases.job_id = jobs.id
    where jobs.status = 'validating_files' and leases.lease_until > clock_timestamp() group by 1
),
chosen as (
    select jobs.id, jobs.created_position, coalesce(runs.count, 0) as runs
    from rose.jobs left join rose.leases on leases.job_id = jobs.id left join runs on runs.project = jobs.project
    where jobs.status = 'validating_files'
      and (leases.lease_until is null or leases.lease_until <= clock_timestamp())
      and (leases.not_before is null or leases.not_before <= clock_timestamp())
      and (coalesce(runs.count, 0), jobs.created_position) > ($2::int, $3::bigint)
    order by runs, jobs.created_position limit $1
)
select jobs.id, jobs.doc, jobs.version, chosen.created_position, chosen.runs,
       coalesce(jobs.doc -> 'run', 'null') <> 'null' as expired
from chosen join rose.jobs on jobs.id = chosen.id order by chosen.runs, chosen.created_position;

-- name: announce_worker
-- Say that a process is there, and forget those that have been gone for a day.
with gone as (
    delete from rose.workers where id in (
        select id from rose.workers where last_seen < clock_timestamp() - interval '1 day' for update skip locked)
)
insert into rose.workers (id, kind, host, url, capabilities, pid) values ($1, $2, $3, $4, $5, $6)
on conflict (id) do update set
    kind = excluded.kind, host = excluded.host, url = excluded.url, capabilities = excluded.capabilities,
    pid = excluded.pid, last_seen = clock_timestamp();

-- name: withdraw_worker
-- Say that a process is gone.
delete from rose.workers where id = $1;

-- name: live_workers
-- Processes of a kind (null: of all) that were seen in the last seconds.
select id, kind, host, url, capabilities, pid from rose.workers
where ($1::text is null or kind = $1) and last_seen > clock_timestamp() - make_interval(secs => $2)
order by started_at, id;

-- name: waiting_facts
-- What explains why jobs of a project wait, for a page of them. Of a queue no more than $3 are counted; $4: seconds
-- after which a trainer that was not seen is gone. Times are seconds from now.
with asked as (
    select jobs.id, jobs.status, jobs.created_position, leases.kind, leases.epoch, leases.owner, leases.attempts,
           coalesce(leases.lease_until > clock_timestamp(), false) as alive,
           coalesce(extract(epoch from leases.lease_until - clock_timestamp())::float8, 0) as seconds_left,
           greatest(coalesce(extract(epoch from leases.not_before - clock_timestamp())::float8, 0), 0)
               as seconds_held_back
    from rose.jobs left join rose.leases on leases.job_id = jobs.id
    where jobs.id = any($2) and jobs.project = $1
),
queue as (
    select created_position, row_number() over (order by created_position) - 1 as before
    from (
        select created_position from rose.jobs
        where project = $1 and status = 'queued' order by created_position limit $3
    ) as oldest
),
runs as (
    select count(*) as count from rose.jobs join rose.leases on leases.job_id = jobs.id
    where jobs.project = $1 and jobs.status = 'running' and leases.lease_until > clock_timestamp()
),
trainers as (
    select coalesce(jsonb_agg(jsonb_build_object(
        'id', id, 'kind', kind, 'host', host, 'url', url, 'capabilities', capabilities, 'pid', pid
    ) order by started_at, id), '[]')::text as found
    from rose.workers where kind = 'trainer' and last_seen > clock_timestamp() - make_interval(secs => $4)
)
select asked.id, asked.kind, asked.epoch, asked.owner, asked.alive, asked.seconds_left, asked.seconds_held_back,
       asked.attempts, trainers.found as trainers,
       case when asked.status = 'queued' then coalesce(queue.before, $3) else 0 end::int as queued_before,
       (runs.count - (asked.status = 'running' and asked.alive)::int)::int as running_now
from asked left join queue on queue.created_position = asked.created_position cross join runs cross join trainers;
