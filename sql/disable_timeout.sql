-- Runs after begin_as_user.sql in commands that may take longer than a request.
-- Parameters: none
SELECT set_config('statement_timeout', '0', true)
