"""The plot of the growth benchmark: whole decades, every point within its panel, well-formed."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "growth_plot.py"


@pytest.fixture(scope="module")
def plot() -> Any:
    spec = importlib.util.spec_from_file_location("growth_plot", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growth_plot"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_point_lies_within_its_panel(plot: Any) -> None:
    curve = plot.Curve("a < b", [(1, 80.0), (250, 95.0)])
    root = ET.fromstring(plot.drawn([plot.Panel("x", "y & z", [curve]), plot.Panel("x", "y", [curve])]))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert plot.LEFT <= x <= plot.WIDTH and plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM


def test_a_scale_has_whole_decades_and_runs_from_begin_to_end(plot: Any) -> None:
    scale = plot.Scale.over([3.0, 250.0], 10.0, 110.0)
    assert scale.ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert scale.at(1.0) == 10.0 and scale.at(1000.0) == 110.0 and scale.at(10.0) == pytest.approx(10.0 + 100 / 3)
    assert plot.Scale.over([100.0], 0.0, 1.0).ticks() == [100.0, 1000.0]
