-- The process at the other end, as it calls itself.
-- Parameters: none
SELECT pg_backend_pid()
