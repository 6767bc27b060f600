"""Writes the tables of bench/README.md from what was counted and measured.

    python -m bench.tables                       bench/counts.json and bench/results into the page
    python -m bench.tables --add OUT --name a    what bench/gpu.sh wrote: first into results/a.json

The text between two marks, <!-- NAME --> and <!-- end of NAME -->, is replaced.
"""
import json
import pathlib

from engine.command import Parser
from engine.files import read_json
from lab.tables import filled, table

HERE = pathlib.Path(__file__).parent
PAGE = HERE / "README.md"
RESULTS = HERE / "results"
COUNTS = HERE / "counts.json"
PARITY = RESULTS / "parity_wide.json"
WHOLE = RESULTS / "whole.json"


def ratio(a, b):
    return f"{a / b:.2f}"


# --------------------------------------------------------------------------------------- counted

def counted_rows(counts):
    """Operations and memory of both sides at both sizes."""
    head = ["work", "mid: peer", "ours", "share", "full: peer", "ours", "share",
            "full, GB: peer", "ours", "share"]
    rows = []
    for name, mid in counts["mid"].items():
        cells = [name, *numbers(mid, "operations", 1e9)]
        full = counts["full"].get(name)
        cells += numbers(full, "operations", 1e9) if full else ["", "", ""]
        cells += numbers(full, "memory", 1e9, 1) if full else ["", "", ""]
        rows.append(cells)
    return table(head, rows)


def numbers(row, what, unit, digits=0):
    peer, ours = row["peer"][what], row["ours"][what]
    return [f"{peer / unit:.{digits}f}", f"{ours / unit:.{digits}f}", ratio(ours, peer)]


def parts(counts):
    """Which part of a model has how many operations, at full size."""
    names = ("ViT", "language model", "connector", "captions", "DiT", "autoencoder",
             "backward pass")
    works = ("20-step picture, encode to latents", "20-step edit", "training step t2i",
             "training step edit")
    rows = []
    for work in works:
        for side in ("peer", "ours"):
            found = counts["full"][work][side]["parts"]
            cells = [f"{found.get(name, 0) / 1e9:.0f}" for name in names]
            rows.append([f"{work}, {side}", *cells])
    return table(["1e9 operations", *names], rows)


# -------------------------------------------------------------------------------------- measured

def machines():
    """{file name: what was measured} of every machine"""
    files = sorted(file for file in RESULTS.glob("*.json") if file not in (PARITY, WHOLE))
    return {file.stem: read_json(file) for file in files}


def versions(run):
    known = {package: number for package, number in run["versions"].items() if number}
    return ", ".join(f"{package} {number}" for package, number in known.items())


def cpu_section(found, counts):
    """Ratios of time, split into the ratio of operations and that of their rates."""
    run = found["run"]
    if run["size"] not in counts:
        raise ValueError(f"size {run['size']}: {COUNTS} has no operations of it")
    rates = f"{run['flops'] / 1e9:.0f} GFLOP/s, {run['bandwidth'] / 1e9:.1f} GB/s"
    text = f"{run['device']}, {run['threads']} threads, {run['dtype']}, medians of " \
           f"{run['pairs']} pairs; {versions(run)}; best rates seen in the run: {rates}."
    head = ["work", "peer s", "ours s", "times as fast", "lowest - highest",
            "of which fewer operations", "of which a higher rate", "results apart",
            "ours / floor"]
    rows = []
    for name, row in found["rows"].items():
        if "floor" in row:
            count = counts[run["size"]][name]
            fewer = count["peer"]["operations"] / count["ours"]["operations"]
            rows.append([
                name, f"{row['peer']:.3f}", f"{row['ours']:.3f}", f"{row['ratio']:.2f}",
                f"{row['low']:.2f} - {row['high']:.2f}", f"{fewer:.2f}",
                f"{row['ratio'] / fewer:.2f}", f"{row['apart']:.0e}",
                ratio(row["ours"], row["floor"])])
    return f"{text}\n\n{table(head, rows)}\n\n{memory_table(found['rows'])}"


def memory_table(rows):
    measured = [[name, f"{row['peer'] / 1e9:.2f}", f"{row['ours'] / 1e9:.2f}",
                 f"{row['ratio']:.2f}"] for name, row in rows.items() if "floor" not in row]
    return table(["GB", "peer", "ours", "share"], measured)


def gpu_section(found):
    """What bench/gpu.sh measured: ours by itself, then beside the peer."""
    run = found["steps"]["machine"]["run"]
    text = f"{run['device']}, CUDA {run['cuda']}, bfloat16, full size; {versions(run)}."
    blocks = [text]
    for step in ("draw", "train", "compile"):
        if step in found["steps"]:
            blocks.append(own_table(found["steps"][step]["rows"]))
    if "peer" in found["steps"]:
        blocks.append(peer_table(found["steps"]["peer"]["rows"]))
    return "\n\n".join(blocks)


def own_table(rows):
    head = ["work", "s", "lowest - highest", "peak GB", "1e9 operations", "s / floor",
            "warm-up s"]
    cells = []
    for name, row in rows.items():
        if "failed" in row:
            cells.append([name, row["failed"], "", "", "", "", ""])
        else:
            cells.append([name, *own_cells(row)])
    return table(head, cells)


