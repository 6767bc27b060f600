"""bench/: what it writes and counts is right, its page holds what was measured, and the script for
a GPU works before there is one."""
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sample
from bench import first_difference, gpu, make_random, measure, memory, tables, work
from bench.sizes import SIZES, empty_model, random_model, size_of
from engine.device import machine
from engine.files import read_json
from tbac import TBAC
from tests.conftest import ROOT, relative, run
from weights_convert import convert, read_config


@pytest.fixture(scope="module")
def counts():
    return read_json(tables.COUNTS)


# ------------------------------------------------------------------------------- random weights

@pytest.mark.parametrize("size", SIZES)
def test_the_public_layouts_are_those_of_the_sizes(size, tmp_path):
    config = SIZES[size]
    make_random.write_layouts(config, tmp_path)
    assert read_config(tmp_path / "qwen", tmp_path / "sana", tmp_path / "tbac") == config


def test_both_layouts_hold_the_same_weights(tmp_path):
    """ours/ as it is written, and tbac/ converted back; a model made in memory has them, too."""
    config = SIZES["tiny"]
    make_random.write_layouts(config, tmp_path)
    make_random.write_weights(config, tmp_path, "float32")
    convert(tmp_path / "qwen", tmp_path / "sana", tmp_path / "tbac", tmp_path / "back")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    in_memory = random_model(config).state_dict()
    assert first.keys() == second.keys() == in_memory.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and torch.equal(tensor, in_memory[name]), name


def test_weights_in_memory_go_by_their_public_names(tmp_path):
    """What the peer is given on a GPU is what the folder for it holds."""
    model = random_model(SIZES["tiny"])
    make_random.write_layouts(model.config, tmp_path)
    make_random.write_weights(model.config, tmp_path, "float32")
    written = load_file(tmp_path / "tbac" / "model.safetensors")
    for prefix in ("model.mllm_backbone.", "model.connector.", "model.transformer.", "vae."):
        for name, tensor in make_random.released_tensors(model, prefix).items():
            assert torch.equal(tensor, written.pop(prefix + name)), name
    assert not written


@torch.no_grad()
def test_random_weights_keep_their_scale():
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(SIZES["tiny"], dtype=dtype)
        *_, last = sample.denoise(model, ["a dog"], steps=3)
        for t in (*model.query_states(["a dog"]), last.x_t, model.dcae.decode(last.x_t.to(dtype))):
            assert t.isfinite().all() and 0.001 < t.float().std() < 100


# ------------------------------------------------------------------------------ how it is measured

def test_the_median_of_some_runs_counts(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0, 9.0, 2.5])
    monkeypatch.setattr(measure, "timed", lambda f, device: (next(seconds), f()))
    assert measure.repeated(lambda: None, 5, "cpu") == dict(seconds=2.5, low=1.0, high=9.0)


def test_pairs_are_measured_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "timed", lambda f, device: (f(), None))
    pairs = measure.in_turns(lambda: order.append("f") or 6.0, lambda: order.append("g") or 2.0,
                             3, "cpu")
    assert "".join(order) == "fgfgfg"
    assert (pairs.ratio, pairs.low, pairs.high) == (3.0, 3.0, 3.0)


def test_operations_of_fused_attention_are_those_of_its_products():
    """Forward and backward: two products and four; the backward pass makes the scores again."""
    q, k, v = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    with measure.Operations() as forward:
        out = nn.functional.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 3 * 8 * 8 * 16
    assert forward.n == 2 * product
    with measure.Operations() as backward:
        out.sum().backward()
    assert backward.n == 5 * product


def test_the_processor_has_a_name():
    found = machine("cpu")
    assert found["device"] == found["processor"] and len(found["processor"]) > 3
    assert found["versions"]["torch"] == torch.__version__
    # Where there is another accelerator than CUDA's, this is all that is known.
    assert machine("mps")["device"] == found["processor"]


# --------------------------------------------------------------------------------- what is counted

ROWS = ("encode a prompt with its null prompt", "training step t2i, latents cached",
        "training step edit")


@pytest.mark.parametrize("size", ["mid", "full"])
def test_the_counts_are_those_of_this_code(size, counts):
    """Ours, on the meta device: operations and bytes as bench/counts.json has them."""
    ours = work.Ours(empty_model(SIZES[size]))
    tasks = work.all_tasks(SIZES[size].size)
    for name in ROWS:
        f = ours.prepare(tasks[name])
        with measure.Counter(*ours.model.parameters()) as alive, measure.Operations() as counter:
            f()
        recorded = counts[size][name]["ours"]
        assert counter.n == recorded["operations"], name
        assert abs(alive.most / recorded["memory"] - 1) < 0.01, name
        assert sum(recorded["parts"].values()) == recorded["operations"]


