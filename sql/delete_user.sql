-- Deletes a user with all rows that refer to them. Returns the number of their tasks, or no row if there is no such
-- user. Runs after lock_user.sql, in its transaction: otherwise a task that is created meanwhile would not be counted.
-- Parameters: user_id
WITH counted AS MATERIALIZED (
    SELECT count(*) AS count FROM taskapi.tasks AS t WHERE t.user_id = %(user_id)s
), deleted AS (
    DELETE FROM taskapi.users AS u WHERE u.id = %(user_id)s RETURNING u.id
)
SELECT counted.count FROM deleted CROSS JOIN counted
