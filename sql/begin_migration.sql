-- Takes the migrations' lock until the transaction ends, and makes the place where they are recorded.
-- Parameters: none
SELECT pg_advisory_xact_lock(7234918115604331);
CREATE SCHEMA IF NOT EXISTS taskapi;
CREATE TABLE IF NOT EXISTS taskapi.migrations (
    name text PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);
