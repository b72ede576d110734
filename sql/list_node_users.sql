-- Only with Citus. Returns, for each node that has rows of users, the id of a user whose rows would be there.
-- Parameters: prefix
SELECT DISTINCT ON (p.groupid) candidate.id
FROM (SELECT %(prefix)s || n FROM generate_series(1, 1000) AS n) AS candidate (id)
JOIN pg_dist_placement AS p ON p.shardid = get_shard_id_for_distribution_column('taskapi.users', candidate.id)
ORDER BY p.groupid, candidate.id
