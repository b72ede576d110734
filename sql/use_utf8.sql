-- Runs before begin_as_user.sql, in its transaction, if an embedding app or DATABASE_URL has set another encoding for
-- the connection: the API sends and receives text in UTF-8, for every encoding of the database.
-- Parameters: none
SELECT set_config('client_encoding', 'UTF8', true)
