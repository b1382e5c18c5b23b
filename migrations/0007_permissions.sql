-- Which project may use a model of another one: rose/domain/permissions.py.
create table rose.permissions (
    id               text    primary key,
    doc              jsonb   not null,
    version          bigint  not null,
    created_position bigint,
    project          text    generated always as (doc ->> 'project') stored,   -- whose model it is
    grantee          text    generated always as (doc ->> 'grantee') stored,   -- who may use it
    model            text    generated always as (doc ->> 'model') stored,
    withdrawn        boolean generated always as ((doc ->> 'withdrawn_at') is not null) stored
);
create index permissions_of_model on rose.permissions (project, model, created_position) where not withdrawn;
create index permissions_of_grantee on rose.permissions (grantee, model) where not withdrawn;
