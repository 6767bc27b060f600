"""Writes the tables of README.md, docs/ and the toy's two cards from the files that hold what was
made and measured.

    python -m lab.tables

The text between two marks, <!-- NAME --> and <!-- end of NAME -->, is replaced. Its numbers are of
toy/weights/record.json and assets/study.
"""
import functools
import pathlib

from engine.command import Parser, one_line_errors
from engine.files import read_json, write_text
from lab import plan
from lab.evaluate import GENEVAL, OTHER, percent
from sample import TOY_FOLDER

ROOT = pathlib.Path(__file__).resolve().parents[1]
STUDIES = ROOT / "assets" / "study"
RECORD = TOY_FOLDER / "record.json"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(page: str, blocks: dict[str, str], file: pathlib.Path) -> str:
    """The text of a page with its blocks as they are now. ValueError for one without a place."""
    for name, text in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start not in page or end not in page:
            raise ValueError(f"{file} has no place for {name}: {start} and {end}")
        before, rest = page.split(start, 1)
        _, after = rest.split(end, 1)
        page = f"{before}{start}\n{text}\n{end}{after}"
    return page


# ------------------------------------------------------------------------------- the toy's scores

def scores(task: str) -> dict:
    """{category or mean: {"what, pairs": mean and interval}}"""
    return read_json(RECORD)["scores"]["scores"][task]


def mean(rows: dict) -> dict:
    """Of what all categories have (other words are no category) the mean of all; else the mean of
    those that have it."""
    found = {}
    for name in reversed(rows):
        if name.startswith("mean of"):
            found |= rows[name]
    return found


def cells(row: dict, *columns: str) -> list[str]:
    return [percent(row[column]) if column in row else "" for column in columns]


EDITED = {
    "followed": "the instruction is followed",
    "unchanged": "everything else is unchanged",
    "both": "both",
    "objects kept": "of the objects that the edit should leave alone, those left unchanged",
}


def scores_in_short() -> str:
    drawn, edited, asked = (mean(scores(task)) for task in ("draw", "edit", "ask"))
    followed, unchanged, both, kept = cells(edited, *(f"{what}, seen" for what in EDITED))
    pictures, words = cells(asked, "a picture, seen", "words, seen")
    other = percent(scores("draw")[OTHER]["category, seen"])
    return (f"- drawing, mean of GenEval's six categories: {percent(drawn['category, seen'])}; in "
            f"words unlike those of training: {other};\n"
            f"- editing: instruction followed {followed}, everything else unchanged {unchanged}, "
            f"both {both};\n  objects left unchanged {kept};\n"
            f"- questions about pictures: {pictures}; about scenes in words: {words}.")


def drawing() -> str:
    columns = ("category, seen", "category, never seen")
    rows = [[category, *cells(scores("draw")[category], *columns)] for category in GENEVAL]
    rows.append(["**mean of six**", percent(mean(scores("draw"))["category, seen"]), ""])
    rows.append([OTHER, *cells(scores("draw")[OTHER], *columns)])
    return table(["category", "seen", "never seen"], rows)


def means(task: str, whats: dict[str, str]) -> str:
    """Over the categories of a task; whats: {what is judged: in words}."""
    rows = []
    for what, words in whats.items():
        columns = f"{what}, seen", f"{what}, never seen"
        rows.append([words, *cells(mean(scores(task)), *columns),
                     *cells(scores(task)[OTHER], columns[0])])
    return table(["", "seen", "never seen", OTHER], rows)


def editing() -> str:
    return means("edit", EDITED)


def edits() -> str:
    columns = ("both, seen", "both, never seen")
    rows = [[kind, *cells(row, *columns)] for kind, row in scores("edit").items()
            if kind != OTHER and not kind.startswith("mean of")]
    return table(["both, by kind", "seen", "never seen"], rows)


def answers() -> str:
    return means("ask", {"a picture": "questions about pictures",
                         "words": "questions about scenes in words"})


