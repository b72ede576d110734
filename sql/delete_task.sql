-- Deletes a task and records the deletion. Returns the task as JSON, as it was, its tag, and whether rows of the user
-- have expired. The user's row is locked first, as by every change: two changes could deadlock otherwise. The time is
-- taken after that.
-- Parameters: user_id, id, if_match, nonce
WITH found AS (
    SELECT t.id, person.clock, person.expires
    FROM taskapi.users AS person
    JOIN taskapi.tasks AS t ON t.user_id = person.id
    WHERE person.id = %(user_id)s AND t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR /* include tag */ = ANY (%(if_match)s))
    FOR NO KEY UPDATE
), change AS (
    SELECT /* include change */
    FROM found AS person
    CROSS JOIN LATERAL (SELECT /* include next_clock */ AS clock) AS t
), deleted AS (
    DELETE FROM taskapi.tasks AS t USING found WHERE t.user_id = %(user_id)s AND t.id = found.id RETURNING t.*
), recorded AS (
    /* include record */
), advanced AS (
    UPDATE taskapi.users AS u
    SET clock = change.clock, nonce = %(nonce)s, task_count = u.task_count - 1,
        expires = least(u.expires, change.clock + 30 * 24 * 3600000000)
    FROM change
    WHERE u.id = %(user_id)s
)
SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m), /* include tag */,
       (SELECT change.has_expired FROM change)
FROM deleted AS t
