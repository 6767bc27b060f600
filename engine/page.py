"""The live page: a small web server on Python's own http.server, for one model and many who watch.

    GET /         the page (page.html)
    POST /draw    a request as in engine/live.py -> its events, as they happen (text/event-stream)
    POST /ask     likewise

A connection carries one request and lives as long as its job: who closes the tab takes the job out
of the line, or stops it. The thread that calls `serve` computes; a thread for each connection
reads, checks and writes. No path that is sent is ever opened. Whatever is not as it should be is
refused with a status and {"error": why}.
"""
import base64
import contextlib
import hashlib
import http.server
import io
import ipaddress
import json
import queue
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus

from engine.checks import printable
from engine.command import whole_lines
from engine.explain_html import filled
from engine.files import parse_json
from engine.jobs import LAST, Full, Job, Line
from engine.limits import (
    MAX_PAGE_CONNECTIONS,
    MAX_PAGE_HELD_BYTES,
    MAX_PAGE_READ_SECONDS,
    MAX_PAGE_REQUEST_BYTES,
    MAX_PAGE_WAITING,
    MAX_PAGE_WRITE_SECONDS,
)
from engine.live import Live, stoppable

# How often a connection is asked whether it still stands, and how often it is written to though
# there is nothing to say, in seconds.
LOOK_SECONDS = 0.2
SIGN_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of the first line of a request. (http.server limits the others.)
MAX_LINE = 4096
# To a connection that gets no thread.
TOO_MANY = (b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n\r\n"
            b'{"error": "too many connections: try again later"}')


class Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str, **headers):
        super().__init__(why)
        self.status = status
        self.headers = headers


# ---------------------------------------------------------------------------- whom to answer

def is_own_name(host: str, bound: str) -> bool:
    """Whether a Host header, "name" or "name:port", means this server: a number, localhost, or the
    name that it was given. A foreign page can give its own name our address (DNS rebinding), so
    that a browser takes the page and this server for one; it cannot do so to a number."""
    parts = re.fullmatch(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d{1,5})?", host.lower(), re.ASCII)
    if not parts:
        return False
    name = parts[1].strip("[]")
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("localhost", bound.lower())


def check_host(headers, bound: str) -> None:
    hosts = headers.get_all("Host", [])
    if len(hosts) != 1:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{len(hosts)} Host headers, expected one")
    if not is_own_name(hosts[0], bound):
        raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"this is not {printable(hosts[0])}: "
                      "expected an address, localhost, or the name given by --host")


def check_origin(headers) -> None:
    """Browsers say from which page a request comes; other programs say nothing."""
    for origin in headers.get_all("Origin", []):
        if origin != f"http://{headers['Host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "asked for by another page")
    for site in headers.get_all("Sec-Fetch-Site", []):
        if site not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "asked for by another site")


def body_length(headers) -> int:
    """And that there is a body of JSON, which a form of a foreign page cannot send."""
    if headers.get_content_type() != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                      "expected Content-Type: application/json")
    lengths = headers.get_all("Content-Length", [])
    if "Transfer-Encoding" in headers or not lengths:
        raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected Content-Length")
    if len(lengths) > 1 or not re.fullmatch(r"\d{1,18}", lengths[0], re.ASCII):
        raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length must be one number")
    length = int(lengths[0])
    if length > MAX_PAGE_REQUEST_BYTES:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                      f"{length} bytes, {MAX_PAGE_REQUEST_BYTES} are the limit")
    return length


# ------------------------------------------------------------------------------- connections

