-- Makes other changes of the user wait until the transaction ends; no row if there is no such user. The statements
-- that follow in the transaction see all changes before.
-- Parameters: user_id
SELECT u.id
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
FOR NO KEY UPDATE
