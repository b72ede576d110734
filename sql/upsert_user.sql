-- Takes the time for a create of `count` tasks and counts them, unless the user would have more than max_tasks. Creates
-- the user's row with their first task, and takes a new email or name from the token. Other changes of the user wait
-- until the transaction ends.
-- Parameters: user_id, email, name, count, max_tasks, nonce, key
INSERT INTO taskapi.users AS u (id, email, name, clock, nonce, task_count, expires)
VALUES (
    %(user_id)s, %(email)s::text, %(name)s::text, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    %(nonce)s::integer, %(count)s::integer,
    CASE WHEN %(key)s::text IS NOT NULL
         THEN (extract(epoch FROM clock_timestamp() + interval '24 hours') * 1000000)::bigint ELSE 9223372036854775807 END
)
ON CONFLICT (id) DO UPDATE
SET clock = greatest(u.clock + 1, excluded.clock),
    nonce = excluded.nonce,
    task_count = u.task_count + excluded.task_count,
    expires = least(u.expires, excluded.expires),
    email = coalesce(excluded.email, u.email),
    name = coalesce(excluded.name, u.name),
    updated_at = excluded.updated_at
WHERE u.task_count + excluded.task_count <= %(max_tasks)s::integer