def ceiling() -> str:
    """What the grader reads in correct pictures that have gone through the autoencoder."""
    whats = {"drawings": "draw: category"} | {
        f"edits: {what}": f"edit: {what}" for what in ("followed", "unchanged", "both")}
    found = {name: scores("grader")[row]["right pictures, reconstructed"]
             for name, row in whats.items()}
    return table(list(found), [[percent(row) for row in found.values()]])


def cpu_minutes(record: dict) -> float:
    """Of all stages."""
    return sum(stage["cpu_minutes"] for stage in record["stages"].values())


def recipe() -> str:
    """A row for each stage."""
    record = read_json(RECORD)
    rows = []
    for name, made in record["stages"].items():
        rows.append([name, str(made["steps"]), str(made["batch"]), f"{made['lr']:g}",
                     f"{made['minutes']:.0f}", f"{made['cpu_minutes']:.0f}"])
    minutes = sum(made["minutes"] for made in record["stages"].values())
    rows.append(["**all**", "", "", "", f"{minutes:.0f}", f"{cpu_minutes(record):.0f}"])
    return table(["stage", "steps", "batch", "learning rate", "minutes", "CPU minutes"], rows)


def on_the_way() -> str:
    """Of each stage and each sheet of pictures: its step, after how many minutes, and the mean loss
    of the tenth of these steps before it."""
    logs = read_json(TOY_FOLDER / "logs.json")
    rows = []
    for name, made in read_json(RECORD)["stages"].items():
        found = []
        for sheet in sorted(TOY_FOLDER.glob(f"{name}-sheet-*.png")):
            step = int(sheet.stem.split("-")[-1])
            losses = [loss for at, loss in zip(logs[name]["step"], logs[name]["loss"])
                      if 0.9 * step < at <= step]
            minute = made["minutes"] * step / made["steps"]
            found.append(f"[{step}](../toy/weights/{sheet.name}) ({minute:.0f} min): "
                         f"{sum(losses) / len(losses):.2g}")
        rows.append([name, *found, *[""] * (4 - len(found))])
    return table(["stage", "step (minutes): loss", "", "", ""], rows)


def seeds() -> list[dict]:
    """The records of all seeds, the shipped one first."""
    record = read_json(RECORD)
    return [record, *record["other_seeds"]]


ON_THE_BOARD = {
    "mean of six": ("draw", "category, seen"), "answers": ("ask", "a picture, seen"),
    "edits followed": ("edit", "followed, seen"), "unchanged": ("edit", "unchanged, seen"),
}


def board() -> str:
    """This recipe's row: of its seeds, the slower one's minutes and the lowest scores."""
    records = seeds()
    slowest = max(records, key=cpu_minutes)
    row = [f"{cpu_minutes(slowest) / 2:.0f}", slowest["machine"]["processor"]]
    for task, column in ON_THE_BOARD.values():
        found = [mean(record["scores"]["scores"][task])[column] for record in records]
        row.append(percent(min(found, key=lambda score: score["mean"])))
    row += [f"{len(records)}", "the recipe above", records[0]["commit"]]
    return table(["minutes", "machine", *ON_THE_BOARD, "seeds", "what is new", "commit"], [row])


IN_A_ROW = ["drawing, mean of six", f"drawing, {OTHER}", "edits: followed", "edits: unchanged",
            "answers about pictures", "answers about words"]


def in_a_row(evaluated: dict) -> list[str]:
    """The means of what lab.evaluate has written."""
    found = evaluated["scores"]
    drawn, edited, asked = (mean(found[task]) for task in ("draw", "edit", "ask"))
    return [*cells(drawn, "category, seen"), *cells(found["draw"][OTHER], "category, seen"),
            *cells(edited, "followed, seen", "unchanged, seen"),
            *cells(asked, "a picture, seen", "words, seen")]


def by_seed() -> str:
    """The same command with other seeds."""
    rows = []
    for record in seeds():
        rows.append([str(record["seed"]), *in_a_row(record["scores"])])
    return table(["seed", *IN_A_ROW], rows)


