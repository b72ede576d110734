-- One task of the user as JSON, and its tag.
-- Parameters: user_id, id
SELECT (SELECT row_to_json(m) FROM (SELECT /* include members */) AS m), /* include tag */
FROM taskapi.tasks AS t
WHERE t.user_id = %(user_id)s AND t.id = %(id)s
