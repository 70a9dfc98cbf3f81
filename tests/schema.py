"""The published schema of the reports, and a check of a report against it."""

import json
from pathlib import Path

import autoteardown

try:
    import jsonschema
except ImportError:  # a machine with a GPU has torch, wrapt and pytest, and often no network
    jsonschema = None

SCHEMA = Path(autoteardown.__file__).with_name("stop") / "report.schema.json"
_VALIDATOR = jsonschema and jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def validate_report(value):
    """Raise jsonschema.ValidationError unless it is a report of the present schema; not checked without jsonschema."""
    error = _VALIDATOR and jsonschema.exceptions.best_match(_VALIDATOR.iter_errors(value))
    if error is not None:
        raise error
