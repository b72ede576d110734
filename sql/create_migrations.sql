-- Creates the table of applied migrations, if it is missing.
-- Parameters: none
CREATE TABLE IF NOT EXISTS taskapi.migrations (
    name text PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
)
