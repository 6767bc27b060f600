"""The study: what its tables compare, what looks into a trained model, and a whole small study,
stopped and gone on with."""
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from lab import ablate, dots, evaluate, inside, plan, statistics, tables, trials
from sample import TOY_FOLDER
from tbac import TBAC
from tests.conftest import relative, run
from toy import language, world

# ------------------------------------------------------------------------------- what is compared

CIRCLE = world.Scene((world.Thing("circle", "red", "medium", 0.5, 0.5),))
SIX = [types.SimpleNamespace(category=category, pairs="seen", target=CIRCLE)
       for category in evaluate.GENEVAL for _ in range(4)]
PART = plan.Part("?", plan.both(), (("ladder", "final"),), seeds=3)
ORDERED = dataclasses.replace(PART, again=True, order=plan.DIFFICULTY)


@pytest.fixture
def study(monkeypatch):
    """A part whose runs are done: `ladder` is right where `final` is, and in all of counting."""
    monkeypatch.setitem(plan.PARTS, "primary", ORDERED)
    monkeypatch.setitem(plan.PARTS, "wirings", PART)
    monkeypatch.setattr(trials, "cases", lambda args: SIX)
    counting = np.array([case.category == "counting" for case in SIX])

    def result(args, one):
        right = np.random.default_rng(one.seed).random(24) < 0.5
        if one.arm.wiring == "ladder":
            right = right | counting
        rng = np.random.default_rng(10 + one.seed)
        early, before = rng.random(6) < 0.5, rng.random(24) < 0.4
        return dict(scores={step: "".join(map(str, row.astype(int)))
                            for step, row in (("2", early), ("3", before), ("4", right))})

    monkeypatch.setattr(trials, "result", result)
    return types.SimpleNamespace(steps=4, seeds=None, n=4, n_early=1, looks=4)


def test_the_tables_are_of_the_last_step_and_paired(study):
    found = {name: ablate.analyse(study, name) for name in ("primary", "wirings")}
    ablate.correct(found)
    scored = found["primary"]["scored"]["seen"]
    ladder, final = (scored["table"][label] for label in ("ladder", "final"))
    assert ladder["counting"]["mean"] == 1 and final["counting"]["mean"] < 1
    assert len(ladder) == 7 and len(ladder["mean of 6"]["points"]) == 3
    test = scored["compared"]["ladder minus final"]
    gap = ladder["mean of 6"]["mean"] - final["mean of 6"]["mean"]
    assert test["mean"] == pytest.approx(gap) == (1 - final["counting"]["mean"]) / 6
    assert all(ladder[name] == final[name] for name in ladder if name not in ("counting",
                                                                              "mean of 6"))
    # Other prompts of both arms together.
    several = found["primary"]["contrasts"]["ladder minus final, several objects"]
    assert several["mean"] == pytest.approx((1 - final["counting"]["mean"]) / 4)
    harder = found["primary"]["contrasts"]["counting minus position"]
    counting, position = (np.mean([row[name]["mean"] for row in (ladder, final)])
                          for name in ("counting", "position"))
    assert harder["mean"] == pytest.approx(counting - position)
    assert harder["holm"]["of"] == plan.n_compared()
    # The rest is corrected for all that the plan asks, whatever is done. The primary: not at all.
    other = found["wirings"]["scored"]["seen"]["compared"]["ladder minus final"]
    of = 1 + 2 + 4 + 4 + 6 + 9 + 6 + 1 + 2 + 2
    assert "holm" not in test and other["holm"] == dict(p=min(1, of * other["p"]), of=of)
    shown = tables.part(found["primary"])
    by_step = [100 * np.mean(row) for row in found["primary"]["curve"]["ladder"].values()]
    assert f"| ladder | {' | '.join(f'{share:.0f}' for share in by_step)} |" in shown
    assert f"| ladder minus final | {tables.points(test)} | {tables.chance(test['p'])} |" in shown


@pytest.mark.parametrize("ours, theirs, words", [
    ("ladder", "final", "ladder minus final"),
    ("ladder, 4 queries", "final, 4 queries", "ladder minus final, 4 queries"),
    ("ladder, MLLM captions", "ladder, MLLM random", "ladder, MLLM captions minus MLLM random"),
])
def test_a_difference_says_once_what_both_have(ours, theirs, words):
    assert ablate.difference(ours, theirs) == words


