-- Finds the tables that row-level security does not protect from the current role. Each row is a remedy: SQL or text.
-- Returns no row if all tables are protected. All tables of the schema except `migrations` have rows of users.
-- Parameters: none
SELECT DISTINCT remedy
FROM pg_class AS c
CROSS JOIN LATERAL (
    SELECT CASE c.relname WHEN 'users' THEN 'id' ELSE 'user_id' END || ' = current_setting(''taskapi.user_id''::text, true)'
) AS own (condition)
CROSS JOIN LATERAL (
    SELECT count(*) = 1 AND bool_and(
        p.polpermissive AND p.polcmd = '*' AND p.polroles = '{0}' AND p.polwithcheck IS NULL
        AND pg_get_expr(p.polqual, p.polrelid) = '(' || own.condition || ')'
    )
    FROM pg_policy AS p WHERE p.polrelid = c.oid
) AS policy (is_expected)
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN NOT (c.relrowsecurity AND c.relforcerowsecurity)
            THEN format('ALTER TABLE taskapi.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', c.relname)
        WHEN NOT row_security_active(c.oid)
            THEN format('ALTER ROLE %I NOSUPERUSER NOBYPASSRLS', current_user)
        WHEN NOT policy.is_expected
            THEN format('keep one policy on taskapi.%I: FOR ALL TO PUBLIC USING (%s)', c.relname, own.condition)
    END
) AS gap (remedy)
WHERE c.relnamespace = 'taskapi'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> 'migrations'
  AND remedy IS NOT NULL
ORDER BY remedy
