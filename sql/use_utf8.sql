-- Runs before begin_as_user.sql, in its transaction, on a connection that a host or DATABASE_URL has set to another
-- encoding: what is sent and answered is UTF-8, whatever the database is in.
-- Parameters: none
SELECT set_config('client_encoding', 'UTF8', true)
