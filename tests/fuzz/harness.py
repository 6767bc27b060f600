"""Runs hostile inputs, each in a process of its own, and says how it ended:

    works       status 0
    error       a message of few lines, that names what the case says it should name
    poor        an error whose message names something else, or nothing, or fills a page
    traceback   any other exception, or a signal
    silent      status 0 where an error is expected
    destroyed   a file that was there before has gone or has changed
    hang        longer than LIMIT seconds

A case is data: what is wrong, `arrange(folder)`, which makes it so, and `call(folder)`, which meets
it. The folder is the case's own; what stands in it after `arrange` must be there afterwards, byte
for byte, but for the names in `writes`.
"""
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

LIMIT = 60
# Of a process: what asks for more is ended, before the machine is.
MEMORY = 16 << 30
# Characters and lines of a message that a person still reads.
LONGEST, MOST_LINES = 1500, 12
BAD = ("traceback", "silent", "destroyed", "hang", "poor")


@dataclass(frozen=True)
class Case:
    """expected: "error", "works" or "any" of the two. names: what the message must match, a regular
    expression."""
    what: str
    call: Callable[[pathlib.Path], object]
    arrange: Callable[[pathlib.Path], object] = lambda folder: None
    expected: str = "error"
    names: str = ""
    writes: tuple[str, ...] = ()


def command(main: Callable, *words) -> Callable:
    """A script's main with this command line; "{}" in a word is the case's folder."""
    def call(folder):
        sys.argv = ["script", *(str(word).replace("{}", str(folder)) for word in words)]
        main()
    return call


def damaged_copy(make: Callable[[], pathlib.Path], name: str, edit: Callable) -> Callable:
    """arrange: the folder that make() gives, copied under this name, with something wrong in it"""
    def arrange(folder):
        shutil.copytree(make(), folder / name)
        edit(folder / name)
    return arrange


# --------------------------------------------------------------------------- what was there before

def fingerprint(folder: pathlib.Path) -> dict[str, str]:
    """{path: its kind, and a digest of what it holds}; links are not followed. Whoever opens a
    locked file and closes it loses the lock: not .lock."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != ".lock"):
        mode = path.lstat().st_mode
        content = b""
        if stat.S_ISREG(mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(mode):
            content = os.fsencode(os.readlink(path))
        found[str(path.relative_to(folder))] = f"{mode} {hashlib.sha256(content).hexdigest()}"
    return found


def is_destroyed(case: Case, before: dict, after: dict) -> list[str]:
    lost = [name for name in before if after.get(name) != before[name]]
    return [name for name in lost if not any(fnmatch.fnmatch(name, w) for w in case.writes)]


# ------------------------------------------------------------------------------------- one process

def run_here(case: Case, folder: pathlib.Path, report: pathlib.Path) -> None:
    """The child's part: never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    said = folder.with_name("said")
    with open(said, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # pytest has put something else in their place.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    kind, message = "works", ""
    try:
        case.call(folder)
    except SystemExit as e:
        if e.code:
            sys.stderr.flush()
            kind = "error"
            lines = said.read_text(errors="replace").splitlines()
            message = e.code if isinstance(e.code, str) else "\n".join(lines[-MOST_LINES:])
    except (ValueError, OSError) as e:
        kind, message = "error", str(e)
    except BaseException:
        kind, message = "traceback", traceback.format_exc()
    report.write_text(json.dumps([kind, message]))
    os._exit(0)


@dataclass
class Child:
    case: Case
    place: pathlib.Path
    before: dict
    pid: int
    began: float


def start(case: Case, base: pathlib.Path) -> Child:
    place = pathlib.Path(tempfile.mkdtemp(dir=base))
    folder = place / "folder"
    folder.mkdir()
    case.arrange(folder)
    before = fingerprint(folder)
    pid = os.fork()
    if pid == 0:
        run_here(case, folder, place / "report")
    return Child(case, place, before, pid, time.monotonic())


def judge(child: Child, status: int) -> tuple[str, str]:
    """-> how it ended, and its message"""
    case, report = child.case, child.place / "report"
    if not report.exists():
        return "traceback", f"ended by signal {status & 0x7f}"
    kind, message = json.loads(report.read_text())
    lost = is_destroyed(case, child.before, fingerprint(child.place / "folder"))
    if lost:
        return "destroyed", f"{', '.join(lost[:5])} ({kind}: {message})"
    if kind == "works" and case.expected == "error":
        return "silent", ""
    if kind == "error":
        long = len(message) > LONGEST or message.count("\n") >= MOST_LINES
        told = message.strip() and re.search(case.names, message)
        if case.expected == "works" or long or not told:
            return "poor", message
    return kind, message


def run_cases(cases: list[Case], jobs: int = 2) -> dict[str, list[tuple[Case, str]]]:
    """-> {how it ended: [(case, message)]}"""
    # A process that has used several threads cannot be copied safely.
    torch.set_num_threads(1)
    waiting, running, results = list(reversed(cases)), {}, {}
    with tempfile.TemporaryDirectory() as base:
        while waiting or running:
            while waiting and len(running) < jobs:
                child = start(waiting.pop(), pathlib.Path(base))
                running[child.pid] = child
            for pid, child in list(running.items()):
                ended = finish(child)
                if ended:
                    del running[pid]
                    shutil.rmtree(child.place, ignore_errors=True)
                    results.setdefault(ended[0], []).append((child.case, ended[1]))
            time.sleep(0.002)
    return results


def finish(child: Child) -> tuple[str, str] | None:
    """How a child ended; None while it runs."""
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if pid:
        return judge(child, status)
    if time.monotonic() - child.began > LIMIT:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        return "hang", f"longer than {LIMIT} s"
    return None


def bad(results: dict) -> list[str]:
    """A line for each case that did not end as it should."""
    return [f"{kind}: {case.what}: {message[-1500:]}"
            for kind in BAD for case, message in results.get(kind, ())]