def test_the_page_holds_what_was_counted_and_measured():
    page = tables.PAGE.read_text()
    assert tables.written(page) == page, "python -m bench.tables writes the tables again"


def test_what_the_page_says_about_operations(counts):
    """Shares of the peer's operations at full size, in words."""
    page = " ".join(tables.PAGE.read_text().split())
    full = counts["full"]
    for name in ("20-step picture, encode to latents", "20-step edit", "training step t2i",
                 "training step t2i, latents cached", "training step edit"):
        share = full[name]["ours"]["operations"] / full[name]["peer"]["operations"]
        assert f"{share:.2f}" in page, name
    picture = full["20-step picture, encode to latents"]["peer"]
    assert f"{100 * picture['parts']['DiT'] / picture['operations']:.0f} %" in page


@pytest.mark.slow
def test_the_page_says_how_much_memory_is_counted(capsys):
    memory.table(plain=False)
    counted = re.findall(r"^\|.*\| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "docs" / "training.md").read_text()
    said = re.search(r"^\| released sizes, 512 px \| GB \|\n.*\n((\|.*\n)+)", page, re.MULTILINE)[1]
    assert counted == re.findall(r"(?<=[|/] )([\d.]+)(?= [|/])", said) and len(counted) == 8


# -------------------------------------------------------------------------- the first difference

def test_the_first_layer_that_differs_is_named(tiny, capsys):
    recorded = first_difference.trace(tiny)
    assert len(recorded) > 500
    assert not first_difference.report(first_difference.trace(tiny), recorded, 0)
    with torch.no_grad():
        tiny.dit.blocks[1].cross.q.weight[0, 0] += 0.01
    found = first_difference.trace(tiny)
    assert first_difference.report(found, recorded, 0)
    first = next(call for call, error in first_difference.differences(found, recorded) if error)
    assert first.endswith(" dit.blocks.1.cross.q")
    assert "dit.blocks.1.cross.q:" in capsys.readouterr().out


def test_other_layers_are_no_comparison(tiny):
    recorded = first_difference.trace(tiny)
    tiny.mllm.layers = tiny.mllm.layers[:-1]
    tiny.mllm.config = dataclasses.replace(tiny.mllm.config, n_layer=len(tiny.mllm.layers))
    tiny.ladder.taps = [tap - 1 for tap in tiny.ladder.taps]
    with pytest.raises(ValueError, match="other layers run"):
        list(first_difference.differences(first_difference.trace(tiny), recorded))


def test_the_first_difference_on_the_command_line(tiny_folder, tmp_path, capsys):
    file = tmp_path / "before.safetensors"

    def main(*words):
        words = ["--model", tiny_folder, *words]
        first_difference.main(first_difference.options(list(map(str, words))))
        return capsys.readouterr().out

    main("--record", file)
    assert "no difference above 0" in main("--against", file)
    with pytest.raises(SystemExit, match="1"):
        main("--against", file, "--dtype", "bfloat16")
    assert "first difference above 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: "):
        main("--against", tmp_path / "none")


# Relative errors of bfloat16 against float32 on the tiny checkpoint: the largest, times 1.5.
BFLOAT16 = {"mllm.vision": 0.0174, "mllm.layers": 0.0210, "picture: state": 0.0125,
            "edit: state": 0.0113, "dit.blocks": 0.0746, "latents after": 0.0269,
            "pixels": 0.0107}


def test_bfloat16_stays_within_its_bounds(tiny):
    """State by state, so that a part that loses precision is found where it does."""
    exact = first_difference.trace(tiny)
    rounded = first_difference.trace(tiny.bfloat16())
    errors = dict(first_difference.differences(rounded, exact))
    for part, bound in BFLOAT16.items():
        largest = max(error for call, error in errors.items() if part in call)
        assert bound / 3 < largest <= bound, (part, largest)


# ------------------------------------------------------------------------------------- the schedule

def test_the_public_times_coincide_from_351_steps_on():
    """The public solver takes whole numbers 1000 t and finds its place by them: no parity there."""
    def whole(steps):
        return (1000 * sample.schedule(steps)[:-1]).int().tolist()

    assert all(len(set(whole(steps))) == steps for steps in range(1, 351))
    assert all(len(set(whole(steps))) < steps for steps in range(351, 500))


