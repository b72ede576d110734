-- Returns the process id of the backend. Behind a connection pooler, libpq has another one (pool.py).
-- Parameters: none
SELECT pg_backend_pid()
