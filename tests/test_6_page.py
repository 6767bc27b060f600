"""The live page: what it draws is what the model draws, one request at a time; nothing that comes
over the network stops it, and nothing of it is left when it ends."""
import base64
import contextlib
import http.client
import io
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from engine import limits, page, words
from engine.jobs import Abandoned, Full, Job, Line
from engine.live import Previews, stoppable
from engine.mixer import exchange
from tbac import TBAC
from tests.conftest import ROOT

JSON = {"Content-Type": "application/json"}
# A machine that does much else needs time.
SECONDS = 60


def base64_of(image, kind="png", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return base64.b64encode(file.getvalue()).decode()


def request(**changes):
    return dict(prompt="a dog", image=None, negative="", seed=0, steps=2, guidance=4.5,
                image_guidance=1.5, solver="dpm++", other=None, choice=None) | changes


def live_of(model, folder="model", *words):
    args = sample.options(["--serve", "--model", str(folder), *words])
    sample.default_guidance(args, model)
    return sample.live(args, model)


def left(model):
    """What may be left: threads, files and connections of this process (the pipes are those of the
    browser), hooks of the model (each with its place)."""
    found = []
    for file in os.listdir("/proc/self/fd"):
        # The listing itself is one, too, and closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{file}"))
    files = {name for name in found if "pipe:" not in name}
    hooks = {(m, hook) for m in model.modules() for hook in m._forward_pre_hooks}
    return {t for t in threading.enumerate() if t.is_alive()} | files, hooks


@contextlib.contextmanager
def served(live):
    """A server at work in this process, of which nothing is left at the end."""
    before, hooks = left(live.model)
    with page.serving(live, "127.0.0.1", 0) as (server, line):
        worker = threading.Thread(target=line.run)
        worker.start()
        try:
            yield server
        finally:
            line.close()
            worker.join(SECONDS)
            assert not worker.is_alive()
    # What ended meanwhile may have been there before: a client of the last test.
    after, hooks_after = left(live.model)
    assert after <= before and hooks_after == hooks


@pytest.fixture(scope="module")
def server(one):
    with served(live_of(one)) as running:
        yield running


def connect(server):
    return http.client.HTTPConnection(*server.server_address[:2], timeout=SECONDS)


def post(server, path, content, headers=JSON):
    """-> the response, whose events may still come"""
    connection = connect(server)
    connection.request("POST", path, json.dumps(content), headers)
    return connection.getresponse()


def events(response):
    """Yields (name, data) as they come."""
    assert response.status == 200, response.read()
    name = None
    with response:
        for line in response:
            kind, _, value = line.decode().rstrip("\n").partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                yield name, json.loads(value)


def outcome(server, path, **content):
    """{name: data} of the last event of each name."""
    return dict(events(post(server, path, content)))


def opened(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def differ(a, b):
    """By how many grey values, at most."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def until(condition, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------- what comes of it

def expected(model, **settings):
    """The picture that the command line draws of the same."""
    settings = request(**settings)
    prompt, seed = settings.pop("prompt"), settings.pop("seed")
    images = settings.pop("image")
    for name in ("other", "choice"):
        settings.pop(name)
    generator = torch.Generator().manual_seed(seed)
    images = images and [[images]]
    return np.asarray(sample.generate(model, [prompt], images, generator=generator,
                                      **settings)[0])


@pytest.mark.parametrize("settings", [
    {}, dict(seed=2 ** 61), dict(steps=5, solver="euler", guidance=2), dict(negative="blue"),
    dict(prompt="größe 犬 🎨")])
def test_a_drawing_is_that_of_the_command_line_and_its_steps_come_first(one, server, settings):
    asked = request(**settings)
    found = list(events(post(server, "/draw", asked)))
    names = [name for name, _ in found]
    n = asked["steps"]
    assert names == ["queue", "start", *["step"] * n, "picture", "done"]
    picture = opened(found[-2][1]["picture"])
    assert np.array_equal(picture, expected(one, **settings))
    steps = [data for name, data in found if name == "step"]
    assert [step["step"] for step in steps] == list(range(1, n + 1))
    times = [step["t"] for step in steps]
    assert times == sorted(times, reverse=True) and times[-1] == 0
    for step in steps[:-1]:
        assert opened(step["x_t"]).shape == opened(step["x0"]).shape == picture.shape


def test_the_pictures_on_the_way_are_those_of_the_steps(one, server):
    generator = torch.Generator().manual_seed(0)
    steps = list(sample.denoise(one, ["a dog"], steps=3, generator=generator))
    found = [data for name, data in events(post(server, "/draw", request(steps=3)))
             if name == "step"]
    for step, data in zip(steps[:-1], found):
        for name in ("x_t", "x0"):
            # Both are decoded at once, so one grey value may be rounded the other way.
            assert differ(opened(data[name]), one.decode(getattr(step, name))[0]) <= 1


def test_a_picture_is_edited_and_asked_about(one, server, gradient):
    for kind in ("png", "bmp", "tiff"):
        found = outcome(server, "/draw", **request(image=base64_of(gradient, kind)))
        assert np.array_equal(opened(found["picture"]["picture"]), expected(one, image=gradient))
    settings = dict(image_guidance=3.0)
    closer = outcome(server, "/draw", **request(image=base64_of(gradient), **settings))
    picture = opened(closer["picture"]["picture"])
    assert np.array_equal(picture, expected(one, image=gradient, **settings))
    assert not np.array_equal(picture, expected(one, image=gradient))
    answer = events(post(server, "/ask", dict(question="what is it?", image=base64_of(gradient))))
    texts = [data["text"] for name, data in answer if name == "answer"]
    assert texts[-1] == one.ask("what is it?", [gradient])
    # It grows: each event has all that is known so far.
    assert len(texts) > 2 and all(map(str.startswith, texts[1:], texts))
    found = outcome(server, "/ask", question="what is it?", image=None)
    assert found["answer"]["text"] == one.ask("what is it?")


def test_it_draws_at_the_size_asked_for(one):
    with served(live_of(one, "model", "--size", "64x32")) as server:
        found = outcome(server, "/draw", **request())
    assert opened(found["picture"]["picture"]).shape == (32, 64, 3)
    # Refused before the first request.
    with pytest.raises(ValueError, match="multiple"):
        live_of(one, "model", "--size", "30")


def test_the_mixer_draws_any_exchange(one, server):
    def mixed(choice):
        found = outcome(server, "/draw", **request(other="a cat", choice=choice.tolist()))
        return opened(found["picture"]["picture"])

    everything = exchange(4, 8)
    assert np.array_equal(mixed(~everything), expected(one))
    # What guidance compares B with was read beside A, in a row of another length.
    assert differ(mixed(everything), expected(one, prompt="a cat")) <= 1
    some = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    (a, k), (b, _) = (sample.encode_for_guidance(one, [prompt], None, 1.5, "")
                      for prompt in ("a dog", "a cat"))
    rungs = a.clone()
    for j, s in some.nonzero().tolist():
        rungs[j, -1, s] = b[j, -1, s]                    # the tiny model has a query for each slot
    picture = sample.generate(one, [""], steps=2, conditioning=(rungs, k),
                              generator=torch.Generator().manual_seed(0))[0]
    assert np.array_equal(mixed(some), np.asarray(picture))


def test_what_is_cut_is_said_and_what_fails_does_not_end_the_server(one, server, monkeypatch,
                                                                     capsys):
    found = outcome(server, "/draw", **request(prompt="dog " * 500, steps=1))
    assert "tokens" in found["note"]["text"] and "done" in found

    def heard(folder, *texts):
        warnings.warn(f"new: {texts}", stacklevel=1)

    with monkeypatch.context() as patch:
        patch.setattr(words, "listen", heard)
        found = outcome(server, "/draw", **request(prompt="dog", steps=1))
        assert "dog" in found["note"]["text"]
        answered = list(events(post(server, "/ask", dict(question="cat", image=None))))
    notes = [data["text"] for name, data in answered if name == "note"]
    assert "cat" in notes[0] and notes[1:] == ["answer cut at 64 tokens"]

    def broken(*_):
        raise RuntimeError("a bug in here")

    with monkeypatch.context() as patch:
        patch.setattr(one, "stream_answer", broken)
        found = outcome(server, "/ask", question="?", image=None)
    assert found["error"]["error"] == "this failed; the server's terminal says why"
    assert "a bug in here" in capsys.readouterr().err
    assert "done" in outcome(server, "/draw", **request())


def test_a_slow_decoder_costs_a_small_part_of_the_time(one):
    class Slow:
        def decode(self, latents):
            time.sleep(0.05)
            return one.decode(latents)

    step = next(sample.denoise(one, ["a dog"], steps=2))
    previews = Previews(Slow())
    # As if the free time had been spent, and the drawing had just begun.
    previews.spent = 2.1
    assert previews.of(step) == {}
    # A tenth of a long drawing.
    previews.start -= 21
    assert set(previews.of(step)) == {"x_t", "x0"} and previews.spent > 2.15


# -------------------------------------------------------------------------------- one at a time

class Counted:
    """draws as `live` does, and counts how many do so at once."""

    def __init__(self, live):
        self.draw, self.now, self.most, self.steps = live.draw, 0, 0, 0
        live.draw = self

    def __call__(self, *args):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for step in self.draw(*args):
                self.steps += 1
                yield step
        finally:
            self.now -= 1


def test_a_hundred_requests_at_once(one):
    live = live_of(one)
    counted = Counted(live)
    with served(live) as server:
        found = [None] * 100
        gate = threading.Barrier(100)

        def ask(i):
            gate.wait()
            found[i] = list(events(post(server, "/draw", request(seed=i % 3, steps=1))))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    pictures = [expected(one, seed=seed, steps=1) for seed in range(3)]
    places = []
    for i, said in enumerate(found):
        assert said[-1][0] == "done"
        assert np.array_equal(opened(said[-2][1]["picture"]), pictures[i % 3])
        ahead = [data["ahead"] for name, data in said if name == "queue"]
        # Each tells of every place that it had, down to the first.
        assert ahead == list(range(ahead[0], ahead[-1] - 1, -1)) and ahead[-1] <= 1
        places.append(ahead[0])
    assert counted.most == 1 and counted.steps == 100
    # The queue was one, and it was seen.
    assert max(places) > 20


def test_a_closed_tab_stops_its_work_and_leaves_the_line(one):
    live = live_of(one)
    counted = Counted(live)
    with served(live) as server:
        long = request(steps=limits.MAX_PAGE_STEPS)
        drawing = post(server, "/draw", long)
        said = events(drawing)
        while next(said)[0] != "step":
            pass
        waiting = [post(server, "/draw", long) for _ in range(5)]
        asked = post(server, "/draw", request())
        until(lambda: len(server.line.waiting) == 6)
        for response in waiting:
            response.close()
        until(lambda: len(server.line.waiting) == 1)
        said.close()
        drawing.close()
        assert dict(events(asked)).get("done") == {}
        assert 1 <= counted.steps < limits.MAX_PAGE_STEPS and counted.now == 0
        until(lambda: not server.connections)
        assert server.budget.left == limits.MAX_PAGE_HELD_BYTES


def test_work_stops_between_two_layers(one, tiny_folder):
    """A step of a large model takes long; nobody has to wait for its end."""
    line, seen = Line(1), []
    job = Job(lambda: (("answer", dict(text=one.ask("what?"))) for _ in range(1)))

    def leave(*_):
        seen.append(1)
        line.leave(job)

    handle = one.mllm.layers[1].register_forward_hook(leave)
    with stoppable(one, line.check):
        line.current = job
        with pytest.raises(Abandoned):
            one.ask("what?")
    handle.remove()
    assert len(seen) == 1
    # The same model draws as if nothing had been.
    assert one.ask("what?") == TBAC.load(tiny_folder).ask("what?")


def test_a_full_line_refuses_and_a_closed_one_tells():
    line = Line(2)
    jobs = [Job(lambda: iter(())) for _ in range(4)]
    for job in jobs[:2]:
        line.enter(job)
    with pytest.raises(Full, match="2 requests are waiting"):
        line.enter(jobs[2])
    line.leave(jobs[0])
    line.enter(jobs[2])
    line.close()
    for job in jobs[1:3]:
        *_, last = drain(job.events)
        assert last == ("error", {"error": "the server has ended"}) and job.abandoned
    with pytest.raises(Full):
        line.enter(jobs[3])
    # Nothing is left to do, so it ends.
    line.run()


def drain(events):
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(events.get_nowait())
    return found


def test_what_is_held_is_limited(one, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAGE_HELD_BYTES", 100_000)
    monkeypatch.setattr(page, "MAX_PAGE_WAITING", 2)
    with served(live_of(one)) as server:
        until(lambda: server.line.current is None)
        found = post(server, "/draw", request(prompt="x" * 200_000))
        assert found.status == 503 and "too many pictures" in json.loads(found.read())["error"]
        busy = post(server, "/draw", request(steps=limits.MAX_PAGE_STEPS))
        until(lambda: server.line.current is not None)
        waiting = [post(server, "/draw", request()) for _ in range(2)]
        until(lambda: len(server.line.waiting) == 2)
        found = post(server, "/draw", request())
        assert found.status == 503 and "2 requests are waiting" in json.loads(found.read())["error"]
        for response in (busy, *waiting):
            response.close()


def test_connections_are_limited(one, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAGE_CONNECTIONS", 3)
    with served(live_of(one)) as server:
        idle = [socket.create_connection(server.server_address) for _ in range(3)]
        until(lambda: len(server.connections) == 3)
        with socket.create_connection(server.server_address) as more:
            head, _, body = more.recv(1000).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 503")
        assert "too many connections" in json.loads(body)["error"]
        for connection in idle:
            connection.close()
        until(lambda: not server.connections)
        assert "done" in outcome(server, "/draw", **request())


# ------------------------------------------------------------------------------------- hostile

HOST = b"Host: 127.0.0.1\r\n"
TYPE = b"Content-Type: application/json\r\n"
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"


def get(path, head=HOST):
    return b"GET " + path + b" HTTP/1.1\r\n" + head + b"\r\n"


def body(content, head=HOST + TYPE, path=b"/draw", length=None):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = str(len(content) if length is None else length).encode()
    return (b"POST " + path + b" HTTP/1.1\r\n" + head + b"Content-Length: " + length
            + b"\r\n\r\n" + content)


def changed(**changes):
    return body(request(**changes))


def raw(field, text):
    """A request with this JSON text in place of a field's value."""
    return body(json.dumps(request(**{field: "HERE"})).replace('"HERE"', text).encode())


GOOD = body(request())

HOSTILE = {
    # paths: the routes are the only ones, and no path is a file's
    "a path upward": (get(b"/../../../etc/passwd"), 404),
    "a path upward, encoded": (get(b"/%2e%2e/%2e%2e/etc/passwd"), 404),
    "a file of the project": (get(b"/engine/page.html"), 404),
    "a file by its address": (get(b"file:///etc/passwd"), 404),
    "a NUL in the path": (get(b"/\x00"), 404),
    "bytes that are no text": (get(b"/\xff\xfe"), 404),
    "a query": (get(b"/?x=1"), 404),
    "a path of 3000 letters": (get(b"/" + b"x" * 3000), 404),
    "a path of 100 000 letters": (get(b"/" + b"x" * 100_000), 414),
    "another server, as of a proxy": (get(b"http://example.com/"), 404),
    "a control sequence": (get(b"/\x1b[2J"), 404),
    # methods
    "DELETE": (b"DELETE / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "POST to the page": (body({}, path=b"/"), 405),
    "GET of a job": (get(b"/draw"), 405),
    "HEAD": (b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "OPTIONS, before a foreign request": (b"OPTIONS /draw HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "CONNECT": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "no method": (b"\r\n\r\n", 400),
    "a method of one word": (b"GET\r\n\r\n", 400),
    "what is no HTTP": (b"SSH-2.0-OpenSSH_9.2 a b c\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)) + b"\n\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/x": (b"GET / HTTP/x\r\n\r\n", 400),
    # hosts and origins
    "no Host": (get(b"/", b""), 400),
    "two Hosts": (get(b"/", HOST * 2), 400),
    "a foreign name (DNS rebinding)": (get(b"/", b"Host: evil.example\r\n"), 421),
    "a foreign name with our port": (get(b"/", b"Host: evil.example:8000\r\n"), 421),
    "a name that begins like ours": (get(b"/", b"Host: 127.0.0.1.evil.example\r\n"), 421),
    "a name with a user": (get(b"/", b"Host: a@127.0.0.1\r\n"), 421),
    "an empty Host": (get(b"/", b"Host:\r\n"), 421),
    "a foreign page": (body(request(), HOST + TYPE + b"Origin: http://evil.example\r\n"), 403),
    "another port of this machine":
        (body(request(), HOST + TYPE + b"Origin: http://127.0.0.1:9\r\n"), 403),
    "a page without an origin": (body(request(), HOST + TYPE + b"Origin: null\r\n"), 403),
    "https for http": (body(request(), HOST + TYPE + b"Origin: https://127.0.0.1\r\n"), 403),
    "two origins":
        (body(request(), HOST + TYPE + b"Origin: http://127.0.0.1\r\nOrigin: http://e\r\n"), 403),
    "another site": (body(request(), HOST + TYPE + b"Sec-Fetch-Site: cross-site\r\n"), 403),
    "another host of the site":
        (body(request(), HOST + TYPE + b"Sec-Fetch-Site: same-site\r\n"), 403),
    # headers and sizes
    "a form": (body(b"prompt=a", HOST + FORM), 415),
    "a text": (body(request(), HOST + b"Content-Type: text/plain\r\n"), 415),
    "no type": (body(request(), HOST), 415),
    "no length": (b"POST /draw HTTP/1.1\r\n" + HOST + TYPE + b"\r\n{}", 411),
    "chunks": (body(request(), HOST + TYPE + b"Transfer-Encoding: chunked\r\n"), 411),
    "a negative length": (body(b"{}", length=-1), 400),
    "a length of 10 ^ 30": (body(b"{}", length=10 ** 30), 400),
    "a length of a terabyte": (body(b"{}", length=10 ** 12), 413),
    "a length in other digits": (body(b"{}", length="٣"), 400),
    "two lengths": (body(b"{}", HOST + TYPE + b"Content-Length: 5\r\n"), 400),
    "1000 headers": (get(b"/", HOST + b"X: y\r\n" * 1000), 431),
    "a header of 100 000 letters": (get(b"/", HOST + b"X: " + b"y" * 100_000 + b"\r\n"), 431),
    # JSON
    "nothing": (body(b""), 400),
    "no JSON": (body(b"prompt"), 400),
    "half of it": (body(b'{"prompt": "a'), 400),
    "bytes that are no UTF-8": (body(b'{"prompt": "\xff"}'), 400),
    "UTF-16": (body(json.dumps(request()).encode("utf-16")), 400),
    "a list": (body([]), 400),
    "null": (body(b"null"), 400),
    "100 000 brackets": (body(b"[" * 100_000), 400),
    "a key twice": (body(b'{"prompt": "a", "prompt": "b"}'), 400),
    "an unknown key": (changed(model="/etc"), 400),
    "a missing key": (body({key: value for key, value in request().items() if key != "seed"}),
                      400),
    "a key of another job": (body(request(), path=b"/ask"), 400),
    # values
    "NaN": (raw("guidance", "NaN"), 400),
    "infinity": (raw("guidance", "Infinity"), 400),
    "1e999": (raw("guidance", "1e999"), 400),
    "a number of 5000 digits": (raw("seed", "9" * 5000), 400),
    "a negative seed": (changed(seed=-1), 400),
    "a seed beyond 64 bits": (changed(seed=2 ** 70), 400),
    "a seed with a fraction": (changed(seed=1.5), 400),
    "no steps": (changed(steps=0), 400),
    "a million steps": (changed(steps=10 ** 6), 400),
    "true steps": (changed(steps=True), 400),
    "steps as text": (changed(steps="20"), 400),
    "a solver that is none": (changed(solver="__import__"), 400),
    "a prompt that is none": (changed(prompt=None), 400),
    "a prompt as a list": (changed(prompt=["a"]), 400),
    "a prompt of a megabyte": (changed(prompt="x" * 2 ** 20), 400),
    "half a letter": (changed(prompt="\ud800"), 400),
    "a choice without another prompt": (changed(choice=exchange(4, 8).tolist()), 400),
    "another prompt without a choice": (changed(other="a"), 400),
    "a choice of three rungs": (changed(other="a", choice=exchange(3, 8).tolist()), 400),
    "a choice of numbers": (changed(other="a", choice=[[1] * 8] * 4), 400),
    "a choice that is flat": (changed(other="a", choice=[True] * 32), 400),
    # pictures
    "a picture by its path": (changed(image="/etc/passwd"), 400),
    "a picture by its address": (changed(image="http://127.0.0.1/x.png"), 400),
    "an empty picture": (changed(image=""), 400),
    "a picture that is no base64": (changed(image="ü" * 100), 400),
    "a picture as a list": (changed(image=[base64.b64encode(b"x").decode()]), 400),
}


def bomb():
    """A small file that says it has 10^10 pixels."""
    content = bytearray(base64.b64decode(base64_of(Image.new("L", (8, 8)))))
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    return base64.b64encode(content).decode()


PICTURES = {
    "letters": base64.b64encode(b"no picture at all").decode(),
    "SVG": base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    "PostScript": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode(),
    "half of a picture": base64_of(Image.effect_noise((64, 64), 50))[:2000],
    "a picture of 10^10 pixels": bomb(),
    "too many pixels": base64_of(Image.new("1", (5000, 4000))),
    "a thread": base64_of(Image.new("L", (4000, 2))),
    "numbers without a scale": base64_of(Image.new("F", (64, 64)), "tiff"),
}


def send(server, content, then=None):
    """Raw bytes -> the whole answer. then: what to do before it is read."""
    with socket.create_connection(server.server_address[:2], SECONDS) as connection:
        # It may refuse before all has been sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        if then:
            then(connection)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                found += part
        return found


def refusal(answer):
    """-> status and reason of an answer that refuses"""
    head, _, content = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert "Content-Type: application/json" in lines and "X-Content-Type-Options: nosniff" in lines
    assert not any(line.startswith("Access-Control") for line in lines)
    return int(lines[0].split()[1]), json.loads(content)["error"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_in_words(server, name):
    content, status = HOSTILE[name]
    found, why = refusal(send(server, content))
    assert found == status, why
    assert 3 < len(why) < 1000 and why.isprintable() and "Traceback" not in why


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_read_is_refused_in_its_turn(server, name):
    for path, content in (("/draw", request()), ("/ask", dict(question="what?"))):
        found = outcome(server, path, **content | dict(image=PICTURES[name]))
        assert "picture" in found["error"]["error"] and "done" not in found


def test_the_server_is_as_before(one, server):
    """After all of the above: it draws, nobody waits, and no connection is held."""
    found = outcome(server, "/draw", **request())
    assert np.array_equal(opened(found["picture"]["picture"]), expected(one))
    until(lambda: not server.connections)
    assert not server.line.waiting and server.budget.left == limits.MAX_PAGE_HELD_BYTES


def test_what_is_right_is_not_refused(server):
    """The same requests, without what is hostile in them."""
    for host in (b"localhost", b"127.0.0.1:9999", b"[::1]:8000", b"LOCALHOST:80"):
        assert send(server, get(b"/", b"Host: " + host + b"\r\n")).startswith(b"HTTP/1.0 200")
    own = b"Origin: http://127.0.0.1\r\nSec-Fetch-Site: same-origin\r\n"
    assert b"event: done" in send(server, body(request(), HOST + TYPE + own))
    typed = HOST + b"Content-Type: application/json; charset=utf-8\r\n"
    assert b"event: done" in send(server, body(request(), typed))


def test_who_is_slow_or_breaks_off_holds_nothing(one, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAGE_READ_SECONDS", 1)
    with served(live_of(one)) as server:
        def drip(connection):
            # Until there is an answer.
            while not select.select([connection], [], [], 0.1)[0]:
                connection.sendall(b"x")

        def close_half(connection):
            connection.shutdown(socket.SHUT_WR)

        start = time.monotonic()
        for begun in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a", GOOD[:-60]):
            status, why = refusal(send(server, begun, drip))
            assert status == 408 and "in time" in why
        assert time.monotonic() - start < 30
        status, why = refusal(send(server, GOOD[:-10], close_half))
        assert status == 400 and "instead of" in why
        # And those who break off anywhere.
        for end in range(0, len(GOOD), 20):
            with socket.create_connection(server.server_address) as connection:
                connection.sendall(GOOD[:end])
        until(lambda: not server.connections)
        assert "done" in outcome(server, "/draw", **request())


def test_who_does_not_read_is_cut_off(one, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAGE_WRITE_SECONDS", 0.5)
    live = live_of(one)
    # More than the system keeps for a connection.
    live.actions["/ask"] = (live.actions["/ask"][0],
                            lambda _: (("answer", dict(text="x" * 20_000_000)) for _ in range(3)))
    with served(live) as server:
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(body(dict(question="", image=None), path=b"/ask"))
            until(lambda: server.connections)
            until(lambda: not server.connections)
        assert "done" in outcome(server, "/draw", **request())


# --------------------------------------------------------------------------------- the page itself

def test_the_page_is_one_file_that_may_only_talk_to_its_server(one, server):
    connection = connect(server)
    connection.request("GET", "/")
    response = connection.getresponse()
    html = response.read().decode()
    policy = response.headers["Content-Security-Policy"]
    for rule in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe-eval" not in policy and "script-src 'sha256-" in policy
    # Addresses are those that the page carries itself.
    assert "http:" not in html and "https:" not in html and " src=\"" not in html
    about = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert about["blocks"] == 4 and about["solvers"] == ["dpm++", "euler"]
    assert about["start"]["steps"] == 20 and about["size"] == [32, 32]


def test_names_cannot_leave_the_data_of_the_page(one):
    live = live_of(one, "a</script><script>hacked=1</script>")
    html, _ = page.page_of(live)
    assert b"<script>hacked" not in html


# -------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("words, message", [
    (["a dog", "--serve"], "leave them out"), (["--serve", "--n", "2"], "leave them out"),
    (["--serve", "--ask", "what?"], "leave them out"),
    (["--serve", "--image", "x.png"], "leave them out"),
    (["--serve", "--explain"], "leave them out"), (["--serve", "--compile"], "leave one out"),
    (["--serve", "--steps", "201"], "200 --steps are the limit"),
    (["--serve", "--seed", str(2 ** 53)], "a browser counts exactly"),
    (["--serve", "--negative", "x" * 5000], "at most 4096 bytes"),
])
def test_options_that_make_no_sense_with_it(words, message):
    with pytest.raises(ValueError, match=message):
        sample.check(sample.options(words))


def test_it_listens_here_only_unless_told_and_says_what_is_wrong(one, server):
    assert sample.options(["--serve"]).host == "127.0.0.1"
    assert server.server_address[0] == "127.0.0.1"
    for host, port in (("127.0.0.1", server.server_address[1]), ("192.0.2.1", 0),
                       ("no.such.host.invalid", 0), ("x" * 300, 0), ("a\0b", 0)):
        with pytest.raises(ValueError, match="--host .* --port"):
            with page.serving(live_of(one), host, port):
                pass
    with served(live_of(one)) as other:
        other.bound = "lab.example"
        host = b"Host: Lab.example:8000\r\n"
        assert send(other, get(b"/", host)).startswith(b"HTTP/1.0 200")


@contextlib.contextmanager
def command(folder, *more):
    """`sample.py --serve` in a process of its own -> it, and its address"""
    def heard():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    words = [sys.executable, "sample.py", "--serve", "--port", "0", "--model", folder, *more]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, text=True, preexec_fn=heard,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process, process.stdout.readline().split()[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_whatever_it_does(tiny_folder, number):
    """In the middle of a drawing, with others in line, and one who does not finish its request."""
    with command(tiny_folder) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        slow = socket.create_connection((host, int(port)))
        slow.sendall(GOOD[:-5])
        said = []
        for _ in range(3):
            connection = http.client.HTTPConnection(host, int(port), timeout=SECONDS)
            asked = request(steps=limits.MAX_PAGE_STEPS)
            connection.request("POST", "/draw", json.dumps(asked), JSON)
            said.append(events(connection.getresponse()))
        while next(said[0])[0] != "step":
            pass
        # Impatiently.
        for _ in range(2):
            process.send_signal(number)
        for one in said:
            *_, last = one
            assert last == ("error", {"error": "the server has ended"})
        out, err = process.communicate(timeout=SECONDS)
        slow.close()
    assert process.returncode == 0 and out == "" and err.splitlines()[-1] == "ended"
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------- a browser

def status(tab):
    return tab.js("document.querySelector('#status').textContent")


def drawn(tab, n):
    tab.wait(f"!running && document.querySelectorAll('#wall button').length === {n}")
    assert status(tab).startswith("Drawn in")


@pytest.mark.slow
def test_a_person_draws_edits_asks_and_mixes(browser, tiny_folder, tmp_path, gradient):
    gradient.save(tmp_path / "mine.png")
    with command(tiny_folder, "--steps", 6, "--guidance", 4.3) as (process, address):
        tab = browser.open(address, width=400)
        assert tab.js("[settings().steps, settings().guidance]") == [6, 4.3]
        assert tab.js("document.querySelector('#guidance + output').textContent") == "4.3"
        # It is ready to be typed into.
        tab.type("a dog")
        tab.press("Enter")
        tab.wait("moments.length > 1")
        drawn(tab, 1)
        first = tab.js("document.querySelector('#x_t').src")
        assert tab.js("document.querySelector('#x_t').alt") == "The picture: a dog"
        assert tab.js("moments.length") == 6

        # A slider draws again; another one looks back.
        tab.js("document.querySelector('#seed').focus()")
        tab.press("ArrowRight")
        drawn(tab, 2)
        assert tab.js("document.querySelector('#x_t').src") != first
        assert tab.js("document.querySelector('#seed + output').textContent") == "1"
        tab.js("document.querySelector('#moment').focus()")
        tab.press("Home")
        assert tab.js("document.querySelector('#when').textContent").startswith("after step 1, t =")

        # The mixer: B, then one cell by the keyboard, then a whole rung by a click.
        tab.click("#grid .cell")
        assert status(tab).startswith("There is no B yet")
        tab.click("#other")
        tab.type("a cat")
        tab.press("Enter")
        drawn(tab, 3)
        tab.click("#all-a")
        drawn(tab, 4)
        tab.click("#grid .cell")
        drawn(tab, 5)
        said = "document.querySelector('#when').textContent"
        assert tab.js(said) == "a dog; 1 of 32 cells from: a cat"
        tab.press("ArrowDown")
        tab.press(" ")
        drawn(tab, 6)
        assert tab.js("choice[2][0] && choice[3][0] && choice.flat().filter(Boolean).length") == 2
        tab.click("#grid .head:not(.top)")
        drawn(tab, 7)
        assert tab.js(said) == "a dog; 9 of 32 cells from: a cat"
        assert tab.js("[...document.querySelectorAll('.ends img')].every(image => image.src)")

        # A picture of one's own: edited, asked about.
        tab.choose_file("#file", tmp_path / "mine.png")
        tab.wait("document.querySelector('#hand').alt === 'The picture mine.png'")
        tab.click("#instruction")
        tab.type("make it red")
        tab.press("Enter")
        drawn(tab, 8)
        tab.click("#question")
        tab.type("what is it?")
        tab.press("Enter")
        tab.wait("document.querySelector('#status').textContent.startsWith('Answered')")
        # Untrained weights find no end.
        assert status(tab) == "Answered. answer cut at 64 tokens"
        assert tab.js("document.querySelector('dd').textContent") not in ("", "…")

        # Without a B all is A's; cells are one stop of the Tab key, wherever a click was.
        tab.js("document.querySelector('#other').value = ''")
        tab.js("document.querySelector('#other').dispatchEvent(new Event('input'))")
        assert tab.js("choice.flat().some(Boolean)") is False
        stops = "document.querySelectorAll('#grid button[tabindex=\"0\"]').length"
        tab.js("[...document.querySelectorAll('#grid .cell')][5].focus()")
        tab.press("ArrowLeft")
        tab.press("ArrowLeft")
        assert tab.js(stops) == 1

        # The same file once more; and what is chosen while something is drawn stays at hand.
        tab.choose_file("#file", tmp_path / "mine.png")
        tab.wait("document.querySelector('#hand').alt === 'The picture mine.png'")
        gradient.save(tmp_path / "other.png")
        tab.click("#draw .main")
        tab.choose_file("#file", tmp_path / "other.png")
        tab.wait("document.querySelector('#hand').alt === 'The picture other.png'")
        drawn(tab, 9)
        assert tab.js("document.querySelector('#hand').alt") == "The picture other.png"
        tab.click("#wall button")
        assert tab.js("document.querySelector('#hand').alt") == "a dog"

        # What is no picture, and what is stopped.
        (tmp_path / "letters.png").write_text("letters")
        tab.choose_file("#file", tmp_path / "letters.png")
        tab.wait("document.querySelector('#status').textContent.includes('not a picture')")
        tab.js("document.querySelector('#steps').value = 50")
        tab.click("#draw .main")
        tab.wait("document.querySelector('#progress').max === 50")
        tab.click("#stop")
        assert status(tab) == "Stopped" and tab.js("running") is None
        # Nothing sticks out at the side of a narrow window.
        assert tab.js("document.documentElement.scrollWidth") == 400
        assert not tab.problems
        assert {url.rpartition("/")[2] for url in tab.requests} == {"draw", "ask"}
        tab.close()


@pytest.mark.slow
def test_two_tabs_see_the_line_and_a_closed_one_makes_room(browser, tiny_folder):
    with command(tiny_folder) as (process, address):
        tabs = [browser.open(address) for _ in range(2)]
        for tab in tabs:
            # A slow drawing.
            tab.js("document.querySelector('#steps').max = 200")
            tab.js("document.querySelector('#steps').value = 200")
            tab.js("document.querySelector('#prompt').value = 'a dog'")
            tab.js("document.querySelector('#draw').requestSubmit()")
            tab.wait("document.querySelector('#status').textContent.match(/Step|request/)")
        assert status(tabs[1]).startswith("One request comes before this.")
        tabs[0].close()
        tabs[1].wait("document.querySelector('#status').textContent.startsWith('Step')")
        process.send_signal(signal.SIGINT)
        tabs[1].wait("document.querySelector('#status').textContent === 'The server has ended'")
        assert tabs[1].js("document.querySelector('#status').className").endswith("wrong")
        assert process.wait(SECONDS) == 0
        tabs[1].click("#draw .main")
        tabs[1].wait("document.querySelector('#status').textContent === "
                     "'The server does not answer'")
        tabs[1].close()
