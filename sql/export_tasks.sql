-- Returns all tasks of the user, oldest first. Each is one line of JSON, as bytes of UTF-8 for every client encoding.
-- Parameters: user_id
SELECT convert_to(row_to_json(t)::text || E'\n', 'UTF8')
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s
ORDER BY t.created_at, t.id
