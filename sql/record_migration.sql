-- Records that a migration was applied.
-- Parameters: name
INSERT INTO taskapi.migrations (name) VALUES (%(name)s)
