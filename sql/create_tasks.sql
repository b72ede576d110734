-- Creates the tasks of a JSON array in its order. Returns them as a JSON array, the tag and the id of the first, their
-- number, whether the user is new, and whether rows of the user have expired. With a key, it records their ids for a
-- repeat, and fails if the key is in use. Runs after upsert_user.sql, and creates nothing if that did not set its
-- nonce. Citus refuses or sends to all nodes an INSERT … SELECT with nextval, or without a table of the user in its
-- FROM.
-- Parameters: user_id, tasks, nonce, key, digest
WITH given AS MATERIALIZED (
    SELECT nextval('taskapi.tasks_id_seq') AS id, n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
           n.search_title, n.search_description, n.search_tags, /* include json_bytes */ AS json_bytes
    FROM jsonb_populate_recordset(NULL::taskapi.tasks, %(tasks)s::jsonb) WITH ORDINALITY AS n
    ORDER BY n.ordinality
), created AS (
    INSERT INTO taskapi.tasks AS t (
        id, user_id, title, description, is_completed, created_at, updated_at, due_at, priority, tags, completed_at,
        nonce, search_title, search_description, search_tags, json_bytes
    ) OVERRIDING SYSTEM VALUE
    SELECT n.id, u.id, n.title, n.description, n.is_completed, change.now, change.now, n.due_at, n.priority, n.tags,
           CASE WHEN n.is_completed THEN change.now END,
           %(nonce)s::integer, n.search_title, n.search_description, n.search_tags, n.json_bytes
    FROM taskapi.users AS u
    CROSS JOIN LATERAL (SELECT to_timestamp(u.clock / 1000000::float8) AS now) AS change
    CROSS JOIN given AS n
    WHERE u.id = %(user_id)s AND u.nonce = %(nonce)s
    RETURNING t.*
), recorded AS (
    INSERT INTO taskapi.idempotency_keys (user_id, key, digest, ids)
    SELECT u.id, %(key)s, %(digest)s, ARRAY(SELECT created.id FROM created ORDER BY created.id)
    FROM taskapi.users AS u
    WHERE u.id = %(user_id)s AND u.nonce = %(nonce)s AND %(key)s::text IS NOT NULL
), person AS (
    SELECT u.created_at = u.updated_at AS is_new, u.expires < u.clock AS has_expired
    FROM taskapi.users AS u
    WHERE u.id = %(user_id)s
)
SELECT coalesce(json_agg(task.json ORDER BY task.id), '[]'), min(task.tag), min(task.id), count(task.id),
       (SELECT person.is_new FROM person), (SELECT person.has_expired FROM person)
FROM (
    SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m) AS json, t.id, /* include tag */ AS tag
    FROM created AS t
) AS task
