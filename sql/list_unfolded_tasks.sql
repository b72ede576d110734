-- The next 1,000 tasks after one, with the texts that a search reads. Only for a migration, as the owner of the table.
-- Parameters: user_id, id
SELECT t.user_id, t.id, t.title, t.description, t.tags
FROM taskapi.tasks AS t
WHERE (t.user_id, t.id) > (%(user_id)s, %(id)s)
ORDER BY t.user_id, t.id
LIMIT 1000
