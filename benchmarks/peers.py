"""Where the peers live: the folder with their drivers, and a Python that has them installed.

The peers are pinned, so that a number quoted from one run can be asked for again. What headwater depends on is the
version in constraints.txt, but for the few that a peer keeps older: pyDVL wants numpy below 2 and numcodecs below .16,
and those want an older pandas, zarr and cvxpy. kronfluence names torchvision among its requirements but never imports
it, and the newest torchvision replaces torch by another build: so kronfluence is installed without its requirements,
and those it uses are named here.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SOURCE = REPO / "src"
OWN_VENV = REPO / ".peers"

KRONFLUENCE = "kronfluence==1.0.1"
KRONFLUENCE_NEEDS = ("accelerate==1.15.0", "einops==0.8.2", "einconv==0.1.0", "opt-einsum==3.4.0", "safetensors")
TORCH = "torch==2.13.0"
OTHERS = (
    *("captum==0.9.0", "pydvl[influence]==0.10.0", "dattri==0.3.0", "traker==0.3.2"),
    *("scikit-learn", "scipy"),  # for the workloads
)
OLDER = {"numpy": "1.26.4", "numcodecs": "0.15.2", "pandas": "3.0.6", "zarr": "3.1.5", "cvxpy": "1.7.5"}


def peerbench_folder(given: str | None = None) -> Path:
    """The folder of the peers' drivers: `given`, else HEADWATER_PEERBENCH, else ../shared/peerbench.

    Errors: SystemExit where that folder holds no drivers.
    """
    folder = Path(given or os.environ.get("HEADWATER_PEERBENCH") or REPO.parent / "shared" / "peerbench").resolve()
    if not (folder / "common.py").is_file():
        raise SystemExit(f"No peer drivers in {folder}: name their folder with --peers or HEADWATER_PEERBENCH.")
    return folder


def peer_python(given: str | None = None) -> str:
    """A Python with the peers installed: `given`, else HEADWATER_PEER_PYTHON, else the one in .peers/, made at need."""
    named = given or os.environ.get("HEADWATER_PEER_PYTHON")
    if named:
        return named
    python, complete = OWN_VENV / "bin" / "python", OWN_VENV / "complete"
    if not complete.is_file() or complete.read_text() != wanted():
        install_peers(python)
        complete.write_text(wanted())
    return str(python)


def requirements() -> list[str]:
    """All that is installed with its own requirements: the peers but kronfluence, and what headwater depends on."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return [TORCH, *OTHERS, *KRONFLUENCE_NEEDS, *project["dependencies"]]


def constraints() -> str:
    """constraints.txt, but for the versions that a peer keeps older."""
    kept = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line.split("==")[0] not in OLDER]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in OLDER.items())]) + "\n"


def wanted() -> str:
    """Everything that decides what .peers/ holds; where it differs from what is noted there, .peers/ is made anew."""
    return "\n".join([KRONFLUENCE, *requirements(), constraints()])


def install_peers(python: Path) -> None:
    """Make .peers/ with the pinned peers and what headwater depends on (headwater itself is read from src/)."""
    print(f"Installing the peers into {OWN_VENV.name}/ ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(OWN_VENV)], check=True)
    (OWN_VENV / ".gitignore").write_text("*\n")
    (OWN_VENV / "constraints.txt").write_text(constraints())
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    pinned = [*pip, "-c", str(OWN_VENV / "constraints.txt")]
    subprocess.run([*pinned, TORCH], check=True)  # first: a later requirement must find the build that is wanted
    subprocess.run([*pinned, *requirements()], check=True)
    subprocess.run([*pip, "--no-deps", KRONFLUENCE], check=True)


def one_thread(peerbench: Path) -> dict[str, str]:
    """The environment of a driver: one thread, headwater from src/, the drivers' folder on the path."""
    ones = dict.fromkeys(("PB_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join([str(SOURCE), str(peerbench)])
    return {**os.environ, **ones, "PYTHONPATH": path, "HEADWATER_PEERBENCH": str(peerbench)}
