-- Deletes a task and records the deletion. Returns the task as JSON, as it was, its tag, and whether something of the user
-- has expired.
-- The user's row is locked first, as by every change: two changes could deadlock otherwise. The time is taken after that.
-- Parameters: user_id, id, if_match, nonce
WITH person AS (
    SELECT u.clock, u.expires FROM taskapi.users AS u WHERE u.id = %(user_id)s FOR NO KEY UPDATE
), change AS (
    SELECT /* include change */
    FROM person
    CROSS JOIN LATERAL (SELECT /* include next_clock */ AS clock) AS t
), deleted AS (
    DELETE FROM taskapi.tasks AS t
    USING change
    WHERE t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR /* include tag */ = ANY (%(if_match)s))
    RETURNING t.*
), recorded AS (
    INSERT INTO taskapi.deletions (user_id, deleted_at, id)
    SELECT %(user_id)s, change.now, deleted.id FROM deleted CROSS JOIN change
), advanced AS (
    UPDATE taskapi.users AS u
    SET clock = change.clock, nonce = %(nonce)s, task_count = u.task_count - 1,
        expires = least(u.expires, change.clock + 30 * 24 * 3600000000)
    FROM change
    WHERE u.id = %(user_id)s AND EXISTS (SELECT FROM deleted)
)
SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m), /* include tag */,
       (SELECT change.has_expired FROM change)
FROM deleted AS t
