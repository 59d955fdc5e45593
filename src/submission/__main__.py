"""python -m src.submission base-code | export | check | pack"""

import argparse
import tempfile
from pathlib import Path

from src.errors import UserError, one_line_errors
from src.images import DATA_ROOT
from src.submission import pack as packing
from src.submission.base_code import bring
from src.submission.check import Subject
from src.training.export import DTYPES, TARGET, export
from src.utils import pick_device


def base_code(args: argparse.Namespace) -> None:
    print(f"{len(bring(args.source))} official files, all verified, in base_code/; the splits in data/")


def export_run(args: argparse.Namespace) -> None:
    source = export(args.run_dir, args.checkpoint, args.dtype, args.out)
    print(f"{source} is now {args.out} ({args.dtype}), with its model_config.json beside it")


def subject(args: argparse.Namespace) -> Subject:
    if not (Path("custom_model.py").is_file() and Path("src").is_dir()):
        raise UserError("this folder has no custom_model.py and src/: run it in the project's")
    written = args.writeup or (Path("writeup/writeup.pdf") if args.final else None)
    data = args.data_root.resolve(), args.split_dir.resolve()
    return Subject(Path.cwd(), args.checkpoint, written, *data, str(pick_device(args.device)))


def check(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _, lines = packing.check(subject(args), Path(temporary), "submission")
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("pass", "unproven", "FAIL")}
    print(f"{counts['pass']} passed, {counts['unproven']} unproven, {counts['FAIL']} failed")
    if counts["FAIL"]:
        raise UserError("the submission is not ready; each line above that failed names its remedy")


def pack(args: argparse.Namespace) -> None:
    packing.pack(subject(args), args.team, args.out)


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.submission")
    commands = root.add_subparsers(required=True, metavar="command")

    def command(name: str, run, about: str, **settings) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=about, description=about, **settings)
        parser.set_defaults(run=run)
        return parser

    parser = command("base-code", base_code, "fetch and verify the challenge's official files")
    parser.add_argument("--from", dest="source", type=Path, help="a local clone; left out, the public repository")

    parser = command("export", export_run, "put a run's model into checkpoints/")
    parser.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    parser.add_argument(
        "--checkpoint", help="a file in it; left out: the best by score, the final one, or else the last saved"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="half or a quarter of the size")
    parser.add_argument("--out", type=Path, default=TARGET, help="elsewhere, an experiment's model too")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--checkpoint", type=Path, default=TARGET, help="with its model_config.json beside it")
    shared.add_argument("--final", action="store_true", help="the final submission: with write-up and samples")
    shared.add_argument("--writeup", type=Path, help="of a final submission; default: writeup/writeup.pdf")
    shared.add_argument("--data_root", type=Path, default=Path(DATA_ROOT), help="to look for copied images in")
    shared.add_argument("--split_dir", type=Path, default=Path("data"))
    shared.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    command("check", check, "the challenge's checklist, each line with its remedy", parents=[shared])

    parser = command("pack", pack, "check and zip, then unpack the zip and sample from it once", parents=[shared])
    parser.add_argument("--team", required=True, help="names the zip's folder")
    parser.add_argument("--out", type=Path, default=Path("submission.zip"))

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
