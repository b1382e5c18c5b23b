-- Why a job is paused was one text, `requested` or `no_space: ` and what happened; now a reason and its detail
-- (rose/domain/job_values.py). The row is the snapshot that the next decision starts from, so it says it the new way.
update rose.jobs
set doc = doc || jsonb_build_object(
    'paused_because', 'no_space',
    'pause_detail', regexp_replace(doc ->> 'paused_because', '^no_space: ', '')
)
where doc ->> 'paused_because' <> 'requested';
