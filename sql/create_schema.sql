-- Creates the schema, if it is missing.
-- Parameters: none
CREATE SCHEMA IF NOT EXISTS taskapi
