-- Changes the members that the JSON object `changes` names, keeps the rest, and returns the task as JSON.
-- updated_at grows even when two changes meet in one microsecond or the clock steps back.
-- Parameters: user_id, id, changes
UPDATE taskapi.tasks AS t
SET (title, description, is_completed) = (
        SELECT n.title, n.description, n.is_completed
        FROM jsonb_populate_record(t, %(changes)s::jsonb) AS n
    ),
    updated_at = greatest(now(), t.updated_at + interval '1 microsecond')
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
RETURNING row_to_json(t)
