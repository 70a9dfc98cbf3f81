"""The published schema of the reports, and a check of a report against it."""

import json
from pathlib import Path

import jsonschema

import autoteardown

SCHEMA = Path(autoteardown.__file__).with_name("stop") / "report.schema.json"
_VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def validate_report(value):
    """Raise jsonschema.ValidationError unless it is a report of the present schema."""
    error = jsonschema.exceptions.best_match(_VALIDATOR.iter_errors(value))
    if error is not None:
        raise error
