"""The growth of costs: exponents of known laws are found, and the whole runs on small sizes."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth():
    sys.path.insert(0, str(FOLDER))
    import growth

    yield growth
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_a_power_is_found_behind_a_constant_cost(growth, power):
    sizes = (1, 10, 1000, 10_000, 100_000)
    assert growth.exponent(sizes, [1e-3 + 1e-4 * size**power for size in sizes]) == pytest.approx(power, abs=0.02)


def test_each_axis_doubles_one_size_and_is_told_in_one_line(growth):
    found = [growth.measure("positions", "graddot", 1, 16), *growth.measure_top(1, 1000)]
    assert found[0]["sizes"] == (1, 1, 2, 4, 8)
    assert len(growth.table(found).splitlines()) == 2 + 3
    assert all(cost > 0 for row in found for cost in row["seconds"])
