-- Lists cost the same however long they are. A generated column that an append does not change keeps its row's update
-- within the page; an index on an expression of doc would not.
alter table rose.jobs add column metadata jsonb generated always as (nullif(doc -> 'metadata', 'null')) stored;
create index jobs_metadata on rose.jobs using gin (metadata jsonb_path_ops);
create index jobs_waiting on rose.jobs (project, status, created_position)
    where status in ('validating_files', 'queued', 'running', 'paused');
create index files_of_purpose on rose.files (project, purpose, created_position) where not deleted;
