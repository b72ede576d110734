-- Makes the schema that sits beside an estate's own, if it is not there.
-- Parameters: none
CREATE SCHEMA IF NOT EXISTS taskapi
