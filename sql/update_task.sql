-- Changes the members of a task that the JSON object `changes` has. If `changes` is NULL, toggles is_completed. Returns
-- the task as JSON, and its entity tag.
-- updated_at always increases, even if two changes are in the same microsecond or the clock is set back.
-- Locks the user's row first, as every change of tasks does: otherwise two changes could deadlock. Takes the time after
-- that: a later time means a later commit, so that a client that uses updated_since misses no change.
-- Parameters: user_id, id, changes, if_match
WITH owner AS (
    SELECT u.id FROM taskapi.users AS u WHERE u.id = %(user_id)s FOR NO KEY UPDATE
), change AS (
    SELECT owner.id, clock_timestamp() AS now FROM owner
), changed AS (
    UPDATE taskapi.tasks AS t
    SET (title, description, is_completed, due_at, priority, tags, completed_at) = (
            SELECT n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
                   CASE WHEN n.is_completed THEN coalesce(t.completed_at, change.now) END
            FROM jsonb_populate_record(
                t, coalesce(%(changes)s::jsonb, jsonb_build_object('is_completed', NOT t.is_completed))
            ) AS n
        ),
        updated_at = greatest(change.now, t.updated_at + interval '1 microsecond')
    FROM change
    WHERE t.user_id = change.id AND t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR to_json(t.updated_at)::text = ANY (%(if_match)s))
    RETURNING t.*
), counted AS (
    UPDATE taskapi.users AS u SET version = u.version + 1 FROM changed WHERE u.id = %(user_id)s
)
SELECT row_to_json(changed), to_json(updated_at) FROM changed
