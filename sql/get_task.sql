-- One task of the user as JSON, and its tag: updated_at, which no two of its states share, in quotes.
-- Parameters: user_id, id
SELECT row_to_json(t), to_json(t.updated_at)
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
