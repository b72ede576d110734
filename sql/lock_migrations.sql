-- Makes other migrations wait until the transaction ends.
-- Parameters: none
SELECT pg_advisory_xact_lock(7234918115604331)
