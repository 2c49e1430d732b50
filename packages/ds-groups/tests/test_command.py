"""The command: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ds_groups
import pytest
from ds_groups import ParallelTopology, deepspeed, megatron
from ds_groups._rehearse.command import main

MEGATRON = ["--preset", "megatron", "--world", "64", "--tp", "4", "--pp", "2", "--ep", "4", "--ranks-per-node", "8"]
LARGE = ["--preset", "megatron", "--world", "131072", "--tp", "8", "--pp", "16", "--ep", "8", "--ranks-per-node", "8"]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if name.endswith(("RANK", "RANKID", "PROCID", "APP_PE", "TASK_ID"))]:
        monkeypatch.delenv(name)


def test_the_module_needs_no_torch():
    root = str(Path(ds_groups.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); sys.modules['torch'] = None\n"
        f"sys.argv = ['ds-groups', *{LARGE!r}, '--show', 'ep', '--rank', '77']\n"
        "import runpy\n"
        "try: runpy.run_module('ds_groups', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("megatron: 131072 ranks, order tp-cp-ep-dp-pp, 16384 nodes of 8\n")
    assert len(done.stdout.splitlines()) <= 40


def test_at_most_forty_lines(run):
    layout = ["--world", "131072", "--tp", "16", "--cp", "2", "--pp", "4", "--dp-replicate", "4", "--ep", "16"]
    code, out, _ = run(*layout, "--etp", "2", "--ranks-per-node", "8", "--show", "dp", "--rank", "131071")
    assert code == 0
    assert "warning: tp=16 leaves a node of 8 ranks" in out
    assert "  dp_replicate: " in out
    assert 30 < len(out.splitlines()) <= 40


def test_show(run):
    _, out, _ = run(*MEGATRON, "--show", "tp")
    assert "  0 1 2 3\n  4 5 6 7\n" in out
    assert "... 11 more; --all prints them" in out
    _, out, _ = run(*MEGATRON, "--show", "tp", "--all")
    assert out.splitlines()[-1] == "  60 61 62 63"


def test_rank(run):
    _, out, _ = run(*MEGATRON, "--rank", "5")
    topology = megatron(64, tp=4, pp=2, ep=4)
    assert "rank 5: tp 1, cp 0, dp_shard 1" in out
    assert f"  ep: {' '.join(map(str, topology.ranks('ep', 5)))}\n" in out


def test_json(run):
    code, out, err = run(*MEGATRON, "--json", "--rank", "5", "--show", "ep", "--all", "--advise", "--traffic", "ep=1e9")
    assert (code, err) == (0, "")
    data, topology = json.loads(out), megatron(64, tp=4, pp=2, ep=4, ranks_per_node=8)
    traffic = {"ep": 1e9}
    rehearsal = json.loads(json.dumps(topology.rehearse(traffic=traffic).as_dict()))
    assert {key: data[key] for key in rehearsal} == rehearsal
    assert set(data) == {*rehearsal, "preset", "warnings", "rank", "shown", "advice"}
    assert data["rank"]["coordinates"] == topology.coordinates(5)
    assert data["rank"]["groups"]["ep"] == list(topology.ranks("ep", 5))
    assert data["shown"] == {"axis": "ep", "groups": [list(group) for group in topology.groups("ep")]}
    assert data["advice"] == json.loads(json.dumps(topology.advise(traffic).as_dict()))


def test_every_preset_takes_its_flags(run):
    _, out, _ = run("--preset", "deepspeed", "--world", "32", "--tp", "2", "--sp", "2", "--ep", "4", "--hpz", "8",
                    "--experts", "lane_by_lane", "--data-before-expert", "--json")  # fmt: skip
    expected = deepspeed(32, tp=2, sp=2, ep=4, hpz=8, experts="lane_by_lane", data_before_expert=True)
    assert json.loads(out)["layout"] == json.loads(json.dumps(expected.as_dict()))
    _, out, _ = run(
        "--preset", "torchtitan", "--world", "32", "--dp-replicate", "2", "--tp", "4", "--etp", "2", "--json"
    )
    assert json.loads(out)["layout"]["dp_replicate"] == 2
    _, out, _ = run(
        "--world", "32", "--tp", "4", "--order", "dp-tp-cp-pp", "--ep-axes", "tp-cp-dp", "--by-lane", "--json"
    )
    expected = ParallelTopology(32, tp=4, order="dp-tp-cp-pp", ep_axes="tp-cp-dp", by_lane=True)
    assert json.loads(out)["layout"] == json.loads(json.dumps(expected.as_dict()))


def test_advise(run):
    _, out, _ = run(*MEGATRON, "--advise", "--traffic", "tp=4e9", "ep=1e9:ring")
    assert "present order: tp-cp-ep-dp-pp" in out
    assert "ep    4     ring" in out


def test_the_launcher_is_asked(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "48")
    assert run("--tp", "2")[1].startswith("plain: 48 ranks")


def test_axes(run):
    _, out, _ = run(*MEGATRON, "--axes", "dp_cp,mp")
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["dp_cp", "mp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "64", "--tp", "3"], "world size 64 must be a multiple of tp * cp * pp = 3 * 1 * 1 = 3"),
        (["--world", "64", "--hpz", "2"], "--preset plain has no --hpz; it has --tp,"),
        (["--preset", "torchtitan", "--world", "8", "--order", "x"], "--preset torchtitan has no --order"),
        (["--world", "64", "--rank", "64"], "rank 64 is outside the world: 0..63"),
        (["--world", "64", "--show", "xp"], "axis 'xp' is not known"),
        (["--world", "64", "--axes", "xp"], "axis 'xp' is not known"),
        (["--world", "0"], "world_size must be a positive integer, got 0"),
        (["--tp", "2"], "--world is missing"),
        (["--world", "64", "--all"], "--all needs --show"),
        (["--world", "64", "--advise"], "--advise needs --traffic"),
        (["--world", "64", "--advise", "--traffic", "dp=1e9"], "ranks_per_node, such as 8"),
        (["--world", "64", "--traffic", "dp=1e9:tree"], "'ring', 'all-to-all', 'pipeline'"),
    ],
)
def test_refused(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ds-groups: ")
    assert message in err


@pytest.mark.parametrize("arguments", [["--preset", "x"], ["--world", "many"], ["--world", "8", "--traffic", "tp"]])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: ds-groups" in capsys.readouterr().err


def test_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run(*MEGATRON, "--picture", str(tmp_path / "groups.svg"))
    assert code == 0
    assert "<svg" in (tmp_path / "groups.svg").read_text()
    assert run(*MEGATRON, "--picture", str(tmp_path / "no" / "groups.svg"))[0] == 1
    code, _, err = run(*MEGATRON, "--picture", str(tmp_path / "groups.nothing"))
    assert code == 1
    assert "nothing" in err


def test_picture_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(*MEGATRON, "--picture", "groups.png")
    assert (code, out) == (1, "")
    assert "pip install matplotlib" in err
