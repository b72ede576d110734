-- Deletes a person with everything that hangs on their row, and returns how many tasks went; no row where there is
-- nobody of that id. After lock_user.sql, in its transaction: or a task that comes meanwhile would go uncounted.
-- Parameters: user_id
WITH deleted AS (
    DELETE FROM taskapi.users AS u WHERE u.id = %(user_id)s RETURNING u.id
)
SELECT (SELECT count(*) FROM taskapi.tasks AS t WHERE t.user_id = %(user_id)s)
FROM deleted
