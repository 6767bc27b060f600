"""The study's plan, written down before its first run: which models are compared, how often each is
trained, how they are scored, and what counts as a difference. docs/study.md gives the reasons.

A run is an arm and a seed. Runs of one MLLM and one set of held-out pairs learn from the same
examples, so they can be trained together (lab/trials.py). Parts share their runs: `ladder` with
seed 0 is trained once, whichever parts ask for it.
"""
from dataclasses import dataclass

from ladder import CONNECTORS, WIRINGS
from toy.world import COLOURS, HELD_OUT, SHAPES

# Below this difference, in points of 100, nobody would change a model.
SMALLEST = 3.0
# A curve that moves less than this in its last quarter has arrived.
STILL = 2.0
# Below this share of pictures, for both arms, a difference says nothing of them.
FLOOR = 0.2
# Of the primary question and the one beside it; and of the others, which are many.
STEPS, OTHER_STEPS = 3000, 1000
# Chosen by pilot runs (docs/study.md).
BATCH, LR = 8, 4e-4
# Prompts per category: at the end, and along the way.
PROMPTS = 96
PROMPTS_EARLY = 24
# Scores along the way and at the end. That at three quarters of the steps is by all prompts, too.
# The others are scored at the end.
LOOKS, OTHER_LOOKS = 4, 1
DRAW_STEPS = 10
# The toy's own, whatever the folder says that the DiT comes from.
GUIDANCE = 6.5

# From easy to hard, as in MOSAIC (arXiv 2605.00273).
DIFFICULTY = ("colour attribution", "counting", "position")

# What reads the queries, and what it was taught.
MLLMS = {
    "gist": "captions and answers, and to write from tokens behind a prompt what that asked for: "
            "nothing says at which depth they hold it",
    "facts": "as shipped: captions and answers, and to hold every fact at every depth from the "
             "third on, in the code that the DiT has learnt to draw from",
    "captions": "captions and answers only",
    "random": "nothing: random weights, the floor",
}


def pairs_held_out(n: int) -> frozenset[tuple[str, str]]:
    """n of the 24 pairs of colour and shape that training draws only alone: first the two that
    nothing in this repository ever draws beside another object, then others, every colour and
    every shape about equally often. A larger set holds the smaller ones."""
    diagonals = []
    for step in (0, 2, 1, 3):
        for i, colour in enumerate(COLOURS):
            diagonals.append((colour, SHAPES[(i + step) % len(SHAPES)]))
    others = [pair for pair in diagonals if pair not in HELD_OUT]
    return frozenset([*sorted(HELD_OUT), *others][:n])


@dataclass(frozen=True)
class Arm:
    """One kind of model. held_out: how many pairs of colour and shape; shift: of the times in
    training, as `sample.shifted` has it. (The toy's own is 3, as in drawing.)"""
    wiring: str = "ladder"
    connector: str = "shared"
    n_query: int = 16
    mllm: str = "gist"
    held_out: int = 2
    shift: float = 3.0


@dataclass(frozen=True)
class Run:
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        a = self.arm
        return f"{a.mllm}_{a.held_out}_{a.wiring}_{a.connector}_{a.n_query}_{a.shift:g}_{self.seed}"

    @property
    def examples(self) -> tuple:
        """Equal for runs that can learn together."""
        return self.arm.mllm, self.arm.held_out


@dataclass(frozen=True)
class Part:
    """arms: {label: Arm}; compared: (label, label it is compared with); scored: which prompts,
    seen (of pairs that no arm holds out) or never seen (with a pair that all arms hold out).

    Further comparisons, of the same trained models by other prompts. gaps: seen minus never seen,
    of one label, or of one minus another; again: what is compared, once more by prompts of several
    objects only, and by those that no pilot run was judged by; order: categories, each of which is
    asked to be easier than the next, by all arms.

    long: trained for STEPS, the others for OTHER_STEPS."""
    question: str
    arms: dict[str, Arm]
    compared: tuple[tuple[str, str], ...]
    seeds: int = 5
    scored: tuple[str, ...] = ("seen",)
    gaps: tuple[tuple[str, ...], ...] = ()
    again: bool = False
    order: tuple[str, ...] = ()
    long: bool = False

    def runs(self, seeds: int | None = None) -> list[Run]:
        return [Run(arm, seed) for seed in range(seeds or self.seeds)
                for arm in self.arms.values()]


