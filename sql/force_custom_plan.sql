-- Runs before a statement whose best plan depends on what it is asked: which filters there are, and which order.
-- Parameters: none
SELECT set_config('plan_cache_mode', 'force_custom_plan', true)
