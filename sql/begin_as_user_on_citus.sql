-- The same as begin_as_user.sql for Citus, after BEGIN: the nodes get the settings of SET LOCAL in a transaction block,
-- and not those of set_config.
-- Parameters: user_id
SELECT taskapi.act_as(%(user_id)s)
