"""What Schemathesis (test_openapi) must accept, since an OpenAPI document cannot state it."""

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response

ACCEPTED = {
    "At least one filter is required, this or any other.",
    "Does not belong to this list: start without a cursor, and follow Link.",
    "Was used for another request. Use a new key.",  # an Idempotency-Key belongs to one body
}


@schemathesis.hook
def filter_failure(_: object, failure: Failure, __: object, response: Response) -> bool:
    """Whether this is a failure. A request that the schema allows may be refused by its precondition (RFC 9110 §13.1.1)
    and for the reasons above."""
    if failure.title != "Schema-valid request rejected":
        return True
    if response.status_code == 412:
        return False
    return not {error["detail"] for error in response.json().get("errors", [{"detail": ""}])} <= ACCEPTED
