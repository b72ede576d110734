-- Sets a task's state, or turns it over where none is given, and returns the task as JSON, and its tag.
-- Parameters: user_id, id, is_completed, if_match
WITH changed AS (
    UPDATE taskapi.tasks AS t
    SET is_completed = coalesce(%(is_completed)s::boolean, NOT t.is_completed),
        completed_at = CASE
            WHEN coalesce(%(is_completed)s::boolean, NOT t.is_completed) THEN coalesce(t.completed_at, now())
        END,
        updated_at = greatest(now(), t.updated_at + interval '1 microsecond')
    WHERE t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR to_json(t.updated_at)::text = ANY (%(if_match)s))
    RETURNING t.*
), counted AS (
    UPDATE taskapi.users AS u SET version = u.version + 1 FROM changed WHERE u.id = %(user_id)s
)
SELECT row_to_json(changed), to_json(updated_at) FROM changed
