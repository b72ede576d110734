-- Makes the place where migrations are recorded, if it is not there.
-- Parameters: none
CREATE TABLE IF NOT EXISTS taskapi.migrations (
    name text PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
)
