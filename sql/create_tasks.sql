-- Creates the tasks of a JSON array, in its order. Returns them as one JSON array, the entity tag and the id of the
-- first task, and whether the user is new.
-- The first task creates the user's row. Later ones update email and name, if the token has them.
-- The times of the tasks are taken while that row is locked: a later time means a later commit, so that a client that
-- uses updated_since misses no change.
-- The version of a new user starts with the current time. If a user is deleted and created again, no old version
-- returns.
-- If there is a key: stores the answer for a repeated request, fails if the key is in use, and deletes the answers that
-- are older than 24 hours.
-- Parameters: user_id, email, name, tasks, key, digest
WITH owner AS (
    INSERT INTO taskapi.users AS u (id, email, name, version)
    VALUES (%(user_id)s, %(email)s, %(name)s, extract(epoch FROM now()) * 1000000)
    ON CONFLICT (id) DO UPDATE
    SET version = u.version + 1,
        email = coalesce(excluded.email, u.email),
        name = coalesce(excluded.name, u.name),
        updated_at = now()
    RETURNING xmax = 0 AS is_new, clock_timestamp() AS now
), created AS (
    INSERT INTO taskapi.tasks
        (user_id, title, description, is_completed, created_at, updated_at, due_at, priority, tags, completed_at)
    SELECT %(user_id)s, n.title, n.description, n.is_completed, owner.now, owner.now, n.due_at, n.priority, n.tags,
           CASE WHEN n.is_completed THEN owner.now END
    FROM owner
    CROSS JOIN jsonb_populate_recordset(NULL::taskapi.tasks, %(tasks)s::jsonb) WITH ORDINALITY AS n
    ORDER BY n.ordinality
    RETURNING *
), answer AS (
    SELECT coalesce(json_agg(created ORDER BY id), '[]') AS body, min(updated_at) AS updated_at, min(id) AS id FROM created
), stored AS (
    INSERT INTO taskapi.first_answers (user_id, key, digest, answer)
    SELECT %(user_id)s, %(key)s, %(digest)s, body FROM answer WHERE %(key)s::text IS NOT NULL
), expired AS (
    DELETE FROM taskapi.first_answers
    WHERE user_id = %(user_id)s AND %(key)s::text IS NOT NULL AND created_at < now() - interval '24 hours'
)
SELECT body, to_json(updated_at), id, (SELECT is_new FROM owner) FROM answer
