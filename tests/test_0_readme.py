"""What the README shows is what the files hold: the code, the line counts, the links."""
import io
import re
import tokenize

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.STRING}


def code_lines(file):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    return len({t.start[0] for t in tokenize.generate_tokens(io.StringIO(file.read_text()).readline) if t.type not in NOT_CODE})


def test_the_code_shown_stands_in_the_files():
    files = {line.strip() for file in ROOT.glob("*.py") for line in file.read_text().splitlines()}
    shown = [re.sub(r"\s+# .*", "", line.strip()) for block in re.findall(r"```python\n(.*?)```", README, re.S) for line in block.splitlines()]
    lines = [line for line in shown if line and not line.startswith("#")]
    bare = {re.sub(r"\s+# .*", "", line) for line in files}
    assert len(lines) > 5 and all(line in bare for line in lines), [line for line in lines if line not in bare]


def test_line_counts():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert {f.name for f in ROOT.glob("*.py")} == counts.keys()
    assert {f.name: code_lines(f) for f in ROOT.glob("*.py")} == {k: int(v) for k, v in counts.items()}


def test_links_and_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`((?:tests|assets)/[\w./]+)`", README):
        assert (ROOT / target).exists(), target
