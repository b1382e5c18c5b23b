-- Lists cost the same however long they are. A generated column that an append does not change keeps its row's update
-- within the page, which an index on an expression of doc would not.
alter table rose.jobs add column metadata jsonb generated always as (nullif(doc -> 'metadata', 'null')) stored;
create index jobs_metadata on rose.jobs using gin (metadata jsonb_path_ops);
create index jobs_waiting on rose.jobs (project, status, created_position)
    where status in ('validating_files', 'queued', 'running', 'paused');

-- Files that have expired stay in their place; the indexes know them, so that a list passes over them without a look
-- at their rows.
alter table rose.files add column expires_at bigint generated always as ((doc ->> 'expires_at')::bigint) stored;
drop index rose.files_created;
create index files_listed on rose.files (project, created_position) include (expires_at) where not deleted;
create index files_of_purpose on rose.files (project, purpose, created_position) include (expires_at) where not deleted;
