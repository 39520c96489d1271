"""The command line: ``tdconcepts demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tdconcepts import __version__
from tdconcepts.errors import TdConceptsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 1 on an error, 2 on a wrong call, 130 when it was interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except TdConceptsError as error:
        print(f"tdconcepts {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntdconcepts {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdconcepts", description="TensorDict-native hooks for interpretability.")
    parser.add_argument("--version", action="version", version=f"tdconcepts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    text = "train two models, explain them, intervene on them, and write a page about it (about a minute)"
    demo = commands.add_parser("demo", help=text, description=text[0].upper() + text[1:] + ".")
    demo.add_argument("--out", default="demo-report", metavar="FOLDER", help="where index.html goes (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="smaller budgets: for a look, not for the numbers")
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from tdconcepts.demo.bars import Bars
    from tdconcepts.demo.run import run_demo, summary_table

    with Bars() as progress:
        page, sections = run_demo(options.out, options.seed, options.quick, progress)
    print(f"\n{summary_table(sections)}\n\nThe page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
