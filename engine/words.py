"""Words that a model has never met. Its folder may list those that it has, in words.txt: a model
trained from nothing knows no others, a public one has no such list."""
import pathlib
import re
import warnings
from collections.abc import Collection

from engine.files import read_text
from engine.limits import MAX_WORDS_BYTES

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")
# So many are named, of a text that has more.
MOST = 12


def never_heard(text: str, known: Collection[str]) -> list[str]:
    """The words of a text that are not among the known ones, once each, in its order.

    A known word with or without a final s is known.
    """
    singular = {word.removesuffix("s") for word in known}
    said = dict.fromkeys(WORD.findall(text.lower().replace("’", "'")))
    return [w for w in said if w not in known and w.removesuffix("s") not in singular]


def listen(folder, *texts: str | None) -> None:
    """Warns of the words that a model folder's words.txt does not list."""
    file = pathlib.Path(folder) / "words.txt"
    if not file.exists():
        return
    new = never_heard(" ".join(filter(None, texts)), set(read_text(file, MAX_WORDS_BYTES).split()))
    if new:
        others = f" and {len(new) - MOST} others" if len(new) > MOST else ""
        warnings.warn(f"never heard: {', '.join(new[:MOST])}{others}", stacklevel=2)