class UntilDeadline(io.RawIOBase):
    """What a connection sends within so many seconds in all: who sends a byte a second does not
    hold a thread."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection = connection
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        rest = self.deadline - time.monotonic()
        if rest <= 0:
            raise TimeoutError
        self.connection.settimeout(rest)
        return self.connection.recv_into(buffer)


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(MAX_PAGE_WRITE_SECONDS)


class Budget:
    """Bytes that all requests together may hold."""

    def __init__(self, most: int):
        self.left = most
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, n: int):
        with self.lock:
            if n > self.left:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE,
                              "too many pictures are waiting: try again later")
            self.left -= n
        try:
            yield
        finally:
            with self.lock:
                self.left += n


def event(name: str, data: dict) -> bytes:
    """In the format of server-sent events. (JSON has no line breaks.)"""
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


class Connection(http.server.BaseHTTPRequestHandler):
    """One request and its answer."""
    # What does not say its version is answered with a head, too.
    default_request_version = request_version = "HTTP/1.0"

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(UntilDeadline(self.connection, MAX_PAGE_READ_SECONDS))

    def handle(self):
        try:
            self.raw_requestline = self.rfile.readline(MAX_LINE + 1)
            if self.raw_requestline:
                self.answer()
        except Refused as e:
            self.refuse(e)
        except TimeoutError:
            self.refuse(Refused(HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive in time"))

    def answer(self):
        if len(self.raw_requestline) > MAX_LINE:
            raise Refused(HTTPStatus.REQUEST_URI_TOO_LONG, "the address is too long")
        if not self.parse_request():
            raise Refused(HTTPStatus.BAD_REQUEST, "the request is empty")
        check_host(self.headers, self.server.bound)
        methods = self.server.routes.get(self.path)
        if methods is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {printable(self.path)}")
        if self.command not in methods:
            allowed = ", ".join(methods)
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"expected {allowed}", Allow=allowed)
        methods[self.command](self)

    def send_page(self):
        content, policy = self.server.page
        self.send_head(HTTPStatus.OK, "text/html; charset=utf-8", len(content),
                       **{"Content-Security-Policy": policy})
        self.wfile.write(content)

    def do_job(self):
        check_origin(self.headers)
        length = body_length(self.headers)
        with self.server.budget.taken(length):
            work = self.read_work(length)
            job = Job(work)
            try:
                self.server.line.enter(job)
            except Full as e:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(e)) from None
            try:
                self.send_head(HTTPStatus.OK, "text/event-stream")
                self.send_events(job)
            # Too slow to take what is sent is the same as gone.
            except TimeoutError:
                pass
            finally:
                self.server.line.leave(job)

    def read_work(self, length: int) -> Callable:
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{len(body)} bytes instead of {length}")
        try:
            return self.server.live.work(self.path, parse_json(body.decode(), "the request"))
        except ValueError as e:
            raise Refused(HTTPStatus.BAD_REQUEST, whole_lines(e)) from None

    def send_events(self, job: Job):
        signed = time.monotonic()
        while True:
            try:
                name, data = job.events.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if has_left(self.connection):
                    return
                if time.monotonic() - signed > SIGN_SECONDS:
                    # A comment.
                    self.wfile.write(b":\n\n")
                    signed = time.monotonic()
                continue
            self.wfile.write(event(name, data))
            if name in LAST:
                return

    # ------------------------------------------------------------------------ how it is said

    def send_head(self, status: HTTPStatus, kind: str, length: int | None = None, **headers):
        self.connection.settimeout(MAX_PAGE_WRITE_SECONDS)
        self.send_response(status)
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "Connection": "close",
                   "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                   "Cross-Origin-Resource-Policy": "same-origin"} | headers
        if length is not None:
            headers["Content-Length"] = length
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def refuse(self, why: Refused):
        content = json.dumps(dict(error=str(why))).encode()
        self.send_head(why.status, "application/json", len(content), **why.headers)
        self.wfile.write(content)
        self.drain()

    def drain(self):
        """What still comes is read for a second: to close at once would take back the answer."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = UntilDeadline(self.connection, 1)
            while rest.readinto(bytearray(1 << 16)):
                pass

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals, in our words."""
        raise Refused(HTTPStatus(code), printable(message or HTTPStatus(code).phrase))

    def version_string(self):
        return "TBAC"

    def log_request(self, *_):
        """The terminal stays quiet."""


class Server(socketserver.ThreadingTCPServer):
    """bound: the name or address that it was given."""
    allow_reuse_address = True
    request_queue_size = MAX_PAGE_CONNECTIONS

    def __init__(self, live: Live, line: Line, host: str, port: int):
        self.live = live
        self.line = line
        self.bound = host
        self.page = page_of(live)
        self.budget = Budget(MAX_PAGE_HELD_BYTES)
        self.connections = set()
        self.routes = {"/": {"GET": Connection.send_page}}
        self.routes |= {path: {"POST": Connection.do_job} for path in live.actions}
        try:
            self.address_family, _, _, _, place = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM)[0]
            super().__init__(place, Connection)
        except (OSError, UnicodeError) as e:
            why = getattr(e, "strerror", None) or e
            raise ValueError(f"--host {printable(host)} --port {port}: {why}") from None

    @property
    def address(self) -> str:
        name = f"[{self.bound}]" if ":" in self.bound else self.bound
        return f"http://{name}:{self.server_address[1]}"

    def process_request(self, request, client_address):
        if len(self.connections) >= MAX_PAGE_CONNECTIONS:
            with contextlib.suppress(OSError):
                request.sendall(TOO_MANY)
            self.shutdown_request(request)
            return
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A connection that breaks is nobody's fault."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self):
        """First no connection is read from any more; who does not take in time what is written is
        cut off."""
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(how)
            deadline = time.monotonic() + 1
            while self.connections and time.monotonic() < deadline:
                time.sleep(0.02)
        super().server_close()


def page_of(live: Live) -> tuple[bytes, str]:
    """page.html with what it has to know; and what it may do: run its own script and talk to this
    server."""
    text = filled("page.html", live.about())
    script, = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = ("default-src 'none'; img-src data: blob:; connect-src 'self'; "
              f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return text.encode(), policy


# ------------------------------------------------------------------------------------- serving

@contextlib.contextmanager
def serving(live: Live, host: str, port: int) -> Iterator[tuple[Server, Line]]:
    """A server that accepts requests, and the line of their jobs, which somebody has to do. At the
    end nothing of it is left."""
    line = Line(MAX_PAGE_WAITING)
    with stoppable(live.model, line.check), Server(live, line, host, port) as server:
        accepting = threading.Thread(target=server.serve_forever, args=(0.1,))
        accepting.start()
        try:
            yield server, line
        finally:
            line.close()
            server.shutdown()
            accepting.join()


def stop_once(*_) -> None:
    """To end takes some seconds, and is not to be interrupted."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def serve(live: Live, host: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    for number in SIGNALS:
        signal.signal(number, stop_once)
    with contextlib.suppress(KeyboardInterrupt), serving(live, host, port) as (server, line):
        print(f"{server.address}    (Ctrl-C ends it)", flush=True)
        line.run()
    print("ended", file=sys.stderr)
