-- Uploads in parts: rose/domain/uploads.py. The parts themselves lie in the blob folder, below uploads/<id>/.
create table rose.uploads (
    id               text   primary key,
    doc              jsonb  not null,
    version          bigint not null,
    created_position bigint
);
