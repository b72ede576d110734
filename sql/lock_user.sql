-- Keeps other writers of the user's list waiting until the transaction ends; no row where there is nobody of that id.
-- Parameters: user_id
SELECT u.id
FROM taskapi.users AS u
WHERE u.id = %(user_id)s
FOR UPDATE
