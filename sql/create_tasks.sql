-- Creates the tasks of a JSON array in its order. Returns them as a JSON array, the tag and the id of the first, their
-- number, whether the user is new, and whether something of the user has expired. With a key, it records their ids for a
-- repeat, and fails if the key is in use. Runs after upsert_user.sql, and creates nothing if that did not set its nonce.
-- Parameters: user_id, tasks, nonce, key, digest
WITH change AS (
    SELECT to_timestamp(u.clock / 1000000::float8) AS now, u.expires < u.clock AS has_expired,
           u.created_at = now() AS is_new
    FROM taskapi.users AS u
    WHERE u.id = %(user_id)s AND u.nonce = %(nonce)s
), created AS (
    INSERT INTO taskapi.tasks (
        user_id, title, description, is_completed, created_at, updated_at, due_at, priority, tags, completed_at,
        nonce, search_title, search_description, search_tags, json_bytes
    )
    SELECT %(user_id)s, n.title, n.description, n.is_completed, change.now, change.now, n.due_at, n.priority, n.tags,
           CASE WHEN n.is_completed THEN change.now END,
           %(nonce)s::integer, n.search_title, n.search_description, n.search_tags, /* include json_bytes */
    FROM change
    CROSS JOIN jsonb_populate_recordset(NULL::taskapi.tasks, %(tasks)s::jsonb) WITH ORDINALITY AS n
    ORDER BY n.ordinality
    RETURNING *
), recorded AS (
    INSERT INTO taskapi.idempotency_keys (user_id, key, digest, ids)
    SELECT %(user_id)s, %(key)s, %(digest)s, ARRAY(SELECT created.id FROM created ORDER BY created.id)
    FROM change
    WHERE %(key)s::text IS NOT NULL
)
SELECT coalesce(json_agg(task.json ORDER BY task.id), '[]'), min(task.tag), min(task.id), count(task.id),
       (SELECT change.is_new FROM change), (SELECT change.has_expired FROM change)
FROM (
    SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m) AS json, t.id, /* include tag */ AS tag
    FROM created AS t
) AS task
