-- Runs before every statement of a request, in the same transaction and round trip. Sets the role, the user for
-- row-level security, and the timeouts. All settings end with the transaction: the next request on the connection does
-- not have them, and the pool of an embedding app or PgBouncer needs no settings.
-- Plans are generic and PostgreSQL keeps them; for the exception see force_custom_plan.sql.
-- Parameters: user_id
SELECT set_config('role', 'taskapi_user', true),
       set_config('taskapi.user_id', %(user_id)s, true),
       set_config('row_security', 'on', true),
       set_config('timezone', 'UTC', true),
       set_config('datestyle', 'ISO', true),
       set_config('statement_timeout', '3s', true),
       set_config('lock_timeout', '1s', true),
       set_config('plan_cache_mode', 'force_generic_plan', true)
