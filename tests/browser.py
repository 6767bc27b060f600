"""A real browser for tests: headless Chromium, driven by its DevTools protocol over a pipe.

    with Browser() as browser:
        page = browser.open("file:///...", width=400, dark=True)
        page.click("#draw")
        page.wait("document.querySelector('img').complete")
        page.screenshot("page.png")
        assert not page.problems and not page.requests

Chromium is Debian's package `chromium`; where there is none, the fixture `browser` skips. The
standard library is enough: with --remote-debugging-pipe Chromium reads its orders from file 3 and
writes answers and events to file 4, each a JSON text that a zero byte ends.
"""
import base64
import json
import pathlib
import select
import shutil
import subprocess
import tempfile
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# A cold start on a busy machine takes long.
SECONDS = 60

# A sandbox within a container needs rights that it rarely has. What is opened here is our own.
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--hide-scrollbars", "--remote-debugging-pipe")

# name -> (code, what it types), as keyboards have them
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " "), "End": (35, ""),
        "Home": (36, ""), "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""),
        "ArrowDown": (40, "")}


def program():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Files 0 and 1 are the pipes that Python makes; Chromium wants them as 3 and 4.
        command = 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'
        self.process = subprocess.Popen(
            ["sh", "-c", command, "sh", program(), *SWITCHES, f"--user-data-dir={self.folder.name}",
             "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.unread = b""
        self.last_id = 0
        self.pages = {}
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.folder.cleanup()

    def call(self, method, session=None, **params):
        """Gives an order and waits for its answer; events that come before it go to their page."""
        self.last_id += 1
        message = dict(id=self.last_id, method=method, params=params)
        if session:
            message["sessionId"] = session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self.receive(deadline)
            if answer is None:
                raise TimeoutError(f"no answer to {method} in {SECONDS} s")
            if answer.get("id") == self.last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self, deadline):
        """The next message, or None at the deadline. An event has been seen by its page by then."""
        while b"\0" not in self.unread:
            rest = deadline - time.monotonic()
            if rest <= 0 or not select.select([self.process.stdout], [], [], rest)[0]:
                return None
            read = self.process.stdout.read(1 << 20)
            assert read, "the browser has ended"
            self.unread += read
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        page = self.pages.get(message.get("sessionId"))
        if page and "method" in message:
            page.see(message["method"], message["params"])
        return message

    def open(self, url, width=1000, height=800, dark=False):
        """A new page, loaded. dark: what the user prefers."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.pages[session] = page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=str(url))
        page.wait("document.readyState == 'complete' && location.href != 'about:blank'")
        return page


class Page:
    """problems: what the console holds that should not be there: errors, warnings, exceptions,
    and files that did not load. requests: the addresses that it asked for, its own left out."""

    def __init__(self, browser, session, target):
        self.browser = browser
        self.session = session
        self.target = target
        self.problems = []
        self.requests = []

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def see(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str([arg.get("value") for arg in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url', '')}")
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if params.get("type") != "Document" and not url.startswith(("data:", "blob:")):
                self.requests.append(url)

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def js(self, expression):
        """The value of an expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression, seconds=SECONDS):
        """Until it is true."""
        deadline = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {expression}"
            self.browser.receive(time.monotonic() + 0.05)

    def centre(self, selector):
        """Where an element is, scrolled into view."""
        place = self.js(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            if (!element) return null;
            element.scrollIntoView({{block: "center", inline: "center", behavior: "instant"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        assert place, f"there is no {selector}"
        return dict(x=place[0], y=place[1])

    def hover(self, selector):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.centre(selector))

    def click(self, selector):
        place = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text):
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key, times=1):
        """A key of KEYS."""
        code, text = KEYS[key]
        more = dict(key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=code)
        for _ in range(times):
            typed = dict(text=text) if text else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **more, **typed)
            self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def choose_file(self, selector, *files):
        """As if a person had chosen these files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, file, whole=True):
        """As a PNG. whole: the whole page, not only what is in view."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        pathlib.Path(file).write_bytes(base64.b64decode(picture))

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]
