"""Commands of ours run in the tests' own process: to start one takes four seconds."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from src.errors import UserError, one_line_errors


def run_here(cwd: Path, module: str, *arguments) -> subprocess.CompletedProcess:
    """What `python -m module arguments` would print and return in the folder `cwd`; of a package, its __main__."""
    if module.startswith("src.") and module.count(".") == 1:
        module += ".__main__"
    main, before, handler = importlib.import_module(module).main, Path.cwd(), signal.getsignal(signal.SIGTERM)
    command, out, err, code = [module, *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    os.chdir(cwd)
    try:
        with mock.patch("sys.argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with one_line_errors():
                main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        err.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
    finally:
        os.chdir(before)
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def started(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A process that goes on beside the test, and ends with it at the latest, as do those that it began."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)  # torchrun gives its processes 30 s
                except subprocess.TimeoutExpired:
                    process.kill()


def run_to_the_end_here(command: list[str], stdout: int | None = None) -> None:
    """In the place of `run_to_the_end`, for commands that start train.py."""
    result = run_here(Path.cwd(), "train", *command[2:])
    if result.returncode:
        raise UserError(result.stderr)
