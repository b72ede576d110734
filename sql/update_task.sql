-- Changes the members that the JSON object `changes` names, keeps the rest, and returns the task as JSON, and its tag.
-- Without changes the task's state is turned over.
-- updated_at grows even when two changes meet in one microsecond or the clock steps back.
-- The owner's row is locked first, as it is by what writes several tasks: two writers could deadlock else. The time is
-- taken then: what is newer by it was committed later, so that updated_since misses nothing.
-- Parameters: user_id, id, changes, if_match
WITH owner AS (
    SELECT u.id FROM taskapi.users AS u WHERE u.id = %(user_id)s FOR NO KEY UPDATE
), turn AS (
    SELECT owner.id, clock_timestamp() AS now FROM owner
), changed AS (
    UPDATE taskapi.tasks AS t
    SET (title, description, is_completed, due_at, priority, tags, completed_at) = (
            SELECT n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
                   CASE WHEN n.is_completed THEN coalesce(t.completed_at, turn.now) END
            FROM jsonb_populate_record(
                t, coalesce(%(changes)s::jsonb, jsonb_build_object('is_completed', NOT t.is_completed))
            ) AS n
        ),
        updated_at = greatest(turn.now, t.updated_at + interval '1 microsecond')
    FROM turn
    WHERE t.user_id = turn.id AND t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR to_json(t.updated_at)::text = ANY (%(if_match)s))
    RETURNING t.*
), counted AS (
    UPDATE taskapi.users AS u SET version = u.version + 1 FROM changed WHERE u.id = %(user_id)s
)
SELECT row_to_json(changed), to_json(updated_at) FROM changed
