"""One model, many who ask: jobs stand in line, one is done at a time, and each tells of itself by
events.

A job's work is a function that returns a generator of events, (name, data). The thread that calls
`Line.run` does the work; other threads put jobs into the line (`enter`), read their events, and
take them out (`leave`) when nobody waits for them any more. Work that has begun ends at its next
event, or wherever it calls `Line.check`.
"""
import contextlib
import queue
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator

from engine.command import message_of

Event = tuple[str, dict]
# The last event of a job is one of these.
LAST = ("done", "error")


class Abandoned(Exception):
    """Nobody waits for what is being done."""


class Full(Exception):
    """There are as many jobs as there may be, or the line is closed."""


class Job:
    """work: () -> events. events: what the work said so far, and the job's place in the line:
    ("queue", {"ahead": n}), ("start", {}), what the work yields, ("note", {"text": t}) for each
    warning if it ends well, then one of LAST."""

    def __init__(self, work: Callable[[], Generator[Event, None, None]]):
        self.work = work
        self.events = queue.SimpleQueue()
        self.ahead = None
        self.abandoned = False

    def tell(self, name: str, **data) -> None:
        self.events.put((name, data))


class Line:
    """most: jobs that may wait."""

    def __init__(self, most: int):
        self.most = most
        self.waiting = deque()
        self.current = None
        self.closed = False
        self.changed = threading.Condition()

    # ------------------------------------------------------------------- for those who ask

    def enter(self, job: Job) -> None:
        with self.changed:
            if self.closed or len(self.waiting) >= self.most:
                raise Full(f"{len(self.waiting)} requests are waiting: try again later")
            self.waiting.append(job)
            self.tell_places()
            self.changed.notify()

    def leave(self, job: Job) -> None:
        with self.changed:
            job.abandoned = True
            if job in self.waiting:
                self.waiting.remove(job)
                self.tell_places()

    def tell_places(self) -> None:
        """To those whose place is new."""
        before = int(self.current is not None)
        for i, job in enumerate(self.waiting, before):
            if job.ahead != i:
                job.ahead = i
                job.tell("queue", ahead=i)

    # ---------------------------------------------------------------- for the one who works

    def run(self) -> None:
        """Does one job after the other until the line is closed. (What ends it in the middle of a
        job, Ctrl-C, leaves that one to `close`.)"""
        while job := self.next():
            self.do(job)
            with self.changed:
                self.current = None

    def next(self) -> Job | None:
        with self.changed:
            # Windows answers Ctrl-C between two waits only.
            while not (self.waiting or self.closed):
                self.changed.wait(0.5)
            if self.closed:
                return None
            self.current = self.waiting.popleft()
            self.current.tell("start")
            self.tell_places()
            return self.current

    def check(self) -> None:
        """Abandoned if the current job is."""
        if self.current is not None and self.current.abandoned:
            raise Abandoned

    def do(self, job: Job) -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with contextlib.closing(job.work()) as events:
                    for name, data in events:
                        self.check()
                        job.tell(name, **data)
            for note in caught:
                job.tell("note", text=str(note.message))
            job.tell("done")
        except Abandoned:
            pass
        except Exception as e:
            message = message_of(e)
            if message is None:
                traceback.print_exc(file=sys.stderr)
                message = "this failed; the server's terminal says why"
            job.tell("error", error=message)

    def close(self) -> None:
        """No more jobs: those who wait are told, and what is being done is to end."""
        with self.changed:
            self.closed = True
            jobs = [*self.waiting, *filter(None, [self.current])]
            self.waiting.clear()
            for job in jobs:
                job.abandoned = True
                job.tell("error", error="the server has ended")
            self.changed.notify_all()
