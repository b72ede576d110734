-- A page of the user's deletions at the time `since` or later, oldest first: a JSON array, whether there are more, the
-- position of the last one, the list's tag, and whether a later deletion is no longer kept.
-- Parameters: user_id, since, limit, after, after_id
SELECT page.*, /* include list_tag */,
       coalesce(u.deletions_cleared > (extract(epoch FROM %(since)s::timestamptz) * 1000000)::bigint, false)
FROM (
    SELECT coalesce(json_agg(m) FILTER (WHERE number <= %(limit)s), '[]'),
           count(*) > %(limit)s,
           (array_agg(position))[%(limit)s],
           (array_agg(id))[%(limit)s]
    FROM (
        SELECT (SELECT m FROM (SELECT d.id, to_char(d.deleted_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS deleted_at) AS m) AS m,
               d.id, d.deleted_at::text AS position, row_number() OVER (ORDER BY d.deleted_at, d.id) AS number
        FROM taskapi.deletions AS d
        WHERE d.user_id = %(user_id)s AND d.deleted_at >= %(since)s
          AND (%(after_id)s::bigint IS NULL OR (d.deleted_at, d.id) > (%(after)s::timestamptz, %(after_id)s))
        ORDER BY d.deleted_at, d.id
        LIMIT %(limit)s + 1
    ) AS d
) AS page
LEFT JOIN taskapi.users AS u ON u.id = %(user_id)s
