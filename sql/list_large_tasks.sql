-- The same as list_tasks.sql for a page that ends at about 2 MiB of JSON, before `limit` tasks: the position and the id
-- are those of the last task on the page.
-- Parameters: user_id, limit; those of the filters; after, after_id
SELECT coalesce(json_agg(page.task), '[]'),
       %(limit)s + 1,
       (array_agg(page.position))[count(*)],
       (array_agg(page.id))[count(*)],
       (SELECT /* include list_tag */ FROM taskapi.users AS u WHERE u.id = %(user_id)s),
       /* include count */
FROM (
    SELECT (SELECT m FROM (SELECT /* include members */) AS m) AS task, t.position, t.id
    FROM (
        SELECT t.*, /* include key */ AS position, sum(t.json_bytes) OVER page - t.json_bytes AS bytes_before
        FROM taskapi.tasks AS t
        WHERE t.user_id = %(user_id)s /* include filters */ /* include after */
        WINDOW page AS (ORDER BY /* include order */ ROWS UNBOUNDED PRECEDING)
        ORDER BY /* include order */
        LIMIT %(limit)s
    ) AS t
    WHERE t.bytes_before < 2097152
) AS page
