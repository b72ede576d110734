-- `flask taskapi delete-user` works as the person whom it deletes: the policy own_row holds for it, too. Who may delete
-- the one row may delete already everything that hangs on it.

GRANT DELETE ON taskapi.users TO taskapi_user;
