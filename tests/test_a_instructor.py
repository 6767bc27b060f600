"""The pages for lecturers: minutes add up, and what they say of assignment and notebooks is what
these say themselves. (Links, names and commands: tests/test_0_readme.py.)"""
import ast
import json
import re

import torch

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks" / "instructor"
ASSIGNMENT = ROOT / "notebooks" / "assignment"
HANDOUT = (ASSIGNMENT / "handout.md").read_text()


def page(name):
    return (FOLDER / f"{name}.md").read_text()


# -------------------------------------------------------------------------------------- syllabus

def test_the_weeks_of_the_syllabus_add_up():
    """Row by row, and all together; the parts have the minutes that the handout says."""
    text = page("syllabus")
    rows = re.findall(r"^\| (\d) \| .*?\| (\d+) \| .*?\| (\d+) \| part (\d) \| (\d+) \| "
                      r".*?\| (\d+) \| (\d+) \|$", text, re.M)
    assert [row[0] for row in rows] == list("123456")
    for week, lecture, notebooks, _, assignment, read, total in rows:
        minutes = [int(n) for n in (lecture, notebooks, assignment, read)]
        assert sum(minutes) == int(total), week
    total = sum(int(row[-1]) for row in rows)
    assert f"Together {total} minutes, {round(total / 60)} hours" in text

    said = re.findall(r"^\| \[(\d) [^|]+\| (\d) \| \d+ \| (\d+) h(?: (\d+))? \|", HANDOUT, re.M)
    of_handout = {(week, part): 60 * int(h) + int(m or 0) for part, week, h, m in said}
    assert {(row[0], row[3]): int(row[4]) for row in rows} == of_handout


def test_the_notebooks_take_as_long_as_they_say():
    """All together: guidance, in the first one, comes a week later."""
    said = []
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = "".join("".join(cell["source"]) for cell in json.loads(file.read_text())["cells"])
        said.append(re.search(r"\*\*Time:\*\*\s(\d+)\sminutes", text)[1])
    planned = re.findall(r"ipynb\)[^|]*\| (\d+) \| part", page("syllabus"))
    assert len(said) == 8 and sum(map(int, said)) == sum(map(int, planned))


def test_a_lecture_takes_as_long_as_its_parts():
    weeks = re.split(r"^## Week \d", page("syllabus"), flags=re.M)[1:]
    minutes = [re.findall(r"^\| (\d+) \| [^|]+ \|$", week, re.M) for week in weeks]
    assert [sum(map(int, parts)) for parts in minutes] == 6 * [90]


def test_every_notebook_has_its_week():
    linked = re.findall(r"\]\(\.\./(\w+)\.ipynb\)", page("syllabus"))
    notebooks = sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(set(linked)) == notebooks


# ------------------------------------------------------------------------------ before you start

def test_the_answers_to_the_test_are_right():
    """Its code runs; each question has its answer."""
    answers = page("before_you_start_answers")
    blocks = re.findall(r"```py\n(.*?)```", answers, re.S)
    torch.manual_seed(0)
    exec("\n".join(blocks), {})
    assert len(blocks) > 5

    def numbers(text):
        return [int(n) for n in re.findall(r"^\*\*(\d+)\.\*\*", text, re.M)]

    assert numbers(answers) == numbers(page("before_you_start")) == [*range(1, 15)]


# -------------------------------------------------------------------------------------- mistakes

