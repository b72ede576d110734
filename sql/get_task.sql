-- Returns one task of the user as JSON, and its entity tag: updated_at in quotes. Every change of the task changes it.
-- Parameters: user_id, id
SELECT row_to_json(t), to_json(t.updated_at)
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