def parts() -> str:
    """What was drawn after as many steps with --train all, ladder+cross, ladder."""
    kinds = ("two objects", "counting", "position", "colour attribution")
    rows = []
    for trained, found in study("parts")["scores"].items():
        drawn = found["draw"]
        seen, never_seen = cells(mean(drawn), "category, seen", "category, never seen")
        by_kind = [cells(drawn[kind], "category, seen")[0] for kind in kinds]
        rows.append([f"`{trained}`", seen, *by_kind, never_seen])
    return table(["`--train`", "mean of six", *kinds, "the four, never seen"], rows)


def in_8_bits() -> str:
    """The same prompts, with the weights as they are and in 8 bits."""
    rows = [["as shipped", *in_a_row(read_json(RECORD)["scores"])],
            ["`--int8`", *in_a_row(study("int8"))]]
    return table(["weights", *IN_A_ROW], rows)


def examples() -> str:
    """How much each stage has seen."""
    rows = []
    for name, stage in read_json(RECORD)["stages"].items():
        rows.append([name, EXAMPLES[name], f"{stage['steps'] * stage['batch']:,}"])
    return table(["stage", "an example is", "examples"], rows)


EXAMPLES = {
    "vit": "a picture, and what each of its patches shows",
    "mllm": "a conversation about a picture or a text",
    "dcae": "a picture",
    "dit": "a picture, and what is told of it in the code",
    "ladder": "a caption and a picture",
    "t2i": "a caption and a picture",
    "edit": "a caption and a picture; or a picture, an instruction, and the picture after it",
}


# ----------------------------------------------------------------------------------- the studies

def study(name: str) -> dict:
    return read_json(STUDIES / f"{name}.json")


def rungs() -> str:
    """What each rung's exchange costs, in points."""
    rows = []
    for j, row in enumerate(study("rungs")["points"]["another prompt"]):
        lost = [row[f"{category}, seen"] for category in GENEVAL]
        values = [sum(lost) / len(lost), *lost]
        rows.append([str(j), *(str(round(value)) for value in values)])
    return table(["rung", "mean of six", *GENEVAL], rows)


def hundredths(*values: float) -> list[str]:
    return [f"{100 * value:.0f}" for value in values]


def probes_by_state(found: dict) -> str:
    """Of all queries together, in percent."""
    rows = []
    for fact, by_mllm in found.items():
        for name, row in by_mllm.items():
            rows.append([fact, f"`{name}`", *hundredths(row["chance"], *row["together"])])
    states = [f"state {i}" for i in range(len(row["together"]))]
    return table(["fact", "MLLM", "chance", *states], rows)


def probes() -> str:
    return probes_by_state(study("probes")["table"])


def probes_in_short() -> str:
    facts = ("first colour", "first shape", "second colour", "second shape", "side")
    found = study("probes-toy")["table"]
    rows = []
    for title, mllm, depth in (("entering layer 1", "facts", 1), ("at the end", "facts", -1),
                               ("untrained MLLM, entering layer 1", "random", 1)):
        shares = [found[fact][mllm]["together"][depth] for fact in facts]
        rows.append([title, *hundredths(*shares)])
    return table(["", *facts], rows)


THINGS = ("its first", "its second", "the other's first", "the other's second")
MORE = "more than two objects"


def slots() -> str:
    """Which things are drawn where a slot is not its own prompt's, at every depth."""
    rows = [[name.removesuffix(", every rung"), *cells(row, *THINGS, MORE)]
            for name, row in study("slots")["table"].items() if ", rung" not in name]
    return table(["", *THINGS, MORE], rows)


def slots_by_depth() -> str:
    """How often a slot's own thing is still drawn, the other prompt's, or one too many, if only one
    rung of that slot is changed."""
    found = study("slots")["table"]
    depths = [name.split(", ")[1] for name in found if name.startswith("mute slot 0")]
    asked = [(how, slot, thing) for slot, (own, other) in enumerate(zip(THINGS, THINGS[2:]))
             for how, thing in (("mute", own), ("splice", own), ("splice", other))]
    rows = []
    for how, slot, thing in [*asked, ("mute", 2, MORE), ("mute", 3, MORE)]:
        shares = [percent(found[f"{how} slot {slot}, {depth}"][thing]) for depth in depths]
        rows.append([f"{how} slot {slot}: {thing}", *shares])
    return table(["", *depths], rows)


