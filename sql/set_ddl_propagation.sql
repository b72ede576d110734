-- Only with Citus. Sets whether the commands that follow in the transaction change the tables on the nodes too, one
-- node after another.
-- Parameters: propagation
SELECT set_config('citus.enable_ddl_propagation', %(propagation)s, true),
       set_config('citus.multi_shard_modify_mode', 'sequential', true)
