-- For a request whose key was used within 24 hours: whether it was for the same request, how many tasks that one
-- created, a page of those that are left as a JSON array, the tag and the id of the first, and the position of the
-- last, if there are more; no row for a new key.
-- Parameters: user_id, key, digest
SELECT k.digest = %(digest)s, cardinality(k.ids), page.*
FROM taskapi.idempotency_keys AS k
CROSS JOIN LATERAL (
    SELECT coalesce(json_agg(task.json ORDER BY task.id) FILTER (WHERE task.bytes_before < 2097152), '[]'),
           (array_agg(task.tag ORDER BY task.id))[1],
           min(task.id),
           CASE WHEN bool_or(task.bytes_before >= 2097152)
                THEN max(task.position) FILTER (WHERE task.bytes_before < 2097152) END,
           max(task.id) FILTER (WHERE task.bytes_before < 2097152)
    FROM (
        SELECT CASE WHEN t.bytes_before < 2097152
                    THEN (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m) END AS json,
               t.id, t.created_at::text AS position, /* include tag */ AS tag, t.bytes_before
        FROM (
            SELECT t.*, sum(t.json_bytes) OVER (ORDER BY t.id ROWS UNBOUNDED PRECEDING) - t.json_bytes AS bytes_before
            FROM taskapi.tasks AS t
            WHERE t.user_id = %(user_id)s AND t.id = ANY (k.ids)
        ) AS t
    ) AS task
) AS page
WHERE k.user_id = %(user_id)s AND k.key = %(key)s AND k.created_at > now() - interval '24 hours'
