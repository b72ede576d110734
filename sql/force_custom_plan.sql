-- Runs before a statement whose best plan depends on the values of its parameters: the filters and the order.
-- Parameters: none
SELECT set_config('plan_cache_mode', 'force_custom_plan', true)
