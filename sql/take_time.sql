-- Runs after begin_as_user.sql for what no request waits for.
-- Parameters: none
SELECT set_config('statement_timeout', '0', true)
