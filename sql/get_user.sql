-- Returns the version of the user's list, which increases with every change, and the key that signs the cursors of the
-- list. Returns no row before the first task.
-- Parameters: user_id
SELECT u.version, u.cursor_key
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
