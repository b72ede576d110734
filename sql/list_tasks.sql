-- A page of the user's tasks that pass every filter: a JSON array, how many tasks were found, up to limit + 1, the
-- position and the id of the one at `limit`, the list's tag (none before the user's first task), and the number of
-- tasks on all pages, if it is asked for. The array is null if it would have more than about 2 MiB: then see
-- list_large_tasks.sql.
--
-- statements.py composes it from the parts in fragments.sql. Conditions use leakproof functions only: under row-level
-- security no index serves others, such as coalesce.
-- Parameters: user_id, limit; those of the filters; after, after_id
WITH found AS MATERIALIZED (
    SELECT t.*, /* include key */ AS position
    FROM taskapi.tasks AS t
    WHERE t.user_id = %(user_id)s /* include filters */ /* include after */
    ORDER BY /* include order */
    LIMIT %(limit)s + 1
)
SELECT CASE WHEN coalesce(sum(found.json_bytes), 0) <= 2097152 THEN coalesce(
           (SELECT json_agg(m) FROM (SELECT /* include members */ FROM found AS t LIMIT %(limit)s) AS m), '[]'
       ) END,
       count(*),
       (array_agg(found.position))[%(limit)s],
       (array_agg(found.id))[%(limit)s],
       (SELECT /* include list_tag */ FROM taskapi.users AS u WHERE u.id = %(user_id)s),
       /* include count */
FROM found
