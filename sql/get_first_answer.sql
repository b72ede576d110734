-- Returns the answer to the first request with this key, the entity tag and the id of its first task, and whether this
-- request has the same body.
-- Parameters: user_id, key, digest
SELECT answer, answer::json -> 0 -> 'updated_at', answer::json -> 0 -> 'id', digest = %(digest)s
FROM taskapi.first_answers
WHERE user_id = %(user_id)s AND key = %(key)s