def test_the_versions_are_those_of_the_recorded_outputs():
    tiny = ROOT / "tests" / "fixtures" / "tiny"
    transformers = read_json(tiny / "qwen" / "config.json")["transformers_version"]
    diffusers = read_json(tiny / "sana" / "vae" / "config.json")["_diffusers_version"]
    assert (transformers, diffusers) == ("4.51.3", "0.34.0")
    for file in ("bench/gpu.sh", "bench/peer.py", "bench/README.md", "CONTRIBUTING.md",
                 "docs/paper_to_code.md"):
        text = (ROOT / file).read_text()
        assert transformers in text and diffusers in text, file


# -------------------------------------------------------------------------------------- for a GPU

def gpu_sh(*words):
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", ROOT / "bench" / "gpu.sh", *map(str, words)], text=True,
                          capture_output=True, env=environment, cwd=ROOT.parent)


def test_a_row_that_fails_does_not_stop_the_next(tmp_path):
    args = types.SimpleNamespace(out=tmp_path / "a.json", device="cpu", rehearse=True)
    rows = gpu.Rows(args)

    def fails():
        raise torch.OutOfMemoryError("no room\nfor this")

    rows.add("first", fails)
    assert read_json(args.out)["rows"]["first"]["failed"] == "OutOfMemoryError: no room"
    rows.add("second", lambda: dict(seconds=1))
    assert read_json(args.out)["rows"]["second"]["seconds"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_sh(tmp_path / "out")
    assert done.returncode == 1 and "sees no GPU" in done.stderr
    assert not list((tmp_path / "out").glob("*.json"))


def test_an_option_that_does_not_exist(tmp_path):
    done = gpu_sh(tmp_path / "out", "--dry-run")
    assert done.returncode == 1 and "expected --rehearse" in done.stderr


def test_a_rehearsal_is_no_result(tmp_path):
    found = dict(run=dict(rehearsal=True), rows={})
    (tmp_path / "machine.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="rehearsal"):
        tables.add(tmp_path, "a")


@pytest.mark.slow
def test_models_that_learn_together_are_timed_beside_single_ones():
    done = run("-m", "bench.together", "--n", 1, "--times", 1)
    assert done.returncode == 0, done.stderr
    together, alone = map(float, re.findall(r"(\d+\.\d+) s,", done.stdout))
    assert together > 0 and alone > 0


@pytest.mark.slow
def test_the_rehearsal_does_every_step(tmp_path):
    done = gpu_sh(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stderr
    for step in ("machine", "parity", "draw", "train", "compile", "toy", "study"):
        content = read_json(tmp_path / f"{step}.json")
        assert content["run"]["rehearsal"] and content["rows"], step
        failed = {name: row["failed"] for name, row in content["rows"].items() if "failed" in row}
        assert not failed, (step, failed)
    errors = read_json(tmp_path / "parity.json")["rows"]["fast, float32"]
    assert max(error for name, error in errors.items() if name != "took") < 1e-5
    shown = tables.gpu_section(dict(steps={file.stem: read_json(file)
                                           for file in tmp_path.glob("*.json")}))
    assert "20-step picture" in shown and "t2i, batch 4, --grad-checkpoint" in shown


def test_the_peer_is_compared_row_by_row():
    row = dict(first=4.0, second=2.0, ratio=2.0, low=1.9, high=2.1, apart=1e-6,
               operations=dict(peer=30, ours=20), memory=dict(peer=2.0, ours=1.0))
    shown = tables.peer_table({"a row": row, "another": dict(failed="OutOfMemoryError: no room")})
    assert "| a row | 4.000 | 2.000 | 2.00 | 1.90 - 2.10 | 1.50 | 1.33 | 0.50 | 1e-06 |" in shown
    assert "| another | OutOfMemoryError: no room |" in shown


def test_models_load_as_they_were_made(tmp_path):
    """python -m bench.make_random, by its command line."""
    done = run("-m", "bench.make_random", tmp_path, "--size", "tiny", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    model = TBAC.load(tmp_path / "ours")
    assert model.ladder.queries.dtype == torch.bfloat16
    assert size_of(model.config) == "tiny"
    expected = random_model(SIZES["tiny"], dtype=torch.bfloat16)
    assert relative(model.ladder.queries.float(), expected.ladder.queries.float()) == 0
