-- What mends row-level security where it is not in force for the role that asks, a line each; no row where all is well.
-- Every table of the schema but `migrations` has rows of people.
-- Parameters: none
SELECT DISTINCT remedy
FROM pg_class AS c
CROSS JOIN LATERAL (
    SELECT CASE c.relname WHEN 'users' THEN 'id' ELSE 'user_id' END || ' = current_setting(''taskapi.user_id''::text, true)'
) AS own (rows)
CROSS JOIN LATERAL (
    SELECT count(*) = 1 AND bool_and(
        p.polpermissive AND p.polcmd = '*' AND p.polroles = '{0}' AND p.polwithcheck IS NULL
        AND pg_get_expr(p.polqual, p.polrelid) = '(' || own.rows || ')'
    )
    FROM pg_policy AS p WHERE p.polrelid = c.oid
) AS policy (is_ours)
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN NOT (c.relrowsecurity AND c.relforcerowsecurity)
            THEN format('ALTER TABLE taskapi.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', c.relname)
        WHEN NOT row_security_active(c.oid)
            THEN format('ALTER ROLE %I NOSUPERUSER NOBYPASSRLS', current_user)
        WHEN NOT policy.is_ours
            THEN format('leave taskapi.%I one policy, FOR ALL TO PUBLIC USING (%s)', c.relname, own.rows)
    END
) AS mended (remedy)
WHERE c.relnamespace = 'taskapi'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> 'migrations'
  AND remedy IS NOT NULL
ORDER BY remedy
