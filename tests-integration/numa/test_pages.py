"""The guide of ds-numa is a program, the page of machines is what its tool writes, and pictures can be drawn."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ds_numa import NumaError, Topology, plan_binding
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "numa.md"
MACHINES = sorted((ROOT / "packages" / "ds-numa" / "tests" / "machines").glob("*.json"))


def test_the_guide_prints_what_stands_below_its_programs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for code, printed in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(GUIDE), "exec"), names)
        assert out.getvalue() == printed


def test_the_page_of_machines_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "draw_machines.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["g4dnmetal", "eas-tioga", "coral-butte-hwloc1", "knl-quad-flat-hwloc1"])
def test_a_picture_shows_every_core_and_rank(name: str, tmp_path: Path) -> None:
    path = next(path for path in MACHINES if path.stem == name)
    machine = Topology.from_dict(json.loads(path.read_text()))
    plan = plan_binding(machine, 4, devices=None)
    figure = machine.plot(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5_000
    texts = [text.get_text() for text in figure.axes[0].texts]
    for rank, binding in enumerate(plan.bindings):
        assert texts.count(str(rank)) == binding.num_cores
    assert sum(text.startswith("GPU ") for text in texts) == len(machine.gpus)
    assert sum(text.startswith("node ") for text in texts) == len(machine.nodes)


def test_a_picture_without_a_plan() -> None:
    figure = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}}, "allowed": "0-2"}).plot()
    assert figure.axes[0].texts[0].get_text() == "4 cores, 4 CPUs, grey: not allowed"


def test_a_file_whose_ending_is_no_format_is_named(tmp_path: Path) -> None:
    machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}}})
    for name in ("plan.xyz", "plan"):
        with pytest.raises(NumaError, match=rf"path = .*{name}' ends in .*: end it in one of .*png"):
            machine.plot(path=tmp_path / name)
    machine.plot(path=tmp_path / "PLAN.PNG")
    command = [sys.executable, "-m", "ds_numa", "show", "--plot", str(tmp_path / "no" / "folder.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_no_text_of_a_picture_leaves_its_box_or_meets_another(path: Path) -> None:
    machine = Topology.from_dict(json.loads(path.read_text()))
    figure = machine.plot(plan_binding(machine, min(8, len(machine.allowed)), devices=None))
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1 + 1
    for i, box in enumerate(boxes):
        assert not [other for other in boxes[i + 1 :] if box.overlaps(other)], axes.texts[i].get_text()
