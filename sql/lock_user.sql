-- Makes other changes of the user's tasks wait until the transaction ends. Returns no row if there is no such user.
-- Parameters: user_id
SELECT u.id
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
FOR UPDATE
