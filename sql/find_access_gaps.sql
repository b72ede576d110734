-- Returns the commands that repair the role of requests, the membership of the login in it, and row-level security, in
-- their order; and whether a command is about the role. No row if nothing is wrong. A dump does not have the role and
-- its members. Every table with a column user_id has rows of users, and the table users. Runs with the rights of the
-- login.
-- Parameters: none
SELECT gap.command, gap.number <= 4
FROM (
    SELECT 1 AS number, 'CREATE ROLE taskapi_user NOLOGIN' AS command
    WHERE to_regrole('taskapi_user') IS NULL
    UNION ALL
    SELECT 2, 'ALTER ROLE taskapi_user NOSUPERUSER NOBYPASSRLS'
    FROM pg_roles
    WHERE rolname = 'taskapi_user' AND (rolsuper OR rolbypassrls)
    UNION ALL
    SELECT 3, 'ALTER ROLE taskapi_user LOGIN' -- Citus connects to its nodes as this role
    FROM pg_roles
    WHERE rolname = 'taskapi_user' AND NOT rolcanlogin AND EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')
    UNION ALL
    SELECT 4, format('GRANT taskapi_user TO %I%s', login.rolname, version.with_set)
    FROM pg_roles AS login
    CROSS JOIN (
        SELECT CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'SET' END,
               CASE WHEN current_setting('server_version_num')::integer < 160000 THEN '' ELSE ' WITH SET TRUE' END
    ) AS version (privilege, with_set)
    LEFT JOIN pg_roles AS role ON role.rolname = 'taskapi_user'
    WHERE login.rolname = session_user AND NOT login.rolsuper
      AND (role.oid IS NULL OR NOT pg_has_role(login.oid, role.oid, version.privilege))
    UNION ALL
    SELECT repair.number, repair.command
    FROM pg_class AS c
    JOIN pg_attribute AS a
      ON a.attrelid = c.oid AND a.attname = CASE c.relname WHEN 'users' THEN 'id' ELSE 'user_id' END AND NOT a.attisdropped
    CROSS JOIN LATERAL (
        SELECT a.attname || ' = current_setting(''taskapi.user_id''::text, true)'
    ) AS own (condition)
    CROSS JOIN LATERAL (
        SELECT count(*) = 1 AND bool_and(
            p.polpermissive AND p.polcmd = '*' AND p.polroles = '{0}' AND p.polwithcheck IS NULL
            AND replace(pg_get_expr(p.polqual, p.polrelid), '"', '') = '(' || own.condition || ')' -- a setting adds quotes
        )
        FROM pg_policy AS p WHERE p.polrelid = c.oid
    ) AS policy (is_expected)
    CROSS JOIN LATERAL (
        SELECT 5, format('DROP POLICY %I ON taskapi.%I', p.polname, c.relname)
        FROM pg_policy AS p
        WHERE p.polrelid = c.oid AND NOT policy.is_expected
        UNION ALL
        SELECT 6, format('CREATE POLICY own_rows ON taskapi.%I USING (%s)', c.relname, own.condition)
        WHERE NOT policy.is_expected
        UNION ALL
        SELECT 7, format('ALTER TABLE taskapi.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', c.relname)
        WHERE NOT (c.relrowsecurity AND c.relforcerowsecurity)
    ) AS repair (number, command)
    WHERE c.relnamespace = to_regnamespace('taskapi') AND c.relkind IN ('r', 'p')
) AS gap
ORDER BY gap.number, gap.command
