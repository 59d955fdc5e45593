"""Starting train.py from another command."""

import subprocess
import sys

from src.errors import UserError, on_stop


def split_flags(reserved: list[str]) -> tuple[list[str], list[str]]:
    """This command's own arguments, and those after `--`, which go to train.py.

    Raises: UserError if one of the latter is reserved, abbreviated or not.
    """
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        split = ours.index("--")
        ours, theirs = ours[:split], ours[split + 1 :]
    refuse_flags(theirs, reserved, "after --")
    return ours, theirs


def refuse_flags(flags: list[str], reserved: list[str], where: str) -> None:
    """UserError if one of train.py's `flags` is `reserved` for the script that starts it, abbreviated or not."""
    for flag in flags:
        name = flag.split("=")[0]
        if name.startswith("--") and any(f"--{one}".startswith(name) for one in reserved):
            raise UserError(f"{flag} {where} is for this script to choose: leave it out")


def run_to_the_end(command: list[str], stdout: int | None = None) -> None:
    """Run a script of ours that saves when it is interrupted: on Ctrl-C or SIGTERM, wait for that first.

    Args:
        stdout: as `subprocess.Popen` takes it.
    Raises: UserError if it fails; KeyboardInterrupt once it has ended, if there was one.
    """
    process, interrupted = None, []

    def stop(number, frame):
        interrupted.append(number)
        if process:
            process.terminate()  # SIGTERM reaches this process alone

    with on_stop(stop):
        process = subprocess.Popen(command, stdout=stdout)
        if interrupted:
            process.terminate()
        process.wait()
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        raise UserError(f"{' '.join(command[1:])} failed, and said why above")
