-- The tag of the user's list; no row before the first task.
-- Parameters: user_id
SELECT /* include list_tag */
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
