"""What a student hands in: adapters.py and the files beside it."""
import ast
import importlib.util
import pathlib
import sys
import traceback
from types import ModuleType

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
ADAPTERS = HERE / "adapters.py"
# All that a student's file could be mistaken for, or could borrow.
REPOSITORY = {file.stem for file in ROOT.glob("*.py")}
REPOSITORY |= {"engine", "toy", "lab", "bench", "tests"}
# What stands beside the adapters and is not the student's.
GIVEN = {"conftest.py", "draw.py", "given.py", "grading.py", "hand_in.py"}
GIVEN |= {file.name for file in HERE.glob("test_*.py")}


def own_files(adapters: pathlib.Path) -> list[pathlib.Path]:
    return [file for file in sorted(adapters.parent.glob("*.py")) if file.name not in GIVEN]


def check_names(folder: pathlib.Path) -> None:
    """ValueError for a student's file that Python would import in place of the repository's."""
    for file in own_files(folder / ADAPTERS.name):
        if file.stem in REPOSITORY:
            shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
            raise ValueError(f"{shown} has the name of a file of the repository, and Python would "
                             f"import the wrong one: rename it (my_{file.name}), and its import in "
                             "adapters.py")


def load_adapters(file: pathlib.Path) -> ModuleType:
    """ValueError where it, or what it imports, cannot be imported."""
    file = file.resolve()
    check_names(file.parent)
    # The student's files import each other by their bare names.
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location("adapters", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["adapters"] = module
        spec.loader.exec_module(module)
    # Whatever a student's file does.
    except Exception as e:
        where = "".join(traceback.format_exception(e, limit=-1))
        raise ValueError(f"{file} cannot be imported:\n{where}") from None
    return module


def borrowed(adapters: pathlib.Path) -> list[str]:
    """Which of the student's files import what they should write."""
    found = []
    for file in own_files(adapters):
        names = {name.split(".")[0] for name in imported(file)}
        found += [f"{file.name} imports {name}" for name in sorted(names & REPOSITORY)]
    return found


def imported(file: pathlib.Path) -> list[str]:
    """The modules that a file imports; none, where it is not Python (yet)."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names