def noise() -> str:
    whose = ("the noise's", "the prompt's", "of both together")
    rows = [[what, *cells(row, *whose), str(row["known"])]
            for what, row in study("noise")["table"].items()]
    return table(["", *whose, "pictures"], rows)


def score(row: dict) -> str:
    return percent(row["mean of 6"])


def guidance() -> str:
    found = {name: row for name, row in study("settings")["table"].items()
             if name.endswith(", 20 steps")}
    factors = [f"{float(name.split(',')[0].split()[1]):g}" for name in found]
    position = hundredths(*(row["position, seen"]["mean"] for row in found.values()))
    return table(["guidance", *factors], [
        ["mean of the six categories", *map(score, found.values())], ["position", *position]])


def solvers() -> str:
    found = study("settings")["table"]
    rows = []
    for name, solver in (("DPM-Solver++", "dpm++"), ("Euler", "euler")):
        rows.append([name, *(score(found[f"{n} steps, {solver}"]) for n in (3, 5, 10))])
    return table(["steps", "3", "5", "10"], rows)


def image_guidance() -> str:
    found = study("settings")["edits"]
    factors = [f"{float(name.split()[-1]):g}" for name in found]
    rows = []
    for what in ("unchanged", "followed"):
        numbers = [percent(row[what]) for row in found.values()]
        rows.append([EDITED[what].removeprefix("the "), *numbers])
    return table(["image guidance", *factors], rows)


def other_edits() -> str:
    found = study("settings")["other_edits"]
    rows = [[EDITED[what].removeprefix("the "), percent(found[what])]
            for what in ("unchanged", "followed")]
    return table(["the model's own image guidance, other prompts", ""], rows)


def told() -> str:
    """Of all kinds of edits together: what the MLLM's queries tell, and what is drawn."""
    columns = [f"{what}, {pairs}" for pairs in ("seen", "never seen")
               for what in ("followed", "unchanged")]
    found = study("told")
    rows = [["the queries' states tell it", *cells(mean(found["table"]), *columns)]]
    for i, row in found["by_state"].items():
        rows.append([f"state {i} by itself", *cells(mean(row), *columns)])
    rows.append(["the picture shows it", *cells(mean(scores("edit")), *columns)])
    return table(["", *columns], rows)


def overfit() -> str:
    found = study("overfit")
    return table(["loss", ""], [
        ["mean of steps 1 to 20", f"{found['start']:.3f}"],
        ["highest mean of 20 steps in a row", f"{found['highest']:.3f}"],
        ["mean of steps 181 to 200", f"{found['end']:.3f}"]])


def overfit_by_time() -> str:
    """Ten bins."""
    bins = [f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)]
    losses = [f"{loss:.3f}" for loss in study("overfit")["by_t"]]
    return table(["t", *bins], [["loss, steps 101 to 200", *losses]])


# ------------------------------------------------------------------------- the study that trains

def points(test: dict, digits: int = 0) -> str:
    """A difference and its interval, in points: "+3 [-2, +8]"."""
    mean, low, high = (signed(100 * x, digits) for x in (test["mean"], *test["interval"]))
    return f"{mean} [{low}, {high}]"


def signed(x: float, digits: int) -> str:
    """Nothing is +0, on whichever side of nothing it was before it was rounded."""
    return f"{round(x, digits) + 0.0:+.{digits}f}"


def chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def by_arm(title: str, found: dict) -> str:
    """found: {label: {category or mean: its score}}"""
    columns = list(next(iter(found.values())))
    rows = [[label, *cells(row, *columns)] for label, row in found.items()]
    return table([title, *columns], rows)


