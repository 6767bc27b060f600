"""The folder of a run (--out): what a run writes there, by full names; what it may write over; and
the lock that keeps a second run out.

    options.json  log.jsonl  curves.png  sheet-00000500.png  tokenizer.json  .lock
    config.json  model.safetensors                                      the model, see files.py
    code.safetensors                                                    see lab/pretrain.py
    checkpoints/step-00000500/                                          see state.py
    latents/0123456789abcdef/...                                        see data.Latents
"""
import contextlib
import os
import pathlib
import re
import socket
import tempfile

from engine.files import MODEL_FILE, check_replaceable, check_writable, read_text
from engine.log import read_log
from engine.options import is_of_a_run
from engine.state import checkpoints

# Windows has no such module, and runs there are not kept apart.
try:
    import fcntl
except ImportError:
    fcntl = None

# What .lock holds: whose run it was; nothing where that was killed at once.
OWNER = re.compile(r"(process \d+ on .*\n?)?")
# What a run writes before its first checkpoint, or draws, or leaves beside its model.
RUN_FILE = re.compile(r"options\.json|log\.jsonl|curves\.png|sheet-\d{8}\.png|tokenizer\.json"
                      r"|code\.safetensors")


def last_checkpoint(args) -> pathlib.Path | None:
    """Where a run begins: the last checkpoint in --out, or None. ValueError where this run would
    write over another one, or over a model that has no run."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a folder")
    found = checkpoints(args.out)
    if found and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume, or another --out")
    if not found and args.out.is_dir():
        for file in sorted(args.out.iterdir()):
            if file.name == "config.json" or MODEL_FILE.fullmatch(file.name):
                raise ValueError(f"--out {args.out} holds a model ({file.name}) without the "
                                 "checkpoints of a run: it would be lost, give another --out")
    return found[-1] if found else None


@contextlib.contextmanager
def run_folder(args):
    """Makes --out and locks it while the block runs, for the first process. With --dry-run, --out
    is a folder that goes afterwards. ValueError where it is no place for a run."""
    with contextlib.ExitStack() as stack:
        if args.dry_run:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            args.out = pathlib.Path(scratch)
        if os.environ.get("RANK", "0") == "0":
            last_checkpoint(args)
            args.out.mkdir(parents=True, exist_ok=True)
            check_place(args.out)
            stack.enter_context(lock(args.out))
            if (args.out / "log.jsonl").exists():
                # What is wrong with it should not show only when the run has ended.
                read_log(args.out)
        yield


def check_place(out: pathlib.Path) -> None:
    """ValueError where a run would write over a file that is not a run's, or not a file."""
    check_writable(out)
    held = out / ".lock"
    if held.is_file() and not OWNER.fullmatch(read_text(held, 1000)):
        raise ValueError(f"--out {out} holds .lock, which is not of a run: it would be lost, give "
                         "another --out")
    known = is_of_a_run(out / "options.json") or held.exists()
    for file in sorted(out.iterdir()):
        mine = RUN_FILE.fullmatch(file.name)
        if mine or file.name == ".lock":
            check_replaceable(file)
        if mine and not known and not checkpoints(out):
            raise ValueError(f"--out {out} holds {file.name}, which is not of a run: it would be "
                             "lost, give another --out")


@contextlib.contextmanager
def lock(out: pathlib.Path):
    """Keeps other processes from running in the same folder. The system lets go of the lock when
    its owner ends, in whatever way, so what a killed run leaves behind keeps nobody out. The file
    stays: it says who was last."""
    with open(out / ".lock", "a+") as file:
        file.seek(0)
        owner = file.read(200).strip()
        if fcntl:
            try:
                # Not inherited by helper processes, as flock would be.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                message = "is running there: wait for its end, or give another --out"
                raise ValueError(f"--out {out}: {owner} {message}") from None
            except OSError:
                # A file system without locks.
                pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
