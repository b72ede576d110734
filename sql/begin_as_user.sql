-- Runs before every statement, in its transaction and round trip: from here to the end of the transaction the
-- connection is one user's and nobody else's. All settings are local, so that nothing of a request survives into
-- the next borrower of the connection, and so that a lent pool or PgBouncer needs no settings of its own.
-- Plans are generic and kept; but see force_custom_plan.sql.
-- Parameters: user_id
SELECT set_config('role', 'taskapi_user', true),
       set_config('taskapi.user_id', %(user_id)s, true),
       set_config('timezone', 'UTC', true),
       set_config('statement_timeout', '3s', true),
       set_config('lock_timeout', '1s', true),
       set_config('plan_cache_mode', 'force_generic_plan', true)
