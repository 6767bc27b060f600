"""All of the hostile inputs, and how they end:

    python -m tests.fuzz.run               every area
    python -m tests.fuzz.run weights data  some
"""
import sys
import time

from tests.fuzz.all import AREAS, prepare
from tests.fuzz.harness import bad, run_cases


def main() -> None:
    prepare()
    wrong = []
    for area in sys.argv[1:] or AREAS:
        began = time.time()
        results = run_cases(list(AREAS[area]()))
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in sorted(results.items()))
        print(f"{area}: {counts}; {time.time() - began:.0f} s", flush=True)
        for line in bad(results):
            print(f"    {line}", flush=True)
            wrong.append(line)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
