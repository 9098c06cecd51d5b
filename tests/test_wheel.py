"""What is built from the repository installs into an empty environment, and does what its extras promise.

The slow tests install from a package index: by uv, as ./dev slow has it, or else by pip; each with its own settings.
"""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "headwater"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
UV = shutil.which("uv")


def call(*command, folder=None, status=0):
    """Standard output and error of a command that ends with this status."""
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_no_file_of_the_package_is_left_out_as_ignored():
    """What .gitignore names is not built into the wheel."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} - {"__pycache__"}
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts]
    assert Path("py.typed") in files
    assert not [path for path in files if ignored & set(path.parts)]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel, made of the source distribution, and that."""
    folder = tmp_path_factory.mktemp("built")
    builder = [UV, "build"] if UV else [sys.executable, "-m", "build"]
    if not UV and subprocess.run([*builder, "--version"], capture_output=True).returncode:
        pytest.skip("nothing here builds: neither uv nor build is installed")
    call(*builder, ROOT, *(("--out-dir", folder) if UV else ("--outdir", folder)))
    return folder / f"headwater-{VERSION}-py3-none-any.whl", folder / f"headwater-{VERSION}.tar.gz"


@pytest.mark.slow
def test_the_wheel_is_the_package_whole_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"headwater-{VERSION}.dist-info/METADATA").decode()
    ours = {f"headwater/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == {n for n in ours if "__pycache__" not in n}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "Project-URL: Issues, https://" in metadata and "Author: The headwater maintainers" in metadata
    assert "](docs/" not in metadata and "/docs/guide.md#jobs)" in metadata


@pytest.mark.slow
def test_the_source_distribution_has_tests_pages_and_tools(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"dev", "constraints.txt", "README.md", "tests/conftest.py", "docs/guide.md", "LICENSE"} <= names


@pytest.fixture
def installed(built, tmp_path):
    """Installs the wheel with extras into an empty environment, and gives the folder of its programs."""

    def install(*extras):
        place, wanted = tmp_path / "empty", f"{built[0]}[{','.join(extras)}]" if extras else built[0]
        constraints = ("-c", ROOT / "constraints.txt")
        if UV:
            call(UV, "venv", "--quiet", "--python", sys.executable, place)
            call(UV, "pip", "install", "--quiet", "--python", place / "bin" / "python", *constraints, wanted)
        else:
            call(sys.executable, "-m", "venv", place)
            call(place / "bin" / "python", "-m", "pip", "install", "-q", *constraints, wanted)
        return place / "bin"

    return install


@pytest.mark.slow
def test_alone_it_reads_shows_and_names_what_is_missing(installed, tmp_path):
    programs = installed()
    headwater = programs / "headwater"
    call(programs / "python", "-W", "error", "-c", "import headwater as hw; hw.Ekfac(); hw.Scores; hw.TopK")
    assert "Your own job" in call(headwater, "--help")
    assert VERSION in call(programs / "python", "-m", "headwater", "version")
    said = call(headwater, "init", folder=tmp_path)
    assert "pip install 'headwater[sklearn]'" in said and "Wrote job.toml" in said
    assert call(headwater, "info", "job.toml", folder=tmp_path, status=2).count("\n") == 1
    said = call(headwater, "top", "job.toml", folder=tmp_path, status=2)
    assert "pip install 'headwater[sklearn]'" in said and said.count("\n") == 1
    assert "pip install 'headwater[demo]'" in call(headwater, "demo", folder=tmp_path, status=2)
    for verb, extra in (("scores.to_parquet('s.parquet')", "tables"), ("scores.plot_top(0)", "plot")):
        assert f"pip install 'headwater[{extra}]'" in call(programs / "python", "-c", HELD + verb, status=1)


SKLEARN = """
import headwater as hw
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from headwater.sklearn import TrainingInfluence
x, y = load_iris(return_X_y=True)
fitted = TrainingInfluence(LogisticRegression(max_iter=500).fit(x, y)).fit(x, y)
assert fitted.leave_one_out(x[:2], y[:2]).shape == (2, 150)
"""
TORCH = """
import torch, headwater as hw
from headwater.torch import TorchComposableInfluence
batches = [(torch.randn(20, 3), torch.arange(20) % 2)]
made = TorchComposableInfluence(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), hw.Ekfac()).fit(batches)
assert made.attribute(batches, batches).shape == (20, 20)
"""
JAX = """
import jax.numpy as jnp, numpy as np, headwater as hw
from headwater.jax import JaxComposableInfluence, cross_entropy
x, y = np.random.default_rng(0).normal(size=(20, 3)).astype("float32"), np.arange(20) % 2
made = JaxComposableInfluence(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, cross_entropy, hw.Kfac()).fit([(x, y)])
assert made.attribute([(x, y)], [(x, y)]).shape == (20, 20)
"""
HF = """
import headwater as hw
from transformers import GPT2Config, GPT2LMHeadModel
from headwater.hf import HfComposableInfluence
model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
rows = [{"input_ids": [k % 7 + 1, 5, k % 3 + 9, 2]} for k in range(12)]
assert HfComposableInfluence(model, hw.Ekfac()).fit(rows).attribute(rows, rows[:2]).shape == (2, 12)
"""
DEMO = "from pathlib import Path; from headwater.demo import run; print(run('table', Path('found'), Path('page.html')))"
HELD = "import numpy as np, headwater as hw; scores = hw.Scores(np.eye(3), np.arange(3), np.arange(3)); "
TABLES = HELD + "assert len(scores.to_pandas()) == 3; scores.to_parquet('s.parquet')"
PLOT = HELD + "import matplotlib; matplotlib.use('agg'); scores.plot_top(0)"
SMOKE = {
    "sklearn": SKLEARN,
    "torch": TORCH,
    "jax": JAX,
    "hf": HF,
    "demo": DEMO,
    "demo-text": DEMO.replace("table", "text"),
    "tables": TABLES,
    "plot": PLOT,
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", SMOKE)
def test_each_extra_is_enough_for_what_it_is_for(extra, installed, tmp_path):
    call(installed(extra) / "python", "-c", SMOKE[extra], folder=tmp_path)
