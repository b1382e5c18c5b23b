-- Projects: whose a job, file or model is stands in its document from the first event on; what is older is default's.

update rose.jobs set doc = doc || '{"project": "default"}' where not doc ? 'project';
update rose.files set doc = doc || '{"project": "default"}' where not doc ? 'project';
update rose.models set doc = doc || '{"project": "default"}' where not doc ? 'project';

alter table rose.jobs add column project text generated always as (doc ->> 'project') stored;
alter table rose.files add column project text generated always as (doc ->> 'project') stored;
alter table rose.models add column project text generated always as (doc ->> 'project') stored;

alter table rose.jobs drop constraint jobs_model_name_taken;
alter table rose.jobs add constraint jobs_model_name_taken unique (project, model_name);
drop index rose.models_name_taken;
create unique index models_name_taken on rose.models (project, name) where not deleted;

drop index rose.jobs_created;
drop index rose.files_created;
drop index rose.models_created;
create index jobs_created on rose.jobs (project, created_position);
create index files_created on rose.files (project, created_position);
create index models_created on rose.models (project, created_position);

-- Entities of their own: rose/domain/projects.py and rose/domain/keys.py.
create table rose.projects (
    id               text    primary key,
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    archived         boolean generated always as ((doc ->> 'archived_at') is not null) stored
);
create index projects_created on rose.projects (created_position);

create table rose.keys (
    id               text    primary key,
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    project          text    generated always as (doc ->> 'project') stored,
    revoked          boolean generated always as ((doc ->> 'revoked_at') is not null) stored
);
create index keys_created on rose.keys (project, created_position);
create index keys_in_use on rose.keys (id) where not revoked;

-- The secret of a key is not in the log: here is what recognises it. Not a view: no rebuild touches it.
create table rose.key_hashes (
    sha256 bytea primary key,
    key_id text  not null
);
