"""What the pages say is what the files hold: code, numbers, names, links, commands. And how the
files themselves are written: columns, statements, imports.

The pages are README.md, CONTRIBUTING.md, docs/*.md, notebooks/instructor/*.md, bench/README.md and
the toy's two cards.
"""
import ast
import graphlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import sample
import train
from engine import data, files
from lab import ablate, evaluate, figures, make, plan, pretrain, tables
from sample import TOY_FOLDER
from tbac import TBACConfig
from tests.conftest import ROOT
from toy import language, world

PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md", "toy/README.md",
         "toy/weights/README.md"]
for folder in ("docs", "notebooks/instructor"):
    PAGES += sorted(f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.md"))
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]
STUDIES = ROOT / "assets" / "study"
# Folders that hold what a person installed, built or trained.
NOT_OURS = ("build", "runs")


def files_of(pattern):
    """Files of the repository, by name: none in hidden folders, build or runs."""
    found = {}
    for file in sorted(ROOT.rglob(pattern)):
        name = file.relative_to(ROOT)
        if not any(part.startswith(".") or part in NOT_OURS for part in name.parts):
            found[name.as_posix()] = file.read_text()
    return found


SOURCES = files_of("*.py")
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}


def test_there_is_a_page_for_each_question():
    expected = {"study", "scores", "paper_to_code", "training", "data", "own_pictures",
                "public_weights", "questions", "promises", "glossary", "references"}
    assert {page[5:-3] for page in PAGES if page.startswith("docs/")} == expected
    for name in expected:
        assert f"](docs/{name}.md" in README, name
        assert "](../README.md)" in TEXT[f"docs/{name}.md"], name


def test_the_readme_is_short():
    assert len(README.encode()) <= 14_000


