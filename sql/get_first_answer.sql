-- What the request with this key was answered, the tag and the id of its first task, and whether this is that request.
-- Parameters: user_id, key, digest
SELECT answer, answer::json -> 0 -> 'updated_at', answer::json -> 0 -> 'id', digest = %(digest)s
FROM taskapi.first_answers
WHERE user_id = %(user_id)s AND key = %(key)s
