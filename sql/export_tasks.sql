-- All tasks of the user, oldest first, each a line of JSON as bytes of UTF-8, in any encoding of the client.
-- Parameters: user_id
SELECT convert_to((SELECT row_to_json(m) FROM (SELECT /* include members */) AS m)::text || E'\n', 'UTF8')
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s
ORDER BY t.created_at, t.id
