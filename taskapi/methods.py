"""OPTIONS, and the methods that no view has (405)."""

from flask import Response, abort, current_app, request
from flask.blueprints import BlueprintSetupState
from werkzeug.routing import Rule

from .problems import problem


def add_rules(state: BlueprintSetupState) -> None:
    """Adds a rule for all methods to each path of the blueprint. The router tries the views first. Without these rules
    Flask would answer 405 itself: without the guard, and with an embedding app's error page."""
    endpoint = f"{state.name}.{answer_other_method.__name__}"
    state.app.view_functions[endpoint] = answer_other_method
    rules = [rule for rule in state.app.url_map.iter_rules() if rule.endpoint.startswith(f"{state.name}.")]
    for path in {rule.rule for rule in rules}:
        state.app.url_map.add(Rule(path, endpoint=endpoint, merge_slashes=False, strict_slashes=False))


def answer_other_method(**_: str) -> Response:
    rule = request.url_rule
    rules = [other for other in current_app.url_map.iter_rules() if rule and other.rule == rule.rule]
    allowed = ", ".join(sorted({"OPTIONS"}.union(*(other.methods or () for other in rules))))
    if request.method != "OPTIONS":
        abort(problem(405, f"{request.method} is not supported here. Use one of {allowed}.", {"Allow": allowed}))
    response = Response(headers={"Allow": allowed})
    del response.headers["Content-Type"]
    return response
