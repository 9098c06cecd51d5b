"""The first scores of a process: what they cost beyond importing the framework, and what the next ones cost.

    python benchmarks/first.py [--rounds 3] [--against FOLDER] [--jobs torch.graddot ...] [--json FILE]
    python benchmarks/first.py --profile torch.ekfac       # where the first scores' time goes
    python benchmarks/first.py --imports torch.ekfac       # which modules are imported, and how long they take

A digits-like MLP, 64-256-256-10, 200 train rows in batches of 32, 20 queries; float32, one thread, CPU seconds. Each
job runs in a fresh process: it imports the framework, takes the CPU time, then makes an influence, fits it and
attributes ("first"), and does the last two again ("next", the median of five). Processes take turns (A B C, A B C,
...), and figures are medians over rounds. `--against` names the `src` folder of another version, which is measured in
the same rounds.

Bytecode is kept in a folder of its own, as an installed package has it, and a process that is not counted fills it.
With `jax`, "compiled" is how many programs XLA compiled for the first scores, those of the parameters included;
"+cache" finds them in a folder where another process left them (`headwater.jax.compilation_cache`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "src"
METHODS = {"graddot": "GradDot()", "ekfac": "Ekfac()", "ekfac_sampled": "Ekfac(fisher='sampled')", "cg": "Cg()"}
JOBS = ["torch.graddot", "torch.ekfac", "torch.ekfac_sampled", "jax.graddot", "jax.ekfac", "jax.ekfac+cache"]

WORK = """
import json, sys, time
framework, method, profile, kept = sys.argv[1:5]
clock = time.process_time
import numpy as np
if framework == "torch":
    import torch
else:
    import jax
    import jax.numpy as jnp
    import logging
    class Count(logging.Handler):
        n = 0
        def emit(self, record):
            Count.n += "Finished XLA compilation" in record.getMessage()
    jax.config.update("jax_log_compiles", True)
    for name in ("jax._src.dispatch", "jax._src.interpreters.pxla"):
        logging.getLogger(name).handlers = [Count()]
        logging.getLogger(name).propagate = False
imported = clock()
if profile:
    import cProfile, pstats
    profiler = cProfile.Profile(clock)
    profiler.enable()
import headwater as hw
if kept:
    from headwater.jax import compilation_cache
    cache = compilation_cache(kept)
    cache.__enter__()
random = np.random.RandomState(0)
sizes = (64, 256, 256, 10)
weights = [random.randn(o, i).astype("float32") / i**0.5 for i, o in zip(sizes, sizes[1:])]
x, y = random.randn(200, 64).astype("float32"), random.randint(0, 10, 200)
if framework == "torch":
    layers = []
    for w in weights:
        layer = torch.nn.Linear(w.shape[1], w.shape[0])
        layer.load_state_dict({"weight": torch.as_tensor(w), "bias": torch.zeros(len(w))})
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).eval()
    x, y = torch.as_tensor(x), torch.as_tensor(y)
else:
    params = {f"layer{k}": {"w": jnp.asarray(w.T), "b": jnp.zeros(len(w))} for k, w in enumerate(weights)}
    def apply(params, x):
        for k in range(3):
            x = x @ params[f"layer{k}"]["w"] + params[f"layer{k}"]["b"]
            x = x if k == 2 else jax.nn.relu(x)
        return x
    model = apply, params
train = [(x[k : k + 32], y[k : k + 32]) for k in range(0, 200, 32)]
query = [(x[:20], y[:20])]
ready = clock()
influence = hw.Influence(model, "cross_entropy", eval("hw." + method))
def scores():
    influence.fit(train)
    return np.asarray(influence.attribute(query, train))
found = scores()
first = clock() - imported
if profile:
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stderr).sort_stats(profile).print_stats(50)
compiled = Count.n if framework == "jax" else 0
after = []
for _ in range(5):
    start = clock()
    scores()
    after.append(clock() - start)
heavy = sorted({"sympy", "torch._dynamo", "zarr", "pandas", "scipy", "rich", "numpy.random"} & set(sys.modules))
print(json.dumps({"import": imported, "first": first, "next": sorted(after)[2], "compiled": compiled, "again":
    Count.n - compiled if framework == "jax" else 0, "sum": float(np.abs(found).sum()), "heavy": heavy}))
"""


def environment(source: Path, cache: Path) -> dict[str, str]:
    one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    found = {**os.environ, **one, "PYTHONPATH": str(source), "PYTHONPYCACHEPREFIX": str(cache)}
    found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def command(job: str, cache: Path, profile: str = "", python: tuple[str, ...] = ()) -> list[str]:
    framework, _, method = job.partition(".")
    method, _, kept = method.partition("+")
    folder = str(cache / "compiled") if kept else ""
    return [sys.executable, *python, "-c", WORK, framework, METHODS[method], profile, folder]


def run(job: str, source: Path, cache: Path, profile: str = "") -> Any:
    done = subprocess.run(command(job, cache, profile), env=environment(source, cache), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job}: {done.stderr[-3000:]}")
    if profile:
        print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def imports(job: str, source: Path, cache: Path) -> None:
    framework = job.partition(".")[0]
    asked = command(job, cache, python=("-X", "importtime"))
    done = subprocess.run(asked, env=environment(source, cache), capture_output=True, text=True, check=True)
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    own = [(int(line[0]), line[2].strip()) for line in lines[1:]]
    # What comes with the framework is not ours: what follows its own line is.
    ours = own[max(k for k, (_, name) in enumerate(own) if name == framework) + 1 :]
    print(f"{len(ours)} modules after {framework}, {sum(t for t, _ in ours) / 1e6:.3f} s")
    for time, name in sorted(ours, reverse=True)[:40]:
        print(f"{time / 1e3:8.1f} ms  {name}")


def table(found: dict[tuple[str, str], list[dict[str, Any]]], reference: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (job, version), runs in found.items():
        row: dict[str, Any] = {"job": job, "version": version}
        for name in ("import", "first", "next", "compiled", "again"):
            row[name] = round(statistics.median(each[name] for each in runs), 4)
        row["sum"], row["heavy"] = runs[0]["sum"], " ".join(runs[0]["heavy"])
        row["against torch"] = ""
        other = found.get((job.replace("jax.", "torch.").partition("+")[0], version))
        if job.startswith("jax.") and other:
            pairs = list(zip(runs, other, strict=True))
            ratios = [statistics.median(a[name] / b[name] for a, b in pairs) for name in ("first", "next")]
            row["against torch"] = f"{ratios[0]:.1f}x; {ratios[1]:.1f}x"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--profile", metavar="JOB")
    parser.add_argument("--sort", default="tottime")
    parser.add_argument("--imports", metavar="JOB")
    parser.add_argument("--cache", type=Path, help="a folder for bytecode that stays")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = {"now": SOURCE} | ({"against": options.against} if options.against else {})
    with tempfile.TemporaryDirectory() as made:
        folder = options.cache or Path(made)
        if options.profile or options.imports:
            job = options.profile or options.imports
            run(job, SOURCE, folder)
            if options.imports:
                imports(job, SOURCE, folder)
            else:
                run(job, SOURCE, folder, profile=options.sort)
            return
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds + 1):
            for job in options.jobs:
                for version, source in versions.items():
                    result = run(job, source, folder / version)
                    if number:  # the first round fills the bytecode
                        found.setdefault((job, version), []).append(result)
    rows = table(found, "torch")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
