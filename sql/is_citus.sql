-- Returns whether the database has the extension Citus.
-- Parameters: none
SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')
