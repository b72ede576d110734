"""What schemathesis (test_openapi) may not hold against the server, because no OpenAPI document can tell it."""

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response

UNTOLD = {
    "Choose what to delete, by this or any other filter.",  # one parameter of several is required
    "Is not of this list: begin without one.",  # a cursor is the server's own
    "Was used for another request.",  # an Idempotency-Key stands for the body that it came with first
}


@schemathesis.hook
def filter_failure(_: object, failure: Failure, __: object, response: Response) -> bool:
    """Whether this is a failure. A request that the schema allows may be refused by its precondition (RFC 9110 §13.1.1)
    and for the reasons above, and by nothing else."""
    if failure.title != "Schema-valid request rejected":
        return True
    if response.status_code == 412:
        return False
    return not {error["detail"] for error in response.json().get("errors", [{"detail": ""}])} <= UNTOLD
