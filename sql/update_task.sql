-- Changes the members that the JSON object `changes` has and keeps the rest; without changes, toggles the state.
-- Returns the task as JSON, its tag, and whether rows of the user have expired. The user's row is locked first, as by
-- every change: two changes could deadlock otherwise. The time is taken after that.
-- Parameters: user_id, id, changes, if_match, nonce
WITH person AS (
    SELECT u.clock, u.expires
    FROM taskapi.users AS u
    JOIN taskapi.tasks AS t ON t.user_id = u.id
    WHERE u.id = %(user_id)s AND t.user_id = %(user_id)s AND t.id = %(id)s
      AND (%(if_match)s::text[] IS NULL OR /* include tag */ = ANY (%(if_match)s))
    FOR NO KEY UPDATE
), change AS (
    SELECT /* include change */
    FROM person
    CROSS JOIN LATERAL (SELECT /* include next_clock */ AS clock) AS t
), changed AS (
    UPDATE taskapi.tasks AS t
    SET (title, description, is_completed, due_at, priority, tags, completed_at,
         search_title, search_description, search_tags, json_bytes) = (
            SELECT n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
                   CASE WHEN n.is_completed THEN coalesce(t.completed_at, change.now) END,
                   n.search_title, n.search_description, n.search_tags,
                   CASE WHEN %(changes)s::jsonb ?| '{title,description,tags}'
                        THEN /* include json_bytes */ ELSE t.json_bytes END
            FROM jsonb_populate_record(
                t, coalesce(%(changes)s::jsonb, jsonb_build_object('is_completed', NOT t.is_completed))
            ) AS n
        ),
        updated_at = change.now,
        nonce = %(nonce)s
    FROM change
    WHERE t.user_id = %(user_id)s AND t.id = %(id)s
    RETURNING t.*
), advanced AS (
    UPDATE taskapi.users AS u
    SET clock = change.clock, nonce = %(nonce)s
    FROM change
    WHERE u.id = %(user_id)s
)
SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m), /* include tag */,
       (SELECT change.has_expired FROM change)
FROM changed AS t
