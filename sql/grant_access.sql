-- Grants what requests need. A dump may be restored without grants. Runs after the migrations, as the owner of the
-- tables.
-- Parameters: none
DO $$
BEGIN
    GRANT USAGE ON SCHEMA taskapi TO taskapi_user;
    GRANT SELECT ON taskapi.migrations TO taskapi_user;
    GRANT SELECT, INSERT, DELETE ON taskapi.users, taskapi.tasks, taskapi.deletions, taskapi.idempotency_keys
        TO taskapi_user;
    GRANT UPDATE (email, name, updated_at, clock, nonce, task_count, expires, deletions_cleared) ON taskapi.users
        TO taskapi_user;
    GRANT UPDATE (
        title, description, is_completed, updated_at, due_at, priority, tags, completed_at, nonce,
        search_title, search_description, search_tags, json_bytes
    ) ON taskapi.tasks TO taskapi_user;
    GRANT USAGE ON SEQUENCE taskapi.tasks_id_seq TO taskapi_user; -- needed with Citus
END
$$
