"""What the README shows is what the files hold: the code, the line counts, the names, the links, the commands."""
import ast
import io
import json
import re
import shlex
import tokenize

import pytest

from lab import evaluate
import sample
import train
from lab import ablate
from engine.options import TOY_FOLDER
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.STRING}


def code_lines(file):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    return len({t.start[0] for t in tokenize.generate_tokens(io.StringIO(file.read_text()).readline) if t.type not in NOT_CODE})


def test_the_code_shown_stands_in_the_files():
    """Each line of it in the file that the comment above it names."""
    bare = lambda line: re.sub(r"\s+# .*", "", line.strip())
    held, file = {f.name: {bare(line) for line in f.read_text().splitlines()} for f in ROOT.glob("*.py")}, None
    shown, lost = 0, []
    for line in (line for block in re.findall(r"```python\n(.*?)```", README, re.S) for line in block.splitlines() if line):
        if line.startswith("# "):
            file = re.match(r"# (\w+\.py), ", line)[1]
        else:
            shown += 1
            lost += [] if bare(line) in held[file] else [f"{file}: {line}"]
    assert shown > 5 and not lost, lost


def test_line_counts():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert {f.name for f in ROOT.glob("*.py")} == counts.keys()
    assert {f.name: code_lines(f) for f in ROOT.glob("*.py")} == {k: int(v) for k, v in counts.items()}


def test_the_study_is_the_one_that_was_run():
    """The README's tables of wirings and queries, cell by cell, from the files that `evaluate.py ablate` wrote."""
    table = json.loads((ROOT / "assets" / "study" / "wirings.json").read_text())["table"]
    for kind, row in table.items():
        shown = ("mean of 6", "counting, seen", "position, seen", "colour attribution, seen")
        line = f"| {kind} | " + " | ".join(evaluate.percent(row[c]) for c in shown)
        assert line in README, line
        if test := row.get("minus last"):
            assert f"{line} | {ablate.points(test)} |" in README, ablate.points(test)
    assert len(table) == 10 and all(row["seeds"] == 3 for row in table.values())
    table = json.loads((ROOT / "assets" / "study" / "wirings-shipped.json").read_text())["table"]
    for kind, row in table.items():
        line = f"\n  | {kind} | {evaluate.percent(row['mean of 6'])} | {ablate.points(row['minus last']) if kind != 'last' else ' | '} |"
        assert line in README, line
    table = json.loads((ROOT / "assets" / "study" / "queries.json").read_text())["table"]
    for n in ablate.QUERIES:
        top, last = (evaluate.percent(table[f"{wiring}, {n} queries"]["mean of 6"]) for wiring in ("top", "last"))
        line = f"\n  | {n} | {top} | {last} | {ablate.points(table[f'top, {n} queries']['minus last'])} |"
        assert line in README, line
    assert len(table) == 8 and all(row["seeds"] == 3 for row in table.values())


def test_experiments_are_those_that_were_run():
    """Scores of settings and probes, number by number, from the files that `evaluate.py ablate` wrote."""
    found = {study: json.loads((ROOT / "assets" / "study" / f"{study}.json").read_text()) for study in ("settings", "probes", "rungs")}
    rows = {line.split(" | ")[0]: line for line in README.splitlines() if line.startswith("| ")}
    said = rows["| What is guidance good for?"] + rows["| How few steps?"]
    for name, row in found["settings"]["table"].items():
        assert evaluate.percent(row["mean of 6"]) in said, name
    for name, row in found["settings"]["edits"].items():
        for what in ("unchanged", "followed"):
            assert evaluate.percent(row[what]) in rows["| What holds on to the picture?"], (name, what)
    for fact in ("first colour", "first shape", "second colour", "second shape", "side"):
        depths = found["probes"]["table"][fact]["depths"]
        assert f"{100 * depths[1]:.0f} / {100 * depths[-1]:.0f}" in rows["| What do the queries know at which depth?"], fact
    weights = {ablate.digest(TOY_FOLDER), *(content["options"]["weights"] for content in found.values())}
    assert len(weights) == 1, "of other weights than those shipped"


def test_the_scores_are_those_in_the_record():
    scores = json.loads((TOY_FOLDER / "record.json").read_text())["scores"]["scores"]
    for task, what in (("draw", "category, seen"), ("edit", "followed, seen"), ("edit", "unchanged, seen"), ("edit", "both, seen"),
                       ("edit", "things kept, seen"), ("ask", "a picture, seen")):
        assert evaluate.percent(scores[task]["mean of 6"][what]) in README, (task, what)


def test_no_function_is_longer_than_40_lines():
    files = [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py"), *(ROOT / "engine").glob("*.py"), *(ROOT / "toy").glob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    functions = [(f.name, n.name, n.end_lineno - n.lineno + 1) for f in files for n in ast.walk(ast.parse(f.read_text()))
                 if isinstance(n, ast.FunctionDef)]
    assert len(functions) > 300 and not [x for x in functions if x[2] > 40]


def names(body, prefix=""):
    """What is defined at the top of a file, and in its classes: {"TBAC", "TBAC.encode", "TBACConfig.size", "PRESETS", ...}"""
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {prefix + n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def test_every_name_exists():
    pointers = re.findall(r"`([\w/]+\.py):([\w.]+)`", README + (ROOT / "bench" / "README.md").read_text())
    known = {file: names(ast.parse((ROOT / file).read_text()).body) for file in {file for file, _ in pointers}}
    assert len(pointers) > 50 and not [p for p in pointers if p[1] not in known[p[0]]], [p for p in pointers if p[1] not in known[p[0]]]


def test_links_and_files_exist():
    links = [a or b for a, b in re.findall(r"\]\(([^)]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", README)]
    links += re.findall(r"(?<![\w/.-])((?:tests|assets|bench|notebooks)/[\w/-]+(?:\.\w+)?)", README)
    headings = {"#" + re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", README, re.M)}
    inside = [link for link in links if not link.startswith("http")]
    lost = [link for link in inside if link not in headings and not (ROOT / link.split("#")[0]).exists() or link == ""]
    assert len(inside) > 5 and not lost, lost


COMMANDS = re.findall(r"python (?!-)([\w/]+\.py)([^`\n]*)|torchrun --nproc-per-node \d+ (train\.py)([^`\n]*)", README.replace("\\\n", " "))
COMMANDS = list(dict.fromkeys((a or c, (b or d).split("&&")[0].strip()) for a, b, c, d in COMMANDS))


@pytest.mark.parametrize("script, said", COMMANDS)
def test_every_command_is_understood(script, said):
    """By the script's own parser, with its choices and kinds of numbers; where that stands inside of `main`, the options are there by name."""
    argv = shlex.split(said, comments=True)
    if script == "evaluate.py" and argv[:1] == ["ablate"]:
        script, argv = "bench/ablate.py", argv[1:]
    parser = {"bench/ablate.py": ablate.options, "train.py": train.options, "sample.py": sample.options, "evaluate.py": evaluate.options}.get(script)
    if parser is None:
        text = {node.value for node in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(node, ast.Constant)}
        assert {word for word in argv if word.startswith("--")} <= text
        return
    try:
        parser(argv)
    except SystemExit as e:
        assert not e.code, said                                                 # --help ends without one


def test_there_are_commands_for_every_script():
    assert {"train.py", "sample.py", "evaluate.py", "weights_convert.py"} <= {script for script, _ in COMMANDS} and len(COMMANDS) > 20
