-- When a task is due, how much it matters, what it is about and when it was completed; what makes conditional requests
-- and repeated ones safe.

ALTER TABLE taskapi.tasks
    ADD COLUMN due_at timestamptz CHECK (isfinite(due_at)),
    ADD COLUMN priority text NOT NULL DEFAULT 'none' CHECK (priority IN ('none', 'low', 'medium', 'high')),
    ADD COLUMN tags text[] NOT NULL DEFAULT '{}'
        CHECK (cardinality(tags) <= 20 AND array_position(tags, NULL) IS NULL),
    ADD COLUMN completed_at timestamptz;

-- The owner, too, sees no row of a table whose row-level security is forced.
ALTER TABLE taskapi.tasks NO FORCE ROW LEVEL SECURITY;
UPDATE taskapi.tasks SET completed_at = updated_at WHERE is_completed;
ALTER TABLE taskapi.tasks FORCE ROW LEVEL SECURITY;

CREATE INDEX tasks_open_by_due ON taskapi.tasks (user_id, (coalesce(due_at, 'infinity')), id) WHERE NOT is_completed;

-- version counts a person's writes, so that it tells one state of their list from another. cursor_key signs the
-- cursors of their pages.
ALTER TABLE taskapi.users
    ADD COLUMN version bigint NOT NULL DEFAULT 0,
    ADD COLUMN cursor_key uuid NOT NULL DEFAULT gen_random_uuid(),
    SET (fillfactor = 70); -- room beside each row for its next version: counting touches no index

-- What was answered to creates that carried an Idempotency-Key.
CREATE TABLE taskapi.first_answers (
    user_id text COLLATE "C" NOT NULL REFERENCES taskapi.users ON DELETE CASCADE,
    key text COLLATE "C" NOT NULL CHECK (char_length(key) BETWEEN 1 AND 255),
    digest text NOT NULL,
    answer text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, key)
);
CREATE INDEX first_answers_oldest_first ON taskapi.first_answers (user_id, created_at);

GRANT UPDATE (version) ON taskapi.users TO taskapi_user;
GRANT INSERT (due_at, priority, tags, completed_at), UPDATE (due_at, priority, tags, completed_at)
    ON taskapi.tasks TO taskapi_user;
GRANT SELECT, INSERT, DELETE ON taskapi.first_answers TO taskapi_user;

ALTER TABLE taskapi.first_answers ENABLE ROW LEVEL SECURITY;
ALTER TABLE taskapi.first_answers FORCE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON taskapi.first_answers
    USING (user_id = current_setting('taskapi.user_id', true));

-- A text without case and accents. A database in the C locale knows the case of ASCII only, so the search asks ICU or
-- PostgreSQL 17's own tables, if either is there.
DO $migration$
BEGIN
    EXECUTE format(
        $function$
        CREATE FUNCTION taskapi.folded(value text) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql
        RETURN regexp_replace(normalize(lower(normalize(value, NFKD) COLLATE %I), NFKD), '[\u0300-\u036f]+', '', 'g')
        $function$,
        (SELECT collname FROM pg_collation
         WHERE collname IN ('und-x-icu', 'pg_c_utf8', 'default') AND collencoding IN (-1, 6)
         ORDER BY array_position(ARRAY['und-x-icu', 'pg_c_utf8', 'default']::name[], collname)
         LIMIT 1)
    );
END
$migration$;

-- What a text has to be LIKE to hold every word of another, wherever in it.
CREATE FUNCTION taskapi.patterns(words text) RETURNS text[] IMMUTABLE PARALLEL SAFE LANGUAGE sql
RETURN (
    SELECT array_agg('%' || regexp_replace(word, '([\\%_])', '\\\1', 'g') || '%')
    FROM regexp_split_to_table(taskapi.folded(btrim(words)), '\s+') AS word
);
