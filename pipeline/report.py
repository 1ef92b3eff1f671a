"""Make RUN/report.html anew: what was trained on what, its curves, samples, scores and troubles, in one file.

Training and evaluate make it too; it may be made at any time, of a run that goes on, ended or was killed.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import program
from pipeline.config import Config
from pipeline.reporting.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("report", __doc__ or "")
    return program.run_config(made, argv, report, None)


def report(config: Config, args: argparse.Namespace) -> None:
    """config → the run's files → one page."""
    del args
    path = write_report(Path(config.run_dir))
    program.say(f"the report is {path} ({path.stat().st_size / 1e6:.1f} MB); open it in any browser")


if __name__ == "__main__":
    program.end(main())
