-- One logical clock for each person, deletions, repeats without copies, stored search texts, and counters.
-- Servers of 0.1.0 must be stopped: they answer every column that a table has.
-- Row-level security is forced again by 0008, after the search texts of existing tasks have been filled (search.py).

ALTER TABLE taskapi.users NO FORCE ROW LEVEL SECURITY;
ALTER TABLE taskapi.tasks NO FORCE ROW LEVEL SECURITY;
ALTER TABLE taskapi.first_answers NO FORCE ROW LEVEL SECURITY;

-- clock: the time of the person's last change in microseconds since 1970. nonce: random, chosen with it. Together they
-- are the tag of the list. expires: when the next of the rows that are kept for a time only may go. deletions_cleared: the
-- time of the newest deletion that is no longer kept.
ALTER TABLE taskapi.users
    ADD COLUMN clock bigint NOT NULL DEFAULT 0,
    ADD COLUMN nonce integer NOT NULL DEFAULT 0,
    ADD COLUMN task_count integer NOT NULL DEFAULT 0,
    ADD COLUMN expires bigint NOT NULL DEFAULT 0,
    ADD COLUMN deletions_cleared bigint NOT NULL DEFAULT 0;

UPDATE taskapi.users AS u
SET clock = greatest(
        (extract(epoch FROM u.updated_at) * 1000000)::bigint,
        (SELECT (extract(epoch FROM max(t.updated_at)) * 1000000)::bigint FROM taskapi.tasks AS t WHERE t.user_id = u.id)
    ),
    nonce = floor(random() * 2147483647),
    task_count = (SELECT count(*) FROM taskapi.tasks AS t WHERE t.user_id = u.id);

ALTER TABLE taskapi.users DROP COLUMN version, DROP COLUMN cursor_key;

-- nonce: that of the change which updated_at is the time of. search_…: the texts without case and accents.
-- json_bytes: about the size of the task as JSON.
ALTER TABLE taskapi.tasks
    ADD COLUMN nonce integer NOT NULL DEFAULT 0,
    ADD COLUMN search_title text COLLATE "C" NOT NULL DEFAULT '',
    ADD COLUMN search_description text COLLATE "C" NOT NULL DEFAULT '',
    ADD COLUMN search_tags text COLLATE "C" NOT NULL DEFAULT '',
    ADD COLUMN json_bytes integer NOT NULL DEFAULT 0;

CREATE TABLE taskapi.deletions (
    user_id text COLLATE "C" NOT NULL REFERENCES taskapi.users ON DELETE CASCADE,
    deleted_at timestamptz NOT NULL,
    id bigint NOT NULL,
    PRIMARY KEY (user_id, deleted_at, id)
);

-- The creates that carried an Idempotency-Key, and the ids of the tasks that they made.
CREATE TABLE taskapi.idempotency_keys (
    user_id text COLLATE "C" NOT NULL REFERENCES taskapi.users ON DELETE CASCADE,
    key text COLLATE "C" NOT NULL CHECK (char_length(key) BETWEEN 1 AND 255),
    digest text NOT NULL,
    ids bigint[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, key)
);
CREATE INDEX idempotency_keys_oldest_first ON taskapi.idempotency_keys (user_id, created_at);

INSERT INTO taskapi.idempotency_keys (user_id, key, digest, ids, created_at)
SELECT f.user_id, f.key, f.digest,
       ARRAY(SELECT (task ->> 'id')::bigint FROM json_array_elements(f.answer::json) AS task),
       f.created_at
FROM taskapi.first_answers AS f
WHERE f.created_at > now() - interval '24 hours';

DROP TABLE taskapi.first_answers;

REVOKE UPDATE ON taskapi.users FROM taskapi_user;
GRANT UPDATE (email, name, updated_at, clock, nonce, task_count, expires, deletions_cleared) ON taskapi.users TO taskapi_user;
GRANT UPDATE (nonce, search_title, search_description, search_tags, json_bytes) ON taskapi.tasks TO taskapi_user;
GRANT SELECT, INSERT, DELETE ON taskapi.deletions, taskapi.idempotency_keys TO taskapi_user;

ALTER TABLE taskapi.deletions ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE taskapi.idempotency_keys ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON taskapi.deletions USING (user_id = current_setting('taskapi.user_id', true));
CREATE POLICY own_rows ON taskapi.idempotency_keys USING (user_id = current_setting('taskapi.user_id', true));
