-- Returns the names of the applied migrations, and whether the tables are distributed by Citus.
-- Parameters: none
SELECT name, to_regprocedure('taskapi.act_as(text)') IS NOT NULL FROM taskapi.migrations
