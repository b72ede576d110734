-- One task of the user as JSON; no row if there is none.
-- Parameters: user_id, id
SELECT row_to_json(t)
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
