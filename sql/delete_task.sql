-- Deletes a task. Returns the task as it was, as JSON, and its entity tag.
-- Locks the user's row first, as every change of tasks does: otherwise two changes could deadlock.
-- Parameters: user_id, id, if_match
WITH owner AS (
    SELECT u.id FROM taskapi.users AS u WHERE u.id = %(user_id)s FOR NO KEY UPDATE
), changed AS (
    DELETE FROM taskapi.tasks AS t
    USING owner
    WHERE t.user_id = owner.id AND t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR to_json(t.updated_at)::text = ANY (%(if_match)s))
    RETURNING t.*
), counted AS (
    UPDATE taskapi.users AS u SET version = u.version + 1 FROM changed WHERE u.id = %(user_id)s
)
SELECT row_to_json(changed), to_json(updated_at) FROM changed
