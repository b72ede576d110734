-- Since PostgreSQL 16 who makes a role with CREATEROLE is a member that may not act as it: 0002 took that for enough.

DO $$
BEGIN
    IF NOT pg_has_role(
        'taskapi_user', CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END
    ) THEN
        GRANT taskapi_user TO CURRENT_USER;
    END IF;
END
$$;
