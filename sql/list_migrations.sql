-- Returns the names of the applied migrations.
-- Parameters: none
SELECT name FROM taskapi.migrations
