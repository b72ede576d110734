-- Runs after begin_as_user.sql in commands that may take longer than a request. Citus passes it on to its nodes.
-- Parameters: none
SET LOCAL statement_timeout = 0