def test_no_two_comparisons_of_a_part_have_one_name():
    for part in plan.PARTS.values():
        assert len({ablate.difference(*pair) for pair in part.compared}) == len(part.compared)


def test_the_outcome_is_the_mean_of_six_categories():
    """Other words are scored by lab.evaluate, and are no part of a mean here."""
    of_study = trials.cases(types.SimpleNamespace(n=1, study="others"))
    assert {case.category for case in of_study} == set(evaluate.GENEVAL)
    assert set(of_study) < set(evaluate.cases("draw", 1))
    scores = {f"{category}, seen": [1.0, 1.0] for category in evaluate.GENEVAL}
    assert inside.overall(scores | {f"{evaluate.OTHER}, seen": [0.0, 0.0]})["mean"] == 1


def test_the_mean_of_edits_is_of_all_kinds_and_seen_pairs():
    kinds = [*language.EDITS, evaluate.OTHER]
    scores = {("edit", kind, "followed", pairs): [float(pairs == "seen" and kind in language.EDITS)]
              for kind in kinds for pairs in ("seen", "never seen")}
    found = inside.mean_of_edits(scores)
    assert found.keys() == {"followed"} and found["followed"]["mean"] == 1


def test_seen_is_held_against_never_seen(monkeypatch):
    """In the categories that have both; paired by seed, prompt by prompt where two arms are."""
    rng = np.random.default_rng(0)
    part = plan.PARTS["pairs"]
    groups = dict(seen=np.repeat(evaluate.GENEVAL, 8))
    groups["never seen"] = np.array([g for g in groups["seen"] if g not in evaluate.ALONE])
    scored = {pairs: ({label: (rng.random((5, len(names))) < 0.5).astype(float)
                       for label in part.arms}, names) for pairs, names in groups.items()}
    found = ablate.gaps(part, scored)
    assert len(found) == 9

    def mean(label, pairs):
        scores, names = scored[pairs]
        return np.mean([scores[label][:, names == name].mean() for name in evaluate.GENEVAL
                        if name not in evaluate.ALONE])

    of_arm = {label: mean(label, "seen") - mean(label, "never seen") for label in part.arms}
    for label, gap in of_arm.items():
        assert found[f"{label}: seen minus never seen"].mean == pytest.approx(gap)
    two = of_arm["ladder, 6 pairs held out"] - of_arm["final, 6 pairs held out"]
    words = "ladder minus final, 6 pairs held out: seen minus never seen"
    assert found[words].mean == pytest.approx(two)
    # Where both arms draw alike there is no gap between them, however the prompts differ.
    for scores, _ in scored.values():
        scores["final, 6 pairs held out"] = scores["ladder, 6 pairs held out"]
    assert ablate.gaps(part, scored)[words] == statistics.Estimate(0.0, 0.0, 0.0, 1.0, 0.0)


def test_the_last_quarter_is_that_of_all_prompts(study):
    """Those of the look at three quarters and of the one at the end; the looks before have few."""
    looks = trials.looks(study, PART.runs(study.seeds))
    assert [len(looks[step]) for step in (1, 2, 3, 4)] == [6, 6, 24, 24]
    assert trials.three_quarters(study) == 3
    moved = ablate.last_quarter(study, PART)
    (before, _), (after, _) = (ablate.scores_of(study, PART, "seen", step) for step in (3, 4))
    wanted = {label: (after[label] - before[label]).mean() for label in before}
    ladder, final = wanted.values()
    wanted |= {"all arms": (ladder + final) / 2, "ladder minus final": ladder - final}
    assert list(moved) == ["all arms", "ladder", "final", "ladder minus final"]
    for label, found in moved.items():
        assert found.mean == pytest.approx(wanted[label]) and found.low < found.mean < found.high
    study.looks = 1
    assert ablate.last_quarter(study, PART) == {}


def test_new_prompts_are_those_that_no_pilot_was_judged_by(study, monkeypatch):
    """The first prompt of each category has told the pilots something, the other three have not."""
    cases = [types.SimpleNamespace(**vars(case), prompt=i) for i, case in enumerate(SIX)]
    monkeypatch.setattr(trials, "cases", lambda args: cases)
    scores, groups = ablate.scores_of(study, PART, "seen")
    found = ablate.again(study, PART, scores, groups)["ladder minus final, new prompts"]
    new = [i for i in range(24) if i % 4]
    wanted = (scores["ladder"] - scores["final"])[:, new].mean()
    assert found.mean == pytest.approx(wanted)


