-- Deletes what is kept for a time only: repeatable requests for 24 hours, deletions for 30 days. The user's row has the
-- time when the next of them expires, and that of the newest deletion that is no longer kept. Runs after lock_user.sql.
-- Parameters: user_id
WITH keys AS (
    DELETE FROM taskapi.idempotency_keys
    WHERE user_id = %(user_id)s AND created_at <= now() - interval '24 hours'
), gone AS (
    DELETE FROM taskapi.deletions
    WHERE user_id = %(user_id)s AND deleted_at <= now() - interval '30 days'
    RETURNING deleted_at
)
UPDATE taskapi.users AS u
SET expires = (
        SELECT (extract(epoch FROM least(
            (SELECT min(created_at) + interval '24 hours' FROM taskapi.idempotency_keys
             WHERE user_id = %(user_id)s AND created_at > now() - interval '24 hours'),
            (SELECT min(deleted_at) + interval '30 days' FROM taskapi.deletions
             WHERE user_id = %(user_id)s AND deleted_at > now() - interval '30 days'),
            '2100-01-01'
        )) * 1000000)::bigint
    ),
    deletions_cleared = greatest(
        u.deletions_cleared, (SELECT (extract(epoch FROM max(gone.deleted_at)) * 1000000)::bigint FROM gone)
    )
WHERE u.id = %(user_id)s
RETURNING u.id
