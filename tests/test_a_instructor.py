"""The pages for lecturers: minutes add up, and what they say of assignment and notebooks is what
these say themselves. (Links, names and commands: tests/test_0_readme.py.)"""
import re

import torch

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks" / "instructor"
HANDOUT = (ROOT / "notebooks" / "assignment" / "handout.md").read_text()


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


def test_a_lecture_takes_as_long_as_its_parts():
    weeks = re.split(r"^## Week \d", page("syllabus"), flags=re.M)[1:]
    minutes = [re.findall(r"^\| (\d+) \| [^|]+ \|$", week, re.M) for week in weeks]
    assert [sum(map(int, parts)) for parts in minutes] == 6 * [90]


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
