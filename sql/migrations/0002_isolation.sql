-- Row-level security: whatever a statement forgets, a transaction sees and writes only the rows of the user
-- whom it named with set_config('taskapi.user_id', …). Requests run as a role that owns nothing.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'taskapi_user') THEN
        CREATE ROLE taskapi_user NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- roles belong to the cluster: another of its databases was migrated at this moment
END
$$;

DO $$
BEGIN
    IF NOT pg_has_role('taskapi_user', 'MEMBER') THEN
        GRANT taskapi_user TO CURRENT_USER;
    END IF;
END
$$;

GRANT USAGE ON SCHEMA taskapi TO taskapi_user;
GRANT SELECT ON taskapi.migrations TO taskapi_user;
GRANT SELECT, INSERT, UPDATE (email, name, updated_at) ON taskapi.users TO taskapi_user;
GRANT SELECT, INSERT, UPDATE (title, description, is_completed, updated_at), DELETE
    ON taskapi.tasks TO taskapi_user;

ALTER TABLE taskapi.users ENABLE ROW LEVEL SECURITY;
ALTER TABLE taskapi.users FORCE ROW LEVEL SECURITY;
ALTER TABLE taskapi.tasks ENABLE ROW LEVEL SECURITY;
ALTER TABLE taskapi.tasks FORCE ROW LEVEL SECURITY;

CREATE POLICY own_row ON taskapi.users
    USING (id = current_setting('taskapi.user_id', true));
CREATE POLICY own_rows ON taskapi.tasks
    USING (user_id = current_setting('taskapi.user_id', true));
