-- Commands are forgotten, the oldest first (rose/sweeper.py): what finds them.
create index commands_created on rose.commands (created_at);
