-- The names of the migrations that this database has.
-- Parameters: none
SELECT name FROM taskapi.migrations
