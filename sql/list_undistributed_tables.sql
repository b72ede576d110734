-- Only with Citus. Returns the commands that distribute a table with rows of users over the nodes, for each table that
-- is not distributed; the first is for a table with rows: Citus copies them, which row-level security does not allow
-- its owner.
-- Parameters: none
SELECT format('ALTER TABLE taskapi.%I NO FORCE ROW LEVEL SECURITY', c.relname),
       format(
           'SELECT create_distributed_table(''taskapi.%I'', %L, colocate_with => %L)', c.relname, a.attname,
           CASE c.relname WHEN 'users' THEN 'default' ELSE 'taskapi.users' END
       )
FROM pg_class AS c
JOIN pg_attribute AS a
  ON a.attrelid = c.oid AND a.attname = CASE c.relname WHEN 'users' THEN 'id' ELSE 'user_id' END AND NOT a.attisdropped
WHERE c.relnamespace = 'taskapi'::regnamespace AND c.relkind = 'r'
  AND c.oid NOT IN (SELECT logicalrelid FROM pg_dist_partition)
ORDER BY c.relname <> 'users', c.relname
