-- Deletes a page of the user's tasks that pass every filter, oldest first, and records the deletions. Returns them as a
-- JSON array, as they were, their number, whether there are more, the tag of the list afterwards, and whether rows of
-- the user have expired; no row where if_match names another state of the list, which is "0" before the first task. A
-- page ends after `limit` tasks or about 2 MiB. Runs after lock_user.sql.
-- Parameters: user_id, limit, if_match, nonce; those of the filters
WITH person AS (
    SELECT u.clock, u.expires, /* include list_tag */ AS tag
    FROM taskapi.users AS u
    WHERE u.id = %(user_id)s AND (%(if_match)s::text[] IS NULL OR /* include list_tag */ = ANY (%(if_match)s))
), change AS (
    SELECT /* include change */, person.tag
    FROM person
    CROSS JOIN LATERAL (SELECT /* include next_clock */ AS clock) AS t
), found AS (
    SELECT t.id, row_number() OVER page AS number, sum(t.json_bytes) OVER page - t.json_bytes AS bytes_before
    FROM taskapi.tasks AS t
    WHERE t.user_id = %(user_id)s AND EXISTS (SELECT 1 FROM person) /* include filters */
    WINDOW page AS (ORDER BY t.created_at, t.id ROWS UNBOUNDED PRECEDING)
    ORDER BY t.created_at, t.id
    LIMIT %(limit)s + 1
), deleted AS (
    DELETE FROM taskapi.tasks AS t
    USING found
    WHERE t.user_id = %(user_id)s AND t.id = found.id AND found.number <= %(limit)s AND found.bytes_before < 2097152
    RETURNING t.*
), recorded AS (
    /* include record */
), advanced AS (
    UPDATE taskapi.users AS u
    SET clock = change.clock, nonce = %(nonce)s, task_count = u.task_count - (SELECT count(*) FROM deleted),
        expires = least(u.expires, change.clock + 30 * 24 * 3600000000)
    FROM change
    WHERE u.id = %(user_id)s AND EXISTS (SELECT 1 FROM deleted)
    RETURNING /* include list_tag */ AS tag
)
SELECT coalesce(json_agg(task.json ORDER BY task.created_at, task.id), '[]'),
       count(task.id),
       (SELECT count(*) FROM found) > count(task.id),
       coalesce((SELECT tag FROM advanced), (SELECT tag FROM change), '"0"'),
       (SELECT change.has_expired FROM change)
FROM (
    SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m) AS json, t.id, t.created_at
    FROM deleted AS t
) AS task
HAVING %(if_match)s::text[] IS NULL OR EXISTS (SELECT 1 FROM change)
    OR '"0"' = ANY (%(if_match)s) AND NOT EXISTS (SELECT 1 FROM taskapi.users AS u WHERE u.id = %(user_id)s)
