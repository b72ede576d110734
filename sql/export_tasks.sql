-- All tasks of the user in the default order, each a line of JSON as bytes of UTF-8, whatever the client's encoding is.
-- Parameters: user_id
SELECT convert_to(row_to_json(t)::text || E'\n', 'UTF8')
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s
ORDER BY t.created_at, t.id
