-- Sets a task's state, or turns it over where none is given, and returns the task as JSON.
-- Parameters: user_id, id, is_completed
UPDATE taskapi.tasks AS t
SET is_completed = coalesce(%(is_completed)s::boolean, NOT t.is_completed),
    updated_at = greatest(now(), t.updated_at + interval '1 microsecond')
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
RETURNING row_to_json(t)
