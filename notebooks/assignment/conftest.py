"""What `pytest notebooks/assignment` says: a few lines for what is wrong, which problem comes next,
and the points.

    pytest notebooks/assignment                      # all
    pytest notebooks/assignment -k 4b                # one problem
    pytest notebooks/assignment --adapters anna/adapters.py --scores anna.json
"""
import json
import pathlib
import re

import pytest

from notebooks.assignment.grading import OwnAttention, Wrong
from notebooks.assignment.hand_in import ADAPTERS, HERE, borrowed, check_names, load_adapters

# Problem -> its report, in the order in which they ran.
RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("assignment")
    group.addoption("--adapters", type=pathlib.Path, default=ADAPTERS, metavar="FILE",
                    help="the adapters to be graded (default: notebooks/assignment/adapters.py)")
    group.addoption("--scores", type=pathlib.Path, metavar="FILE",
                    help="also write the points to this JSON file")


def pytest_configure(config):
    config.stash[RESULTS] = {}
    # Of an error in a student's code: where it is, without pages of the tests' own.
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"
    # The score at the end says it once more: no list of failures below it.
    if config.option.reportchars == "fE":
        config.option.reportchars = ""


def pytest_sessionstart(session):
    """Before anything is imported: pytest puts this folder in front of the repository."""
    folders = dict.fromkeys([HERE, adapters_file(session.config).parent])
    try:
        for folder in folders:
            check_names(folder)
    except ValueError as e:
        pytest.exit(str(e), 2)


def adapters_file(config) -> pathlib.Path:
    # Where pytest meets this folder on its way, it knows no such option.
    return config.getoption("--adapters", ADAPTERS).resolve()


@pytest.fixture(scope="session")
def adapters(pytestconfig):
    """The module that is graded. Where it cannot be imported, nothing else is tried."""
    try:
        return load_adapters(adapters_file(pytestconfig))
    except ValueError as e:
        pytest.exit(str(e), 2)


# -------------------------------------------------------------------------------- of one problem

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with OwnAttention():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A problem that nobody has written yet is no failure, and a wrong answer has its message
    only."""
    report = yield
    marker = item.get_closest_marker("problem")
    if marker is None or (report.when != "call" and report.passed):
        return report
    report.problem = re.sub(r"test_(\d\w)_", r"\1 ", item.name)
    report.points = marker.args[0]
    report.said = ""
    error = call.excinfo
    if error and error.errisinstance(NotImplementedError) and unwritten(item.config, error):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), None, "not written yet")
    elif error and error.errisinstance(Wrong):
        report.said = report.longrepr = str(error.value)
    elif error:
        report.said = error.exconly()
    item.config.stash[RESULTS][report.problem] = report
    return report


def unwritten(config, error) -> bool:
    """Raised by the adapters themselves, not by something that they call."""
    return pathlib.Path(error.traceback[-1].path) == adapters_file(config)


def pytest_report_teststatus(report):
    if report.skipped and hasattr(report, "problem"):
        return "not yet", "-", "NOT YET"
    return None


# -------------------------------------------------------------------------------------- at the end

def pytest_terminal_summary(terminalreporter, config):
    reports = config.stash[RESULTS]
    if not reports:
        return
    say = terminalreporter.write_line
    terminalreporter.section("score")
    part = None
    for name, report in reports.items():
        if name[0] != part:
            part = name[0]
            say(f"part {part}: {score([r for r in reports.values() if r.problem[0] == part])}")
        said = {"passed": "", "skipped": "not yet"}.get(report.outcome, "wrong, see above")
        say(f"  {name:<24} {earned(report)} of {report.points}   {said}".rstrip())
    say(f"in all: {score(reports.values())} points")
    taken = borrowed(adapters_file(config))
    for line in taken:
        say(f"not your own: {line}")
    say(following(reports.values(), taken))
    if file := config.getoption("--scores", None):
        file.write_text(json.dumps(as_json(reports, taken), indent=1))


def earned(report) -> int:
    return report.points if report.passed else 0


def score(reports) -> str:
    return f"{sum(map(earned, reports))} of {sum(r.points for r in reports)}"


def following(reports, taken: list[str]) -> str:
    """Which problem to turn to: the first one that is not right. taken: what is not one's own."""
    for report in reports:
        number = report.problem.split()[0]
        if report.skipped:
            return f"next: write {report.problem} (handout.md, problem {number})"
        if report.failed:
            return f"next: mend {report.problem} (pytest notebooks/assignment -k {number})"
    return "all right, but not all of it your own" if taken else "all right"


def as_json(reports: dict, taken: list[str]) -> dict:
    problems = {name: {"points": earned(r), "of": r.points, "said": r.said}
                for name, r in reports.items()}
    return {"points": sum(map(earned, reports.values())),
            "of": sum(r.points for r in reports.values()),
            "borrowed": taken, "problems": problems}


def pytest_sessionfinish(session):
    """Status 0 only where all that ran is right."""
    reports = session.config.stash[RESULTS].values()
    if session.exitstatus == 0 and any(report.skipped for report in reports):
        session.exitstatus = 1
