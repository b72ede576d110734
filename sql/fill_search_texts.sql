-- Stores the search texts of a task. Only for a migration, as the owner of the table.
-- Parameters: user_id, id, search_title, search_description, search_tags
UPDATE taskapi.tasks AS t
SET search_title = %(search_title)s, search_description = %(search_description)s, search_tags = %(search_tags)s
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
