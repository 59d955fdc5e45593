"""python -m src.submission base-code | export"""

import argparse
from pathlib import Path

from src.submission.base_code import MANIFEST, bring
from src.submission.export import DTYPES, TARGET, export
from src.utils import one_line_errors


def base_code(args: argparse.Namespace) -> None:
    bring(args.source)
    print(f"{len(MANIFEST)} official files, all verified, in base_code/; the splits in data/")


def export_run(args: argparse.Namespace) -> None:
    source = export(args.run_dir, args.checkpoint, args.dtype)
    print(f"{source} is now {TARGET} ({args.dtype}), with its model_config.json beside it")


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.submission")
    commands = root.add_subparsers(required=True, metavar="command")
    parser = commands.add_parser("base-code", help="fetch and verify the challenge's official files")
    parser.add_argument("--from", dest="source", type=Path, help="a local clone; left out, the public repository")
    parser.set_defaults(run=base_code)

    parser = commands.add_parser("export", help="put a run's model into checkpoints/")
    parser.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--checkpoint", help="a file in it; left out: the best by score, else the final one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float16: half the size")
    parser.set_defaults(run=export_run)

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
