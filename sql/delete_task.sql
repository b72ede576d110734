-- Deletes a task and returns it as it was, as JSON.
-- Parameters: user_id, id
DELETE FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
RETURNING row_to_json(t)
