"""Run a driver, and print what the first scores of its process took beyond importing torch, in CPU seconds.

    python benchmarks/first_scores.py [--more] peer_NAME.py --workload W1 --method METHOD ...

--more: the workload is one of `more.py`, not of the drivers' folder.
Everything after `import torch` counts: importing the library, loading the workload, the first fit and scores. Drivers
time their phases with `common.Meter`, one for each repeat; the first one's last phase ends the first scores.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import torch  # noqa: F401

START = time.process_time()


def main() -> None:
    of_ours = sys.argv[1] == "--more"
    sys.argv = sys.argv[2:] if of_ours else sys.argv[1:]
    driver = sys.argv[0]
    sys.path.append(str(Path(__file__).resolve().parent))
    sys.path[0] = str(Path(driver).resolve().parent)  # as Python would have it
    import common

    if of_ours:
        import more
        import workloads

        workloads.load = more.load

    meters: list = []

    class Ended(common.Meter):
        """One that knows when it last stopped."""

        def __init__(self) -> None:
            super().__init__()
            self.ended = START
            meters.append(self)

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            self.ended = time.process_time()

    common.Meter = Ended
    try:
        runpy.run_path(driver, run_name="__main__")
    finally:
        if meters:
            print("FIRST " + json.dumps(round(meters[0].ended - START, 3)), flush=True)


if __name__ == "__main__":
    main()
