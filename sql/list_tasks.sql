-- Returns a page of the user's tasks that match all given filters: a JSON array of up to limit + 1 tasks (the last one
-- only shows that there is a next page), the number of tasks in it, the version of the list, the key that signs its
-- cursors, and, if count is true, the number of tasks on all pages.
--
-- The planner removes the conditions on parameters that are not given. The other conditions can use an index: with a
-- generic plan for the list without parameters, with a custom plan for every other list (statements.py). The conditions
-- on due_at use least and not coalesce: coalesce is not leakproof, and row-level security would not let it use an
-- index.
-- Parameters: user_id, is_completed, priority, tag, due_before, due_after, updated_since, q, sort, after, after_id, limit, count
WITH chosen AS NOT MATERIALIZED (
    SELECT t AS task, t.id,
           CASE coalesce(%(sort)s, 'created_at')
               WHEN 'created_at' THEN t.created_at
               WHEN 'updated_at' THEN t.updated_at
               WHEN 'due_at' THEN least(t.due_at, 'infinity')
           END AS time_up,
           CASE %(sort)s::text
               WHEN '-created_at' THEN t.created_at
               WHEN '-updated_at' THEN t.updated_at
               WHEN '-due_at' THEN greatest(t.due_at, '-infinity')
           END AS time_down,
           CASE %(sort)s
               WHEN 'title' THEN t.title
               WHEN 'priority' THEN array_position('{none,low,medium,high}', t.priority)::text
           END COLLATE "C" AS text_up,
           CASE %(sort)s
               WHEN '-title' THEN t.title
               WHEN '-priority' THEN array_position('{none,low,medium,high}', t.priority)::text
           END COLLATE "C" AS text_down
    FROM taskapi.tasks AS t
    WHERE t.user_id = %(user_id)s
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
), page AS (
    SELECT task FROM chosen
    WHERE %(after_id)s::bigint IS NULL OR CASE
        WHEN coalesce(%(sort)s, 'created_at') IN ('created_at', 'updated_at', 'due_at')
            THEN (time_up, id) > (coalesce(%(after)s::text::timestamptz, 'infinity'), %(after_id)s)
        WHEN %(sort)s IN ('-created_at', '-updated_at', '-due_at')
            THEN time_down <= coalesce(%(after)s::text::timestamptz, '-infinity')
             AND (time_down < coalesce(%(after)s::text::timestamptz, '-infinity') OR id > %(after_id)s)
        WHEN %(sort)s IN ('title', 'priority')
            THEN (text_up, id) > (%(after)s, %(after_id)s)
        ELSE text_down <= %(after)s AND (text_down < %(after)s OR id > %(after_id)s)
    END
    ORDER BY time_up, time_down DESC, text_up, text_down DESC, id
    LIMIT %(limit)s::int + 1
)
SELECT coalesce(json_agg(task), '[]'),
       count(*),
       (SELECT u.version FROM taskapi.users AS u WHERE u.id = %(user_id)s),
       (SELECT u.cursor_key FROM taskapi.users AS u WHERE u.id = %(user_id)s),
       CASE WHEN %(count)s::boolean THEN (SELECT count(*) FROM chosen) END
FROM page
