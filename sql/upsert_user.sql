-- Takes the time for a create of `count` tasks and counts them, unless the user would have more than max_tasks. Creates the
-- user's row with their first task, and takes a new email or name from the token. Other changes of the user wait until the
-- transaction ends.
-- Parameters: user_id, email, name, count, max_tasks, nonce, key
INSERT INTO taskapi.users AS u (id, email, name, clock, nonce, task_count, expires)
SELECT %(user_id)s, %(email)s::text, %(name)s::text, n.now, %(nonce)s::integer, %(count)s::integer,
       CASE WHEN %(key)s::text IS NOT NULL THEN n.now + 24 * 3600000000 ELSE 9223372036854775807 END
FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now) AS n
WHERE %(count)s::integer <= %(max_tasks)s::integer
ON CONFLICT (id) DO UPDATE
SET clock = greatest(u.clock + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
    nonce = excluded.nonce,
    task_count = u.task_count + excluded.task_count,
    expires = least(u.expires, excluded.expires),
    email = coalesce(excluded.email, u.email),
    name = coalesce(excluded.name, u.name),
    updated_at = now()
WHERE u.task_count + excluded.task_count <= %(max_tasks)s::integer