def test_what_neither_arm_can_draw_says_nothing_of_them(study, monkeypatch):
    """However alike they are."""
    monkeypatch.setattr(plan, "FLOOR", 0.0)
    found = {name: ablate.analyse(study, name) for name in ("primary", "wirings")}
    ablate.correct(found)
    monkeypatch.setattr(plan, "FLOOR", 1.1)
    low = {name: ablate.analyse(study, name) for name in ("primary", "wirings")}
    ablate.correct(low)
    tests = [content["wirings"]["scored"]["seen"]["compared"]["ladder minus final"]
             for content in (found, low)]
    assert tests[0]["p"] == tests[1]["p"] and tests[1]["verdict"] == "both at the floor"
    assert tests[0]["verdict"] in ("more", "open")


@pytest.mark.parametrize("right, low", [(0.19, True), (0.21, False)])
def test_a_gap_between_two_floors_says_nothing_either(right, low):
    """By the categories that both lists have."""
    part = plan.PARTS["pairs"]
    alone = {"single object": dict(mean=0.9), "mean of 2": dict(mean=0.5)}
    cell = {"two objects": dict(mean=right)}
    scored = {"seen": dict(table={label: cell | alone for label in part.arms}),
              "never seen": dict(table={label: cell | {"mean of 1": dict(mean=right)}
                                        for label in part.arms})}
    found = ablate.at_the_floor(part, dict(scored=scored))
    gaps = {("contrasts", ablate.gap_of(labels)) for labels in part.gaps}
    assert (found & gaps == gaps) is low and bool(found & gaps) is low


@pytest.mark.parametrize("steps, looks, found", [
    (3000, 4, [750, 1500, 2250, 3000]), (7, 2, [4, 7]), (2, 4, [1, 2]), (1, 4, [1]),
])
def test_models_are_scored_after_steps_that_there_are(steps, looks, found):
    assert trials.scored_at(types.SimpleNamespace(steps=steps, looks=looks)) == found


def test_pairs_never_seen_are_drawn_where_a_part_asks_for_them():
    """They come last, so that those who are not asked for them have the same places."""
    args = types.SimpleNamespace(n=2, n_early=1, steps=4, looks=1, study="others")
    every, = trials.looks(args, [plan.Run(plan.Arm(), 0), plan.Run(plan.Arm("mean"), 0)]).values()
    seen, = trials.looks(args, [plan.Run(plan.Arm("mean"), 0)]).values()
    assert {case.pairs for case in every} == {"seen", "never seen"} and every == trials.cases(args)
    assert {case.pairs for case in seen} == {"seen"} and every[:len(seen)] == seen
    # The primary question has runs of its own, and asks for none.
    args.study = "primary"
    assert trials.cases(args) == seen


@pytest.mark.parametrize("moved, words", [
    ((1.0, 0.1, 1.9), "curves have arrived"), ((-1.0, -1.9, -0.1), "curves have arrived"),
    ((1.0, -0.5, 2.5), "may not have arrived"), ((3, 2.1, 3.9), "curves have not"),
    ((-3, -3.9, -2.1), "curves have not"),
])
def test_whether_curves_have_arrived(moved, words):
    """As far as the interval of all arms says so."""
    row = dict(mean=moved[0] / 100, interval=[x / 100 for x in moved[1:]])
    other = dict(mean=0.5, interval=[0.4, 0.6])
    said = tables.arrival({"all arms": row, "ladder": other})
    assert words in said and "| ladder | +50.0 [+40.0, +60.0] |" in said
    assert "no test of arrival" in tables.arrival({})


def test_a_difference_of_nothing_has_no_sign_of_its_own():
    assert tables.points(dict(mean=-0.001, interval=[-0.021, 0.004])) == "+0 [-2, +0]"
    assert tables.points(dict(mean=-0.0003, interval=[-0.021, 0.004]), 1) == "+0.0 [-2.1, +0.4]"


