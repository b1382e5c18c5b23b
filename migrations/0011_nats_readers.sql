-- What a NATS server is told of the keys that read there (rose/nats_readers.py): like the hashes of API keys it is not in
-- the log, and no rebuild touches it.
create table rose.nats_passwords (
    key_id text primary key,
    bcrypt text not null
);
