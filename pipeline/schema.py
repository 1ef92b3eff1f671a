"""Print the JSON Schema of a config, for editors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipeline import program
from pipeline.config import json_schema


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, print, give the exit code."""
    made = program.parser("schema", __doc__ or "")
    return program.run_plain(made, argv, schema)


def schema(args: argparse.Namespace) -> None:
    """Print it."""
    del args
    sys.stdout.write(schema_text())


def schema_text() -> str:
    """The schema as it stands in configs/schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