def test_a_prompt_counts_by_the_pairs_that_its_arms_hold_out():
    """Of a seen pair that some arms hold out nobody can say whether it was seen."""
    def case(pairs, *names):
        things = tuple(world.Thing(shape, colour, "medium", 0.5, 0.5) for colour, shape in names)
        return types.SimpleNamespace(pairs=pairs, target=world.Scene(things))

    some = sorted(plan.pairs_held_out(6) - plan.pairs_held_out(2))[0]
    free = min({(c, s) for c in world.COLOURS for s in world.SHAPES} - plan.pairs_held_out(12))
    never = min(plan.pairs_held_out(2))
    cases = [case("seen", free, free), case("seen", free, some), case("seen", some),
             case("never seen", never, free), case("never seen", never, some)]
    assert ablate.chosen(cases, "seen", 2) == [0, 1, 2]
    assert ablate.chosen(cases, "seen", 6) == [0, 2]
    assert ablate.chosen(cases, "never seen", 6) == [3]


def test_figures_show_every_row(tmp_path, monkeypatch):
    """Each name at its row, each interval a line, each seed a dot."""
    drawn = []
    monkeypatch.setattr(dots, "save", lambda figure, file: drawn.append(figure))
    rows = {name: dict(mean=0.5, interval=[0.4, 0.6], points=[0.45, 0.55]) for name in "abc"}
    difference = {"a minus b": dict(mean=0.01, interval=[-0.02, 0.04])}
    wide = {"easy minus hard": dict(mean=0.4, interval=[0.3, 0.5])}
    dots.plot_arms(rows, [difference, wide], 3.0, tmp_path)
    left, right, other = drawn[0].axes
    assert other.get_xlim()[1] > 50
    assert [label.get_text() for label in left.get_yticklabels()] == list("abc")
    assert [len(line.get_xdata()) for line in left.lines] == [2, 2, 1] * 3
    assert list(right.lines[1].get_xdata()) == [-2, 4]
    low, high = right.get_xlim()
    assert -10 < low < -4 < 4 < high < 10
    for ax in (left, right):
        drawn[0].canvas.draw()
        assert all(tick == round(tick) for tick in ax.get_xticks())
        end = ax.xaxis.label.get_window_extent().x1
        assert end < drawn[0].bbox.x1, "the label is cut"
    dots.plot_series({"x": dict(a=rows["a"]), "y": rows}, tmp_path, "%")
    ax, = drawn[1].axes
    assert len(ax.lines) == 3 + 3 * 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list("abc")


def test_the_heat_maps_of_rungs_show_every_category(tmp_path, monkeypatch):
    """By the names of the tables, seen and never seen apart, the mean of six above."""
    drawn = []
    monkeypatch.setattr(dots, "save", lambda figure, file: drawn.append(figure))
    never = [name for name in evaluate.GENEVAL if name not in evaluate.ALONE]
    names = [*(f"{name}, seen" for name in evaluate.GENEVAL),
             *(f"{name}, never seen" for name in never)]
    of_rungs = [{name: float(10 * j + i) for i, name in enumerate(names)} for j in range(3)]
    inside.plot_rungs({how: of_rungs for how in inside.REPLACED_BY}, tmp_path)
    seen, *_, below = [ax for ax in drawn[0].axes if ax.images][::3]
    assert [label.get_text() for label in seen.get_yticklabels()] == \
        ["mean of six", *evaluate.GENEVAL]
    shown = seen.images[0].get_array()
    assert shown[0].tolist() == [2.5, 12.5, 22.5] and shown[3].tolist() == [2, 12, 22]
    assert [label.get_text() for label in below.get_yticklabels()] == never
    assert below.get_ylabel() == "pairs never seen"
    assert below.images[0].get_array()[1].tolist() == [7, 17, 27]
    assert len(seen.texts) == 7 * 3 and seen.texts[4].get_text() == "+10"


# --------------------------------------------------------------------------- into a trained model

@pytest.mark.parametrize("how", ["null prompt", "another rung", "another prompt"])
def test_one_rung_of_the_prompts_is_replaced(tiny, how):
    prompts = ["", "", "a dog", "a cat"]
    with torch.no_grad():
        before = tiny.encode(prompts)
        with inside.replaced(tiny, 1, how):
            after = tiny.encode(prompts)
        assert torch.equal(tiny.encode(prompts), before)
    assert torch.equal(after[[0]], before[[0]])
    assert torch.equal(after[:, :2], before[:, :2])
    distant = (1 + len(before) // 2) % len(before)
    wanted = {
        "null prompt": before[1, :2],
        "another rung": before[distant, 2:],
        "another prompt": before[1, [3, 2]],
    }[how]
    assert torch.equal(after[1, 2:], wanted)
    assert relative(after[1, 2:], before[1, 2:]) > 1e-3


@pytest.mark.parametrize("prompts", [["a dog"] * 2, ["a dog"], ["a dog", "a cat", "a dog"]])
def test_another_prompt_is_another_one(tiny, prompts):
    null = [""] * len(prompts)
    with torch.no_grad(), inside.replaced(tiny, 1, "another prompt"), \
            pytest.raises(ValueError, match="the same prompt"):
        tiny.encode([*null, *prompts])


def test_probes_find_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (400,), generator=g)
    noise = torch.randn(400, 50, generator=g)
    signal = torch.nn.functional.one_hot(y, 50)
    assert inside.ridge(noise, y, 300) < 0.55
    assert inside.ridge(noise + 4 * signal, y, 300) > 0.95


