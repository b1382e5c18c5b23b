-- Why a job is paused is a value of its own; until here the words began with it (rose/domain/catalogue.py: job.paused).
update rose.jobs
set doc = doc || jsonb_build_object(
    'pause_cause',
    case when starts_with(doc ->> 'paused_because', 'no_space: ') or doc ->> 'paused_because' = 'the disk is full'
         then 'no_space' else 'requested' end,
    'paused_because', regexp_replace(doc ->> 'paused_because', '^no_space: ', '')
)
where doc ->> 'paused_because' is not null;
