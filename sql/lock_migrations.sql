-- Makes other migrations wait until the transaction ends. Then sets the timeout of its other locks: requests that wait
-- behind one fail after 1 s.
-- Parameters: none
SELECT pg_advisory_xact_lock(7234918115604331), set_config('lock_timeout', '500ms', true)
