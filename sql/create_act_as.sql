-- Only with Citus. Creates the function that begin_as_user_on_citus.sql calls, and which shows a server that the tables
-- are distributed.
-- Parameters: none
CREATE OR REPLACE FUNCTION taskapi.act_as(user_id text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('citus.propagate_set_commands', 'local', true);
    EXECUTE format('SET LOCAL taskapi.user_id = %L', user_id);
    SET LOCAL row_security = on;
    SET LOCAL timezone = 'UTC';
    SET LOCAL datestyle = ISO;
    SET LOCAL statement_timeout = '3s';
    SET LOCAL lock_timeout = '1s';
    SET LOCAL plan_cache_mode = auto; -- a generic plan does not name the shard
    SET LOCAL ROLE taskapi_user;
END
$$