def test_the_reading_order_has_the_minutes_of_the_files():
    """At 20 lines a minute; in all as they add up."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {name for name in SOURCES if "/" not in name}
    wrong = [(name, said) for name, said in rows
             if abs(int(said) - len(SOURCES[name].splitlines()) / 20) > 2]
    assert not wrong, wrong
    hours, minutes = re.search(r"a minute, (\d+) h (\d+) in all", README).groups()
    assert abs(60 * int(hours) + int(minutes) - sum(int(said) for _, said in rows)) <= 2


# ------------------------------------------------------------------------------------ code shown

def without_comment(line):
    return re.sub(r"\s+# .*", "", line.strip())


def code_shown():
    """(page, file, line) for each line of our code on the pages, with the file that the comment
    above it names. (Blocks without such a comment are programs of the reader's.)"""
    for page, text in TEXT.items():
        for block in re.findall(r"```python\n(# .*?)```", text, re.S):
            file = None
            for line in filter(None, block.splitlines()):
                if line.startswith("# "):
                    file = re.match(r"# ([\w/]+\.py), ", line)[1]
                else:
                    yield page, file, line


def test_the_code_shown_stands_in_the_files():
    held = {name: {without_comment(line) for line in text.splitlines()}
            for name, text in SOURCES.items()}
    shown = list(code_shown())
    lost = [(page, file, line) for page, file, line in shown
            if without_comment(line) not in held[file]]
    assert len(shown) > 5 and not lost, lost


@pytest.mark.slow
def test_the_programs_of_own_pictures_run(tmp_path):
    """In a package of as many names as it has, with the toy as what was trained."""
    images = tmp_path / "package/img/twitter/64"
    images.mkdir(parents=True)
    names = [f"thing {i}" for i in range(1701)] + ["snake", "goose"]
    for i in range(len(names)):
        Image.new("RGBA", (64, 64), (i % 256, 9, 9, 99)).save(images / f"{i}.png")
    listed = [dict(name=name, image=f"{i}.png", has_img_twitter=True)
              for i, name in enumerate(names)]
    (tmp_path / "package/emoji.json").write_text(json.dumps(listed))
    for folder in ("toy/weights", "runs/own", "runs/own-dcae"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(TOY_FOLDER)
    programs = re.findall(r"```python\n(.*?)```", TEXT["docs/own_pictures.md"], re.S)
    assert len(programs) == 4
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        assert not done.returncode, done.stderr
    assert len(list((tmp_path / "emoji/train").glob("*.png"))) == 1700
    assert len(list((tmp_path / "emoji/kept-back").glob("*.png"))) == 3
    assert (tmp_path / "drawn.png").exists()


def test_the_shape_trace_is_that_of_the_released_sizes():
    c = TBACConfig()
    n_block, n_query, side = c.dit.n_layer, c.n_query, c.size // c.dcae.factor
    head = f"B, {c.dit.cross_n_head}"
    size = c.dit.dim // c.dit.cross_n_head
    shapes = (
        f"(B, S, {c.mllm.dim})", f"(B, S + {n_query}, {c.mllm.dim})",
        f"{n_block} x (B, {n_query}, {c.mllm.dim})",
        f"({n_block}, B, {n_query}, {c.dit.caption_dim})",
        f"({n_block}, B, {n_query}, {c.dit.dim})", f"({head}, {n_query}, {size})",
        f"({head}, {side * side}, {n_query})", f"(B, {side * side}, {c.dit.dim})",
        f"(B, {c.dit.channels}, {side}, {side})", f"(B, 3, {c.size}, {c.size})",
    )
    places = [README.find(shape) for shape in shapes]
    assert min(places) > 0 and places == sorted(places), dict(zip(shapes, places))


# --------------------------------------------------------------------------------------- numbers

def study(name):
    return json.loads((STUDIES / f"{name}.json").read_text())


def test_the_readme_says_what_the_study_says():
    seen = study("primary-6000")["scored"]["seen"]
    for wiring in ("ladder", "final"):
        assert f"`{wiring}` {evaluate.percent(seen['table'][wiring]['mean of 6'])}" in README
    test = seen["compared"]["ladder minus final"]
    said = f"{test['verdict']}, by\n{tables.points(test, 1)} points, p {tables.chance(test['p'])}"
    assert said in README, said
    seen = study("penultimate-6000")["scored"]["seen"]
    score = evaluate.percent(seen["table"]["penultimate"]["mean of 6"])
    assert f"for all blocks, {score}, does as well" in README
    assert seen["compared"]["ladder minus penultimate"]["verdict"] == "no difference that matters"


def test_the_study_is_the_one_that_was_planned():
    """Every part that is stored: its arms, seeds, steps, prompts and settings are the plan's."""
    assert {"primary", "primary-6000", "primary-0.001"} <= {*tables.trained()}
    for name in tables.trained():
        first, dash, ending = name.partition("-")
        found, part, differs = study(name), plan.PARTS[first], tables.AGAIN[dash + ending]
        said = dict(steps=plan.STEPS if part.long else plan.OTHER_STEPS, seeds=None,
                    batch=plan.BATCH, lr=plan.LR, n=plan.PROMPTS, draw_steps=plan.DRAW_STEPS,
                    guidance=plan.GUIDANCE) | differs
        assert set(found["runs"]) == {run.name for run in part.runs(said["seeds"])}
        assert {key: found["options"][key] for key in said} == said, name
        for run in found["runs"].values():
            assert str(said["steps"]) in run["scores"] and run["commit"], name


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_files(page):
    assert tables.written(page) == TEXT[page], "python -m lab.tables writes the tables again"


def test_the_studies_are_of_the_shipped_weights():
    names = ("settings", "probes-toy", "rungs", "slots", "noise", "told", "overfit", "int8")
    found = {study(name)["options"]["weights"] for name in names}
    assert found == {files.weights_digest(TOY_FOLDER)}, "of other weights than those shipped"


def test_the_figure_of_edits_shows_each_kind():
    assert set(figures.EDITS) == set(language.EDITS)
    assert all(world.valid(scene) for scene, _ in figures.EDITS.values())


# ---------------------------------------------------------------------------- names, links, words

def names(body, prefix=""):
    """What is defined at the top of a file, and in its classes: {"TBAC", "TBAC.encode",
    "TBACConfig.size", "PRESETS", ...}"""
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            found |= {prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_name_exists(page):
    pointers = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT[page])
    known = {file: names(TREES[file].body) for file in {file for file, _ in pointers}}
    lost = [f"{file}:{name}" for file, name in pointers if name not in known[file]]
    assert not lost, lost
    assert len(pointers) > 50 or page not in ("docs/paper_to_code.md", "docs/glossary.md")


def anchors(page):
    """The headings of a page, as GitHub turns them into links."""
    headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The handout is none of PAGES: the code that it shows is the students'.
@pytest.mark.parametrize("page", [*PAGES, "notebooks/assignment/handout.md"])
def test_links_and_files_exist(page):
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text()
    found = re.findall(r"\]\(([^)]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    inside = [link for link in (a or b for a, b in found) if not link.startswith("http")]
    lost = []
    for link in inside:
        file, _, anchor = link.partition("#")
        target = (folder / file).resolve() if file else ROOT / page
        wrong = anchor and anchor not in anchors(target.relative_to(ROOT))
        if not target.exists() or wrong:
            lost.append(link)
    mentioned = r"(?<![\w/.-])((?:tests|assets|bench|notebooks|docs|engine|toy|lab)/[\w/-]+" \
                r"(?:\.\w+)?)"
    # What a command writes need not be there.
    text = re.sub(r"--out \S+", "", text)
    lost += [name for name in re.findall(mentioned, text) if not (ROOT / name).exists()]
    assert inside and not lost, lost


def test_the_notebooks_point_at_what_exists():
    """Names of files and headings in their text."""
    n = 0
    for name, text in files_of("*.ipynb").items():
        for link in re.findall(r"\]\((\.\./[\w/.]+\.md)(?:#([\w-]+))?\)", text):
            n += 1
            page = ((ROOT / name).parent / link[0]).resolve()
            assert page.exists(), (name, link)
            assert not link[1] or link[1] in anchors(page.relative_to(ROOT)), (name, link)
    assert n > 3


# -------------------------------------------------------------------------------------- commands

COMMAND = re.compile(r"python (?:-m ((?:lab|bench|engine)\.\w+)|(?!-)([\w/]+\.py))([^`\n]*)"
                     r"|torchrun --nproc-per-node \d+ (train\.py)([^`\n]*)")


def commands():
    """(page, script, what follows it) for each command on the pages, once."""
    found = {}
    for page, text in TEXT.items():
        for module, script, said, run, more in COMMAND.findall(text.replace("\\\n", " ")):
            words = (said or more).split("&&")[0].strip()
            found.setdefault((module or script or run, words), page)
    return [(page, script, words) for (script, words), page in found.items()]


PARSERS = {
    "train.py": train.options, "sample.py": sample.options, "lab.evaluate": evaluate.options,
    "lab.ablate": ablate.options, "lab.pretrain": pretrain.options,
    "lab.figures": figures.options, "lab.make": make.options, "engine.data": data.options,
}


@pytest.mark.parametrize("page, script, said", commands())
def test_every_command_is_understood(page, script, said):
    """By the script's own parser, with its choices and kinds of numbers; where that stands inside
    of `main`, the options are there by name."""
    argv = shlex.split(said, comments=True)
    if script not in PARSERS:
        file = script if script.endswith(".py") else f"{script.replace('.', '/')}.py"
        # bench.bench and bench.parts share some options.
        files = [file, "bench/work.py"] if file.startswith("bench/") else [file]
        constants = {node.value for name in files for node in ast.walk(TREES[name])
                     if isinstance(node, ast.Constant)}
        assert {word for word in argv if word.startswith("--")} <= constants
        return
    try:
        PARSERS[script](argv)
    except SystemExit as e:
        # --help ends without one.
        assert not e.code, said


def test_there_are_commands_for_every_script():
    found = {script for _, script, _ in commands()}
    expected = {"train.py", "sample.py", "weights_convert.py", "lab.evaluate", "lab.ablate",
                "lab.pretrain", "lab.figures", "engine.data"}
    assert expected <= found and len(commands()) > 20


# ----------------------------------------------------------------------- how the files are written

def test_no_line_is_above_100_columns():
    lines = [(name, number, line) for name, text in SOURCES.items()
             for number, line in enumerate(text.splitlines(), 1)]
    for name, text in files_of("*.ipynb").items():
        for number, cell in enumerate(json.loads(text)["cells"]):
            if cell["cell_type"] == "code":
                source = "".join(cell["source"]).splitlines()
                lines += [(f"{name}, cell {number}", i, line) for i, line in enumerate(source, 1)]
    wide = [f"{name}:{number}" for name, number, line in lines if len(line) > 100]
    assert len(lines) > 5000 and not wide, wide


def test_no_function_has_more_than_25_statements():
    """Outside of tests: those of the function's body and of all that is nested in it."""
    counts = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not name.startswith("tests/"):
                inside = sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - 1
                counts[f"{name}:{node.lineno} {node.name}"] = inside
    long = {function: n for function, n in counts.items() if n > 25}
    assert len(counts) > 300 and not long, long


# What each kind of file may import, of ours: the table in CONTRIBUTING.md.
NETWORKS = ("ladder", "vit", "mllm", "dit", "dcae")
BELOW = {
    "toy": {"toy"},
    **{name: set(NETWORKS[:i]) for i, name in enumerate(NETWORKS)},
    "engine": {"engine", *NETWORKS},
    "tbac": {"engine", *NETWORKS},
    "sample": {"tbac", "engine", *NETWORKS},
    "weights_convert": {"tbac", "engine", *NETWORKS},
    "train": {"sample", "tbac", "toy", "engine", *NETWORKS},
}
BELOW["lab"] = {"lab", "weights_convert", "train", *BELOW["train"]}
BELOW["notebooks"] = BELOW["lab"] | {"notebooks"}
BELOW["bench"] = BELOW["lab"] | {"bench"}
BELOW["tests"] = BELOW["lab"] | {"notebooks", "bench", "tests"}
MODULES = {name[:-3].replace("/", ".").removesuffix(".__init__"): name for name in SOURCES}


def module_of(name, beside):
    """The one of our modules that an import names, or None: by its full name or, in a script, by
    that of a file beside it."""
    folder = beside.rpartition(".")[0]
    for candidate in (name, f"{folder}.{name}"):
        if candidate in MODULES:
            return candidate
    return None


def imports(module):
    """Yields (module of ours, is it imported inside a function?) for each import in a file."""
    tree = TREES[MODULES[module]]
    inside = {id(n) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for n in ast.walk(function)}
    for node in ast.walk(tree):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [name if module_of(name, module) else node.module for name in wanted]
        for name in wanted:
            if found := module_of(name, module):
                yield found, id(node) in inside


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_up_the_table(module):
    """To what BELOW allows, and at the top of the file."""
    allowed = BELOW[module.split(".")[0]]
    for found, inside_a_function in imports(module):
        assert found.split(".")[0] in allowed, f"{module} imports {found}"
        assert not inside_a_function, f"{module} imports {found} inside a function"


def test_imports_have_no_circle():
    graph = {module: {found for found, _ in imports(module)} for module in MODULES}
    assert len(graph) > 40
    # CycleError names the circle.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)
