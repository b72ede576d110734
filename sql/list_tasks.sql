-- The user's tasks as one JSON array, oldest first.
-- Parameters: user_id
SELECT coalesce(json_agg(t), '[]')
FROM (
    SELECT * FROM taskapi.tasks
    WHERE user_id = %(user_id)s
    ORDER BY created_at, id
) AS t
