-- Deletes the user's tasks that match all given filters. Returns them as one JSON array, oldest first, and their
-- number. Returns no row if if_match does not have the current version of the list. The version is 0 before the first
-- task.
-- Parameters: user_id, is_completed, priority, tag, due_before, due_after, updated_since, q, if_match
WITH owner AS (
    UPDATE taskapi.users AS u
    SET version = u.version + 1
    WHERE u.id = %(user_id)s AND (%(if_match)s::text[] IS NULL OR to_json(u.version::text)::text = ANY (%(if_match)s))
    RETURNING u.id
), deleted AS (
    DELETE FROM taskapi.tasks AS t
    USING owner
    WHERE t.user_id = owner.id AND t.user_id = %(user_id)s
      AND (%(is_completed)s::boolean IS NULL OR t.is_completed = %(is_completed)s)
      AND (%(priority)s::text[] IS NULL OR t.priority = ANY (%(priority)s))
      AND (%(tag)s::text[] IS NULL OR t.tags @> %(tag)s)
      AND (%(due_before)s::timestamptz IS NULL OR t.due_at < %(due_before)s)
      AND (%(due_after)s::timestamptz IS NULL OR t.due_at > %(due_after)s)
      AND (%(updated_since)s::timestamptz IS NULL OR t.updated_at >= %(updated_since)s)
      AND (%(q)s::text IS NULL OR taskapi.folded(%(q)s) ~ '\S' AND NOT EXISTS ( -- a lone accent becomes an empty text
          SELECT FROM (
              SELECT taskapi.folded(concat_ws(' ', t.title, t.description, array_to_string(t.tags, ' '))) OFFSET 0
          ) AS task (text) -- OFFSET 0: normalizes the text once, not for each word, which is slow
          CROSS JOIN regexp_split_to_table(taskapi.folded(%(q)s), '\s+') AS word
          WHERE strpos(task.text, word) = 0
      ))
    RETURNING t.*
)
SELECT coalesce(json_agg(deleted ORDER BY created_at, id), '[]'), count(*)
FROM deleted
HAVING %(if_match)s::text[] IS NULL OR EXISTS (SELECT FROM owner)
    OR '"0"' = ANY (%(if_match)s) AND NOT EXISTS (SELECT FROM taskapi.users AS u WHERE u.id = %(user_id)s)