def strings(file):
    """All texts in a file of Python, as they are said."""
    return [node.value for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_graders_say_what_the_page_says_they_say():
    """In the tests of that part; and every problem has a row."""
    assignment = page("mistakes").split("## The notebooks")[0]
    parts = re.split(r"^## Part (\d): .*", assignment, flags=re.M)
    seen = set()
    for part, text in zip(parts[1::2], parts[2::2]):
        [file] = ASSIGNMENT.glob(f"test_{part}_*.py")
        said = strings(file)
        rows = re.findall(r"^\| (\d\w(?:, \d\w)*) \| (.*?) \| .*? \| \".*\" \|$", text, re.M)
        lost = [quote for _, quote in rows if not any(quote in words for words in said)]
        assert len(rows) == len(re.findall(r"^\| \d", text, re.M)) > 5 and not lost, lost
        seen.update(problem for problems, _ in rows for problem in problems.split(", "))
    assert seen == set(re.findall(r"^### Problem (\d\w) ", HANDOUT, re.M))


def exercises(file):
    """[(number, title)]: "**Exercise 1: title.**", or a list below the heading."""
    cells = json.loads(file.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title = r"([^*]+?)[.?]?\*\*"
    listed = re.findall(rf"^(\d)\. \*\*{title}", text.partition("## Exercises")[2], re.M)
    return re.findall(rf"\*\*Exercise (\d): {title}", text) or listed


def test_every_exercise_has_its_row():
    """By its number and title, as the notebook has it."""
    expected = []
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, title in exercises(file):
            expected.append(f"{file.stem[0]}.{number} {title[0].lower()}{title[1:]}")
    rows = re.findall(r"^\| (\d\.\d .+?) \| .+? \| .+? \|$", page("mistakes"), re.M)
    assert rows == expected and len(rows) >= 18


# ---------------------------------------------------------------------------------------- rubric

def test_shares_add_up():
    """Of the grade, of the assignment, of the project."""
    tables = re.split(r"\n\n", page("rubric"))
    shares = [re.findall(r"^\| [^|]+ \| (\d+) \|", table, re.M) for table in tables]
    assert [sum(map(int, found)) for found in shares if found] == [100, 100, 100]


# -------------------------------------------------------------------------------------- projects

def test_ten_projects_say_what_one_has_to_know():
    _, *projects = re.split(r"^## \d+\. ", page("projects"), flags=re.M)
    parts = ["Question", "First steps", "Machine", "A good result", "Pitfalls"]
    for project in projects:
        found = re.findall(r"^\*\*([^*]+)\.\*\*", project, re.M)
        assert [name for name in found if name != "Rules"] == parts, project[:40]
    assert len(projects) == 10


# ---------------------------------------------------------------------------------------- slides

def slides():
    """-> [(what is shown, notes)]"""
    _, front, *texts = re.split(r"^---$", page("slides"), flags=re.M)
    assert "\nmarp: true\n" in front
    notes = ["\n".join(re.findall(r"<!--\n(.*?)-->", text, re.S)) for text in texts]
    return [(re.sub(r"<!--.*?-->", "", text, flags=re.S), said)
            for text, said in zip(texts, notes)]


def test_there_are_six_lectures():
    weeks = [re.findall(r"^# (Week \d) · ", shown, re.M) for shown, _ in slides()]
    starts = [i for i, week in enumerate(weeks) if week]
    assert [weeks[i] for i in starts] == [[f"Week {n}"] for n in range(1, 7)]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(weeks)])]
    assert starts[0] == 0 and all(12 <= n <= 16 for n in lengths), lengths


def test_every_question_has_its_answer_in_the_notes():
    asking = [(shown, notes) for shown, notes in slides() if "**Question.**" in shown]
    assert len(asking) > 50
    without = [shown for shown, notes in asking if not notes.startswith("Answer: ")]
    assert not without, without


def test_a_slide_fits():
    """One idea: a heading, and not much below it; every slide has notes."""
    for shown, notes in slides():
        text = re.sub(r"```.*?```", "", shown, flags=re.S)
        assert len(re.findall(r"^# ", text, re.M)) == 1, shown
        words = len(re.findall(r"[\w']+", re.sub(r"\$+[^$]*\$+|!\[.*?\)", "", text)))
        assert words <= (60 if "![bg" in shown else 100), (words, shown)
        assert len(notes.split()) >= 5, shown
