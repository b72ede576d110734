-- How many writes the user's list has seen, and what signs the cursors of its pages; no row before the first task.
-- Parameters: user_id
SELECT u.version, u.cursor_key
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
