-- Parts of statements, each under its name; a statement includes one by a comment, as in list_tasks.sql.

-- name: members
-- The members of a task `t`, as they are answered.
t.id, t.user_id, t.title, t.description, t.is_completed,
to_char(t.created_at::timestamp, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS created_at,
to_char(t.updated_at::timestamp, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS updated_at,
to_char(t.due_at::timestamp, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS due_at,
t.priority, t.tags,
to_char(t.completed_at::timestamp, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS completed_at

-- name: tag
-- The tag of a task `t`: no two of its states share one.
'"' || (extract(epoch FROM t.updated_at) * 1000000)::bigint::text || '-' || t.nonce::text || '"'

-- name: list_tag
-- The tag of the list of a user `u`.
'"' || u.clock::text || '-' || u.nonce::text || '"'

-- name: change
-- The time of a change by a `person` whose row is locked: later than any change before, even if the server's clock is
-- set back; as a number and as a time. And whether rows of the user have expired: see delete_expired.sql.
t.clock, to_timestamp(t.clock / 1000000::float8) AS now, person.expires < t.clock AS has_expired

-- name: next_clock
greatest(person.clock + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)

-- name: record
-- Records that the tasks `deleted` were deleted by a `change`.
INSERT INTO taskapi.deletions (user_id, deleted_at, id)
SELECT u.id, change.now, deleted.id
FROM taskapi.users AS u
CROSS JOIN change
CROSS JOIN deleted
WHERE u.id = %(user_id)s

-- name: json_bytes
-- About the size of a task `n` as JSON.
octet_length(to_json(n.title)::text) + octet_length(coalesce(to_json(n.description)::text, '')) +
octet_length(to_json(n.tags)::text) + octet_length(to_json(%(user_id)s::text)::text) + 300

-- name: filter is_completed
AND t.is_completed = %(is_completed)s

-- name: filter priority
AND t.priority = ANY (%(priority)s)

-- name: filter tag
AND t.tags @> %(tag)s

-- name: filter due_before
AND t.due_at < %(due_before)s

-- name: filter due_after
AND t.due_at > %(due_after)s

-- name: filter updated_since
AND t.updated_at >= %(updated_since)s

-- name: filter q
AND (t.search_title || ' ' || t.search_description || ' ' || t.search_tags) LIKE ALL (%(q)s)

-- name: key created_at
t.created_at

-- name: key updated_at
t.updated_at

-- name: key due_at
-- Tasks that are not due come last.
least(t.due_at, 'infinity')

-- name: key -due_at
greatest(t.due_at, '-infinity')

-- name: key priority
array_position('{none,low,medium,high}', t.priority)

-- name: key title
t.title COLLATE "C"

-- name: order
-- The order of a list by its key.
/* include key */, t.id

-- name: order descending
/* include key */ DESC, t.id

-- name: after
-- What follows a position in that order.
AND (/* include key */, t.id) > (%(after)s, %(after_id)s)

-- name: after descending
AND /* include key */ <= %(after)s AND (/* include key */ < %(after)s OR t.id > %(after_id)s)

-- name: count
(SELECT count(*) FROM taskapi.tasks AS t WHERE t.user_id = %(user_id)s /* include filters */)