@pytest.mark.parametrize("n_feature", [20, 500])
def test_both_forms_of_a_probe_are_least_squares(n_feature):
    """As written down: squared errors and the penalty's squares, as one system of equations."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (400,), generator=g)
    x = torch.randn(400, n_feature, generator=g) + torch.nn.functional.one_hot(y, n_feature)
    scaled = (x - x[:300].mean(0)) / (x[:300].std(0) + 1e-6)
    scaled = torch.cat([scaled, torch.ones(400, 1)], 1).double()
    penalty = 0.01 * scaled[:300].square().sum(1).mean()
    equations = torch.cat([scaled[:300], penalty.sqrt() * torch.eye(n_feature + 1)])
    answers = torch.cat([torch.eye(3)[y[:300]], torch.zeros(n_feature + 1, 3)]).double()
    guesses = (scaled[300:] @ torch.linalg.lstsq(equations, answers).solution).argmax(1)
    found = inside.ridge(x, y, 300)
    assert found == pytest.approx((guesses == y[300:]).float().mean().item())
    assert 0.4 < found < 0.95


def test_a_probe_finds_in_which_query_and_depth_a_fact_is(monkeypatch):
    """Colour in query 1 at depth 2, and nothing else; where a prompt does not say, it is left
    out."""
    monkeypatch.setattr(inside, "FITTED", 300)
    g = torch.Generator().manual_seed(0)
    colours = [None if i % 7 == 0 else "rgb"[i % 3] for i in range(420)]
    states = torch.randn(3, 420, 2, 8, generator=g)
    for i, colour in enumerate(colours):
        if colour:
            states[2, i, 1, "rgb".index(colour)] += 9
    found = inside.probed(states, colours)
    assert found["alone"][2][1] == found["together"][2] == 1
    others = [found["alone"][depth][query] for depth in range(3) for query in range(2)
              if (depth, query) != (2, 1)]
    assert max(*others, *found["together"][:2]) < 0.6 and 0.2 < found["chance"] < 0.5


def test_probes_are_of_all_mllms_by_the_same_fresh_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "FITTED", 60)
    monkeypatch.setattr(inside, "TESTED", 20)
    read = []

    def states(model, texts):
        read.append((model.ladder.queries.detach(), model.mllm.embed_tokens.weight.detach()))
        return torch.randn(3, 80, 4, 5, generator=torch.Generator().manual_seed(len(read)))

    monkeypatch.setattr(inside, "probe_states", states)
    other = TBAC.load(TOY_FOLDER)
    with torch.no_grad():
        other.mllm.embed_tokens.weight.mul_(2)
    start = trials.all_of(TOY_FOLDER, tmp_path / "start")
    (start / "captions").unlink()
    other.save(start / "captions")
    words = ["probes", "--out", str(tmp_path), "--start", str(start)]
    table = inside.probes(ablate.options(words))["table"]
    queries, embedded = zip(*read)
    assert all(torch.equal(queries[0], own) for own in queries)
    fresh = TBAC.load(TOY_FOLDER)
    by_name = dict(zip(plan.MLLMS, embedded))
    for name, factor in (("gist", 1), ("facts", 1), ("captions", 2)):
        own = factor * fresh.mllm.embed_tokens.weight.float()
        assert torch.equal(by_name[name], own) and not torch.equal(by_name["random"], own), name
    fresh.ladder.float().init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(queries[0], fresh.ladder.queries)
    assert all(row.keys() == plan.MLLMS.keys() for row in table.values())
    lines = tables.probes_by_state(table).splitlines()
    assert len(lines) == 2 + 4 * 6 and len({line.count("|") for line in lines}) == 1
    picture = np.array(Image.open(tmp_path / "probes.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    # What is drawn is drawn on the CPU, wherever it is needed.
    args = ablate.options(words[:3])
    args.device = "meta"
    assert inside.probes(args)["table"]["count"].keys() == {"facts", "random"}


@pytest.mark.parametrize("queries", [range(2), range(6, 8)])
def test_a_slot_of_queries_is_exchanged_at_its_depths_only(queries):
    own, other = torch.zeros(3, 2, 8, 5), torch.ones(3, 2, 8, 5)
    changed = inside.with_slot(own, other, queries, range(1, 3))
    assert torch.equal(changed[0], own[0]) and torch.equal(own, torch.zeros_like(own))
    assert (changed[1:, :, list(queries)] == 1).all() and changed.sum() == 2 * 2 * 2 * 5


def test_every_slot_is_muted_and_spliced_at_every_depth_and_at_each():
    found = inside.surgeries(6, 16)
    assert len(found) == 2 * 4 * (1 + 6)
    assert found["mute slot 1, every rung"] == ("mute", range(4, 8), range(6))
    assert found["splice slot 3, rung 5"] == ("splice", range(12, 16), range(5, 6))
    assert len(inside.surgeries(6, 2)) == 2 * 2 * (1 + 6)


def test_what_is_asked_for_differs_in_every_way():
    asked = inside.pairs_of_things(100)
    assert len(set(asked)) > 95
    for four in asked:
        assert len({t.name for t in four}) == 4
        for first, second in (four[:2], four[2:]):
            assert first.shape != second.shape and first.colour != second.colour


def test_the_things_that_are_there_are_told_apart():
    asked = inside.pairs_of_things(2)
    places = [world.Thing(t.shape, t.colour, "medium", x, 0.5) for t, x in
              ((asked[0][0], 0.22), (asked[0][3], 0.75))]
    pictures = [world.render(world.Scene(tuple(places))), Image.new("RGB", (64, 64), "white")]
    found = inside.things_there(pictures, asked)
    assert found == dict(zip(tables.THINGS, ([True, False], [False] * 2, [False] * 2,
                                             [True, False]))) | {tables.MORE: [False] * 2}
    # Of one name, one above the other: they count as three.
    twice = [world.Thing(places[0].shape, places[0].colour, "medium", 0.22, y) for y in (0.2, 0.8)]
    three = world.render(world.Scene((*twice, places[1])))
    assert inside.things_there([three], asked)[tables.MORE] == [True]
    layout = inside.layout(pictures[0], places[::-1])
    assert layout["first is left"] == 0 and layout["number"] == 2
    assert layout["first, across"] == pytest.approx(0.75, abs=0.03)
    assert np.isnan(inside.layout(pictures[1], places)["first is left"])


def test_what_is_not_known_is_null(tmp_path):
    trials.write_json(tmp_path / "a.json", dict(mean=float("nan"), n=[1, float("inf")]))
    assert json.loads((tmp_path / "a.json").read_text()) == dict(mean=None, n=[1, None])


def test_one_prompt_that_decides_does_not_spoil_an_interval():
    """Without the first prompt nothing is known, so only the others tell how sure it is."""
    values = np.array([[0.0, 1.0, np.nan], [1.0, 0.5, 2.0], [0.5, 3.0, 1.0]])
    found = inside.noise_shares(values)
    assert np.isfinite(found["the noise's"]["mean"])
    assert np.isfinite(found["the noise's"]["interval"]).all()


def test_the_noise_has_its_share():
    rng = np.random.default_rng(0)
    found = inside.noise_shares(3 * rng.normal(size=(8, 1)) + rng.normal(size=(8, 50)))
    assert found["the noise's"]["mean"] > 0.7 and found["the prompt's"]["mean"] < 0.1
    assert found["known"] == 8 * 50
    low, high = found["the noise's"]["interval"]
    assert low < found["the noise's"]["mean"] < high
    assert np.isnan(inside.noise_shares(np.full((8, 3), np.nan))["the prompt's"]["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("study", ["slots", "noise"])
def test_a_look_inside_writes_its_table_and_its_figure(study, tmp_path):
    done = run("-m", "lab.ablate", study, "--out", tmp_path, "--n", 2, "--draw-steps", 1)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / f"{study}.json").read_text())["table"]
    assert len(table) == (57 if study == "slots" else 4)
    assert (tmp_path / f"{study}.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------- command and runs

@pytest.mark.parametrize("argv, message", [
    (["wirings", "--n", "0"], "must be a whole number from 1"),
    (["wirings"], "--start FOLDER"),
    (["everything"], "invalid choice"),
    (["primary", "--start", "x", "--pictures", "3"], "primary does not ask for --pictures"),
    (["wirings", "--start", "x", "--model", "y"], "wirings does not ask for --model"),
])
def test_options_that_say_nothing(argv, message, capsys):
    with pytest.raises(SystemExit):
        ablate.options(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["noise", "--guidance=2"], ["probes", "--n", "5"],
                                   ["settings", "--draw-steps", "5"], ["told", "--minutes", "5"]])
def test_what_a_look_does_not_use_cannot_be_asked(words, capsys):
    with pytest.raises(SystemExit):
        ablate.options(words)
    assert f"{words[0]} does not ask for --" in capsys.readouterr().err
    used = [f"--{name.replace('_', '-')}=7" for name in inside.OPTIONS[words[0]]]
    args = ablate.options([words[0], *used])
    assert ablate.origin(args)["options"].keys() - {"weights"} == ablate.options_of(args)


def test_runs_go_on_under_the_code_that_began_them(tmp_path):
    group = types.SimpleNamespace(folder=tmp_path, commit="abc")
    for _ in range(2):
        trials.Group.check_code(group)
    group.commit = "def"
    with pytest.raises(ValueError, match="was begun by commit abc, not def"):
        trials.Group.check_code(group)


@pytest.mark.parametrize("study, missing", [
    ("primary", "gist"), ("wirings", "gist"), ("mllms", "captions, gist, mllm"),
    ("others", "captions, gist, mllm"),
])
def test_a_study_says_what_it_has_nothing_to_start_from(tmp_path, study, missing):
    """Of what its own arms need."""
    (tmp_path / "dit").mkdir()
    args = ablate.options([study, "--start", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=f"has no {missing}: docs/study.md says"):
        ablate.train(args, args.parts)


def test_scores_are_known_by_all_that_makes_them(tmp_path, monkeypatch):
    """Other weights, other prompts, other options: another folder."""
    monkeypatch.setattr(trials, "cases", lambda args: SIX[:args.n])
    for case in SIX:
        monkeypatch.setattr(case, "prompt", "x", raising=False)

    start = trials.all_of(TOY_FOLDER, tmp_path / "start")

    def folder(*argv):
        words = ["wirings", "--out", str(tmp_path), "--start", str(start), "--dtype", "float32",
                 *argv]
        return trials.folder_of(ablate.options(words), "gist")

    given = (["--n", "3"], ["--draw-steps", "3"], ["--steps", "7"], ["--batch", "7"],
             ["--dtype", "bfloat16"], ["--looks", "7"], ["--n-early", "7"], ["--guidance", "7"],
             ["--lr", "0.1"])
    found = {folder(), *(folder(*argv) for argv in given)}
    for part in ("dit", "gist", "captions"):
        other = trials.all_of(TOY_FOLDER, tmp_path / part)
        (other / part).unlink()
        TBAC.load(TOY_FOLDER).save(other / part, torch.bfloat16)
        found.add(folder("--start", str(other)))
    # Runs on the MLLM gist know nothing of the other MLLMs.
    assert len(found) == 12 and folder("--seeds", "9", "--width", "3", "--minutes", "1") in found


@pytest.mark.slow
def test_a_small_study_goes_on_where_it_was_stopped(tmp_path):
    start = trials.all_of(TOY_FOLDER, tmp_path / "start")
    argv = ("-m", "lab.ablate", "primary", "--start", start, "--out", tmp_path, "--seeds", 1,
            "--steps", 2, "--looks", 1, "--batch", 2, "--n", 1, "--draw-steps", 1)
    done = run(*argv, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert "stopped: 0 of 2 models are finished" in done.stdout
    assert not (tmp_path / "primary.json").exists()
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert "| ladder minus final |" in done.stdout
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs-*/*.json")}
    assert len(stamps) == 2
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    found = json.loads((tmp_path / "primary.json").read_text())
    assert found["options"]["steps"] == 2 and found["machine"]["cores"]
    assert {row["commit"] for row in found["runs"].values()} == {found["commit"]}
    assert found["scored"]["seen"]["table"].keys() == {"ladder", "final"}
    assert (tmp_path / "primary.png").is_file() and (tmp_path / "primary-categories.png").is_file()
