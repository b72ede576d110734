-- People and their tasks, in a schema that sits beside an estate's own.
-- Every key and index of tasks starts with user_id, so that the tables shard by user unchanged.

CREATE TABLE taskapi.users (
    id text COLLATE "C" PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 2000),
    email text,
    name text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- The columns of tasks, in this order, are the members of a task on the wire: the row is the answer.
CREATE TABLE taskapi.tasks (
    id bigint GENERATED ALWAYS AS IDENTITY CHECK (id > 0),
    user_id text COLLATE "C" NOT NULL REFERENCES taskapi.users ON DELETE CASCADE,
    title text NOT NULL
        CHECK (char_length(title) BETWEEN 1 AND 500 AND title = btrim(title, E' \t\n\r\f\x0B')),
    description text CHECK (char_length(description) <= 10000),
    is_completed boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now() CHECK (updated_at >= created_at),
    PRIMARY KEY (user_id, id)
);

CREATE INDEX tasks_oldest_first ON taskapi.tasks (user_id, created_at, id);
