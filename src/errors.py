"""Errors that a user can put right, told in one line, and signals to stop."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """Something the user can put right. Scripts print it as one line and exit with 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's main: a user's error, or a full disk, ends it with one line and exit status 1.

    So does SIGTERM, as Ctrl-C does, so that temporary files and processes that were begun end as well.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (UserError, OSError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # from a loader's worker, its message on the last line
            text = text.split("\n")[-1].removeprefix("src.errors.UserError: ")
        sys.exit("error: " + " ".join(text.split()))
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --batch_size (training: --micro_batch), or end what else is there")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextmanager
def on_stop(handle: Callable) -> Iterator[None]:
    """Within, SIGINT and SIGTERM do nothing but call `handle(number, frame)`."""
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
