-- Returns the names of the applied migrations, and whether the tables are distributed by Citus.
-- Parameters: none
SELECT m.name,
       to_regprocedure('taskapi.act_as(text)') IS NOT NULL AND EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')
FROM taskapi.migrations AS m
