-- Adds a task and returns it as JSON, its id, and whether its owner is new. The owner's row comes along: made at the first task, brought
-- up to date when the token tells something new, and else only read, so that one person's creates run in parallel.
-- Parameters: user_id, email, name, title, description, is_completed
WITH owner AS (
    INSERT INTO taskapi.users AS u (id, email, name)
    SELECT %(user_id)s, %(email)s, %(name)s
    WHERE NOT EXISTS (
        SELECT FROM taskapi.users
        WHERE id = %(user_id)s
          AND email IS NOT DISTINCT FROM coalesce(%(email)s, email)
          AND name IS NOT DISTINCT FROM coalesce(%(name)s, name)
    )
    ON CONFLICT (id) DO UPDATE
    SET email = coalesce(excluded.email, u.email), name = coalesce(excluded.name, u.name), updated_at = now()
    RETURNING xmax = 0 AS is_new
)
INSERT INTO taskapi.tasks AS t (user_id, title, description, is_completed)
VALUES (%(user_id)s, %(title)s, %(description)s, %(is_completed)s)
RETURNING row_to_json(t), t.id, coalesce((SELECT is_new FROM owner), false)