def tests(title: str, found: dict) -> str:
    """found: {what is compared: the test}"""
    rows = []
    for label, test in found.items():
        holm = chance(test["holm"]["p"]) if "holm" in test else ""
        rows.append([label, points(test), chance(test["p"]), holm, test["verdict"]])
    return table([title, "points", "p", "Holm", ""], rows)


def arrival(moved: dict) -> str:
    """Have the curves arrived? In words, by the mean of all arms. Only an interval that holds
    nothing larger says so."""
    if not moved:
        return "Scored at the end only: there is no test of arrival."
    whole = next(iter(moved.values()))
    low, high = (100 * x for x in whole["interval"])
    moves = low > plan.STILL or high < -plan.STILL
    said = "have not arrived" if moves else "may not have arrived"
    if low > -plan.STILL and high < plan.STILL:
        said = "have arrived"
    rows = [[label, points(row, 1)] for label, row in moved.items()]
    return (f"{table(['last quarter of the steps', 'points'], rows)}\n\n"
            f"By all arms together the curves {said}.")


def on_the_way_of(curve: dict) -> str:
    """curve: {label: {step: of each seed the share that is right}} -> their means."""
    steps = list(next(iter(curve.values())))
    rows = []
    for label, by_step in curve.items():
        rows.append([label, *hundredths(*(sum(row) / len(row) for row in by_step.values()))])
    return table(["on the way, fewer prompts", *(f"step {step}" for step in steps)], rows)


def part(content: dict) -> str:
    """All of a part: what its arms score, how they differ, whether they have arrived."""
    found = []
    for pairs, scored in content["scored"].items():
        found += [by_arm(pairs, scored["table"]), tests(pairs, scored["compared"])]
    if content["contrasts"]:
        found.append(tests("the same models, other prompts", content["contrasts"]))
    if all(len(by_step) > 1 for by_step in content["curve"].values()):
        found.append(on_the_way_of(content["curve"]))
    return "\n\n".join([*found, arrival(content["last_quarter"])])


def part_of(name: str) -> str:
    return part(study(name))


# {ending of the name: what differs} of a part that was trained again: for twice as many steps
# (docs/study.md, "When to stop"), at another learning rate ("Whom the set-up favours").
AGAIN = {"": {}, "-6000": dict(steps=2 * plan.STEPS), "-0.001": dict(lr=0.001, seeds=3)}


def trained() -> list[str]:
    """The parts of the study that are stored."""
    names = [name + ending for name in plan.PARTS for ending in AGAIN]
    return [name for name in names if (STUDIES / f"{name}.json").is_file()]


# ------------------------------------------------------------------------------------- the pages

PAGES = {
    "README.md": dict(scores=scores_in_short),
    "docs/scores.md": dict(drawing=drawing, editing=editing, edits=edits, answers=answers,
                           int8=in_8_bits, ceiling=ceiling),
    "docs/study.md": {"rungs": rungs, "probes": probes, "slots": slots,
                      "slots by depth": slots_by_depth, "noise": noise}
    | {name: functools.partial(part_of, name) for name in trained()},
    "toy/README.md": dict(examples=examples),
    "toy/weights/README.md": {"scores": scores_in_short, "by seed": by_seed},
    "docs/training.md": {"recipe": recipe, "on the way": on_the_way, "by seed": by_seed,
                         "board": board, "guidance": guidance, "solvers": solvers,
                         "image guidance": image_guidance,
                         "other edits": other_edits, "told": told, "parts": parts,
                         "overfit": overfit, "overfit by time": overfit_by_time,
                         "probes": probes_in_short},
}


def written(page: str) -> str:
    """A page as the files have it."""
    blocks = {name: block() for name, block in PAGES[page].items()}
    return filled((ROOT / page).read_text(), blocks, ROOT / page)


def main() -> None:
    Parser(prog="python -m lab.tables", description=__doc__).parse_args()
    with one_line_errors():
        for page in PAGES:
            write_text(ROOT / page, written(page))


if __name__ == "__main__":
    main()
