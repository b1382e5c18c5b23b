-- Keys that open a project's subjects in NATS and nothing of the API: rose/readers.py. What is older opens the API.
alter table rose.keys add column kind text generated always as (coalesce(doc ->> 'kind', 'api')) stored;
drop index rose.keys_in_use;
create index keys_in_use on rose.keys (id) where not revoked and kind = 'api';
create index keys_of_readers on rose.keys (id) where not revoked and kind = 'nats';

-- The password of such a key as nats-server checks it. Not a view: no rebuild touches it.
create table rose.nats_passwords (
    key_id text    primary key,
    bcrypt text    not null,
    taken  boolean not null default false   -- whether a nats-server has once taken the key over
);