def both(**settings) -> dict[str, Arm]:
    """ladder and final, else alike."""
    return {wiring: Arm(wiring, **settings) for wiring in ("ladder", "final")}


def table(label: str, setting: str, values) -> tuple[dict[str, Arm], tuple]:
    """ladder and final for each value of one setting -> arms, and ladder against final at each."""
    arms = {}
    compared = []
    for value in values:
        pair = {f"{wiring}, {label.format(value)}": arm
                for wiring, arm in both(**{setting: value}).items()}
        arms |= pair
        compared.append(tuple(pair))
    return arms, tuple(compared)


QUERIES = (4, 8, 16, 32)
QUERY_ARMS, QUERY_PAIRS = table("{} queries", "n_query", QUERIES)
PAIR_ARMS, PAIR_PAIRS = table("{} pairs held out", "held_out", (2, 6, 12))
MLLM_ARMS, MLLM_PAIRS = table("MLLM {}", "mllm", MLLMS)
CONNECTOR_ARMS, CONNECTOR_PAIRS = table("connector {}", "connector", CONNECTORS)

PARTS = {
    "primary": Part("does the ladder help?", both(), (("ladder", "final"),), seeds=8, again=True,
                    order=DIFFICULTY, long=True),
    # `final` is one depth, normed, and no lesson asked for it; `penultimate` is one depth, too.
    "penultimate": Part("is it the number of depths?",
                        {wiring: Arm(wiring) for wiring in ("ladder", "final", "penultimate")},
                        (("ladder", "penultimate"), ("penultimate", "final")), seeds=8, long=True),
    "wirings": Part("which states, in which order?", {wiring: Arm(wiring) for wiring in WIRINGS},
                    tuple((wiring, "final") for wiring in WIRINGS if wiring != "final")),
    "connectors": Part("is it the connector?", CONNECTOR_ARMS, CONNECTOR_PAIRS + (
        ("ladder, connector per-block", "ladder, connector shared"),
        ("final, connector per-block", "final, connector shared"))),
    "queries": Part("with few queries, with many?", QUERY_ARMS, QUERY_PAIRS),
    "pairs": Part("with pairs never seen together?", PAIR_ARMS, PAIR_PAIRS,
                  scored=("seen", "never seen"),
                  gaps=tuple((label,) for label in PAIR_ARMS) + PAIR_PAIRS),
    "mllms": Part("with another MLLM?", MLLM_ARMS, MLLM_PAIRS + (
        ("ladder, MLLM gist", "ladder, MLLM captions"),
        ("ladder, MLLM captions", "ladder, MLLM random"))),
    "shift": Part("with times nearer to the noise?", {
        "shift 1": Arm(shift=1.0), "shift 3": Arm(shift=3.0)}, (("shift 3", "shift 1"),)),
}


def is_long(study: str) -> bool:
    """Is it a part whose runs are trained for STEPS?"""
    return study in PARTS and PARTS[study].long


def scored_by_never_seen(arm: Arm) -> bool:
    """Does a part ask for pairs that it has never seen?"""
    return any("never seen" in part.scored and arm in part.arms.values() for part in PARTS.values())


def n_compared() -> int:
    """All comparisons beside the primary one, whichever of them have been made so far."""
    n = -1
    for part in PARTS.values():
        n += len(part.compared) * (len(part.scored) + 2 * part.again)
        n += len(part.gaps) + len(part.order[1:])
    return n
