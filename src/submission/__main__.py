"""python -m src.submission base-code"""

import argparse
from pathlib import Path

from src.submission.base_code import MANIFEST, bring
from src.utils import one_line_errors


def base_code(args: argparse.Namespace) -> None:
    bring(args.source)
    print(f"{len(MANIFEST)} official files, all verified, in base_code/; the splits in data/")


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.submission")
    commands = root.add_subparsers(required=True, metavar="command")
    parser = commands.add_parser("base-code", help="fetch and verify the challenge's official files")
    parser.add_argument("--from", dest="source", type=Path, help="a local clone; left out, the public repository")
    parser.set_defaults(run=base_code)
    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