def own_cells(row):
    def number(key, form, unit=1):
        return form.format(row[key] / unit) if key in row else ""

    spread = f"{row['low']:.3f} - {row['high']:.3f}" if "low" in row else ""
    share = ratio(row["seconds"], row["floor"]) if "floor" in row else ""
    return [number("seconds", "{:.3f}"), spread, number("memory", "{:.1f}", 1e9),
            number("operations", "{:.0f}", 1e9), share, number("warm_up", "{:.1f}")]


def peer_table(rows):
    head = ["work", "peer s", "ours s", "times as fast", "lowest - highest",
            "of which fewer operations", "of which a higher rate", "memory, share",
            "results apart"]
    cells = []
    for name, row in rows.items():
        if "failed" in row:
            cells.append([name, row["failed"], *[""] * 7])
            continue
        fewer = row["operations"]["peer"] / row["operations"]["ours"]
        cells.append([
            name, f"{row['first']:.3f}", f"{row['second']:.3f}", f"{row['ratio']:.2f}",
            f"{row['low']:.2f} - {row['high']:.2f}", f"{fewer:.2f}",
            f"{row['ratio'] / fewer:.2f}", ratio(row["memory"]["ours"], row["memory"]["peer"]),
            f"{row['apart']:.0e}"])
    return table(head, cells)


def measured(counts):
    """A section for each machine."""
    sections = []
    for name, found in machines().items():
        body = gpu_section(found) if "steps" in found else cpu_section(found, counts)
        sections.append(f"### {name}\n\n{body}")
    return "\n\n".join(sections)


# ---------------------------------------------------------------------------------------- parity

WIDE = """\
1.3e9 random parameters, float32, {device}: texts of different lengths, odd pictures in one batch
whose last windows are not whole, an edit. Relative errors, the largest of all cases; of the
gradients by themselves, the largest of all tensors, without the biases of the cross-attention's
keys (a softmax does not see what is added to all keys alike, so these gradients are 0 but for
rounding).

{parity}

Ours in bfloat16, and with weights in 8 bits (`--int8`, computed with in float32), against ours in
float32, a picture and an edit of two steps each:

{rounded}"""


def parity():
    """What bench.parity_wide found; nothing where it was not run."""
    if not PARITY.exists():
        return ""
    found = read_json(PARITY)
    rows = [[row, f"{error:.1e}", where, f"{found['fast'][row][0]:.1e}"]
            for row, (error, where) in found["plain"].items()]
    head = ["tensor", "plain path", "where it is largest", "fast path"]
    return WIDE.format(device=found["run"]["device"], parity=table(head, rows),
                       rounded=rounded(found["bfloat16"], found["int8"]))


# Their outputs, by the names that a reader knows.
PARTS = {"ladder": "rungs", "dit": "velocity"}


def rounded(bfloat16, int8):
    """The states of a picture and of an edit, at the ends of each part."""
    rows, drawn = [], ""
    for call, error in bfloat16.items():
        name = call.split(" ", 1)[1]
        if name in PARTS:
            name = f"{drawn}: {PARTS[name]}"
        if ": " in name or name in ("latents of a picture", "pixels"):
            drawn = name.split(": ")[0]
            rows.append([name, f"{error:.1e}", f"{int8[call]:.1e}"])
    return table(["state", "bfloat16", "8 bits"], rows)


# ----------------------------------------------------------------------------- the whole model

WHOLE_ROWS = ("load, warm disk", "picture, 2 steps", "picture, 20 steps", "answer about it")


def whole():
    """What bench.load measured of a model of the released sizes."""
    if not WHOLE.exists():
        return "Not measured yet."
    head = ["setting", "a step, s", *(f"{name}, s" for name in WHOLE_ROWS), "peak GB"]
    rows, runs = [], []
    for name, found in read_json(WHOLE).items():
        run = found["run"]
        said = f"{run['device']}, {run['cores']} cores; {versions(run)}."
        if said not in runs:
            runs.append(said)
        load, first, last, answer = (found["rows"][row] for row in WHOLE_ROWS)
        step = (last["seconds"] - first["seconds"]) / 18
        peak = max(row["peak"] for row in found["rows"].values())
        seconds = (load["seconds"], first["seconds"], last["seconds"], answer["seconds"])
        rows.append([name, f"{step:.1f}", *(f"{s:.0f}" for s in seconds), f"{peak:.1f}"])
    return "\n".join([*runs, "", table(head, rows)])


# ---------------------------------------------------------------------------------- command line

def written(page):
    """The page with its tables as the files have them."""
    counts = read_json(COUNTS)
    blocks = {"counts": counted_rows(counts), "parts": parts(counts),
              "machines": measured(counts), "whole": whole(), "parity": parity()}
    return filled(page, blocks, PAGE)


def add(folder, name):
    """The JSON files of bench/gpu.sh -> one file. ValueError for those of a rehearsal."""
    steps = {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}
    if "machine" not in steps:
        raise ValueError(f"{folder} has no machine.json: not written by bench/gpu.sh")
    if steps["machine"]["run"]["rehearsal"]:
        raise ValueError(f"{folder} is of a rehearsal: its times say nothing")
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(dict(steps=steps), indent=1) + "\n")


def main():
    p = Parser(description=__doc__)
    p.add_argument("--add", type=pathlib.Path, metavar="OUT", help="a folder of bench/gpu.sh")
    p.add_argument("--name", default="gpu", help="of the machine, with --add")
    args = p.parse_args()
    try:
        if args.add:
            add(args.add, args.name)
        PAGE.write_text(written(PAGE.read_text()))
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
