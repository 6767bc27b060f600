"""What all command lines share: how a number, a text, a path or a device is read and checked, and
how errors end."""
import argparse
import contextlib
import pathlib
import re
import sys
import warnings
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from engine.checks import Kind, number, printable, shown, whole
from engine.limits import MAX_CAPTION_BYTES, MAX_FACTOR, MAX_SEED, MAX_SIZE

def of_kind(kind: Kind, read: Callable) -> Callable:
    """For argparse: how an option is read, and what it must be."""
    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = read(text)
            if kind.test(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {kind.text}, not {shown(text)}")

    return convert


def count(low: int, high: int) -> Callable:
    """A whole number."""
    return of_kind(whole(low, high), int)


def real(low: float, high: float) -> Callable:
    """A finite number."""
    return of_kind(number(low, high), float)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line. source: where options come from, if not from the command
    line."""
    source = ""

    def __init__(self, **settings):
        # What is almost an option is none.
        super().__init__(**dict(formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False) | settings)

    def error(self, message):
        self.exit(2, f"error: {self.source}{message} (--help shows all options)\n")


SEED = count(0, MAX_SEED)
FACTOR = real(0, MAX_FACTOR)


def text(value: str) -> str:
    """A prompt, a question."""
    # What the shell passes on may be bytes that are no text.
    try:
        n = len(value.encode())
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{shown(value)} is not UTF-8") from None
    if n > MAX_CAPTION_BYTES:
        limit = f"{MAX_CAPTION_BYTES} bytes are the limit"
        raise argparse.ArgumentTypeError(f"is {n} bytes long, {limit}")
    return value


def path(value: str) -> pathlib.Path:
    """A file or a folder. (Names that are no text can be in a file system, but not in JSON.)"""
    if not text(value):
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return pathlib.Path(value)


def path_text(value: str) -> str:
    """The same, for what is used as text."""
    path(value)
    return value


def device(value: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", value):
        expected = "must be cpu, cuda, cuda:0 (another GPU: cuda:1, ...) or mps"
        raise argparse.ArgumentTypeError(f"{expected}, not {shown(value)}")
    return value


def size(value: str):
    """"512" -> 512, "640x480" (width x height) -> (480, 640)."""
    sides = re.fullmatch(r"(\d{1,9})(x(\d{1,9}))?", value.lower(), re.ASCII)
    found = [int(side) for side in sides.group(1, 3) if side] if sides else [0]
    if not all(1 <= side <= MAX_SIZE for side in found):
        expected = f"must be a number of pixels or WIDTHxHEIGHT, each 1 to {MAX_SIZE}"
        raise argparse.ArgumentTypeError(f"{expected}, not {shown(value)}")
    return found[0] if len(found) == 1 else (found[1], found[0])


# ---------------------------------------------------------------------------------------- errors

@contextlib.contextmanager
def one_line_errors():
    """What a user can cause ends a command with one line and status 1, Ctrl-C with status 130. A
    warning is a line, too."""
    before, warnings.showwarning = warnings.showwarning, show_warning
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as e:
        message = message_of(e)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None
    finally:
        warnings.showwarning = before


def show_warning(message, *where) -> None:
    print(f"warning: {whole_lines(message)}", file=sys.stderr)


def message_of(e: Exception) -> str | None:
    """What a user can cause, in words; None for an error of the program itself."""
    if is_out_of_memory(e):
        return ("this needs more memory than there is: take a smaller size, batch or model "
                f"({whole_lines(e)})")
    known = isinstance(e, ValueError | OSError | SafetensorError)
    return whole_lines(e) if known else None


def whole_lines(e: Exception) -> str:
    """A message of several lines stays one. Of a line that would fill the page, a name of thousands
    of letters in it, the middle is left out."""
    lines = [printable(line, sys.maxsize) for line in str(e).splitlines()]
    return "\n".join(line if len(line) < 1000 else f"{line[:700]} ... {line[-200:]}"
                     for line in lines)


def is_out_of_memory(e: Exception) -> bool:
    """PyTorch has a class for it on an NVIDIA GPU only."""
    if isinstance(e, MemoryError | torch.OutOfMemoryError):
        return True
    return any(said in str(e) for said in ("DefaultCPUAllocator", "MPS backend out of memory"))
