from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ds_numa import Topology, plan_binding
from ds_numa._cli import main

BOX = {
    "nodes": {
        "0": {"cpus": "0-3", "memory_bytes": 64 << 30},
        "1": {"cpus": "4-7", "memory_bytes": 64 << 30},
        "2": {"kind": "gpu", "memory_bytes": 96 << 30},
    },
    "allowed": "0-6",
    "allowed_memory": "0-1",
    "gpus": [
        {"pci": "0000:17:00.0", "node": 1, "uuid": "GPU-1", "model": "H200"},
        {"pci": "0000:c1:00.0", "uuid": "GPU-2", "model": "H200"},
    ],
}


@pytest.fixture
def box(tmp_path: Path) -> str:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(BOX))
    return str(path)


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ds_numa", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def test_show(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--topology", box]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 nodes, 8 cores, 8 CPUs; allowed: CPUs 0-6"
    assert "node 2: memory of a GPU, 96.0 GiB (memory not allowed)" in lines
    assert "  GPU 0: 0000:17:00.0, H200" in lines


def test_a_folder_with_copies_of_sys_is_read(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = machine("0-3", nodes={0: "0-1", 1: "2-3"})
    assert main(["plan", "--ranks", "2", "--brief", "--topology", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("rank 0: CPUs 0-1 (2 cores, node 0)")


def test_show_this_machine_and_read_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    assert "memory policy: " in capsys.readouterr().out
    assert main(["show", "--json"]) == 0
    text = capsys.readouterr().out
    assert Topology.from_dict(json.loads(text)) == Topology.here()
    path = tmp_path / "here.json"
    path.write_text(text)
    assert main(["plan", "--ranks", "1", "--topology", str(path)]) == 0


def test_plan(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [
        "rank 0: CPUs 0-3 (4 cores, node 0); memory: preferred node 0",
        "rank 1: CPUs 4-6 (3 cores, node 1); memory: preferred node 1",
    ]
    assert main(["plan", "--ranks", "2", "--devices", "none", "--topology", box]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("rank")] == ranks
    assert [line.split()[1] for line in lines if line.startswith("  cores")] == ["0000", "111x"]
    assert main(["plan", "--ranks", "2", "--devices", "none", "--topology", box, "--brief"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ranks


@pytest.mark.parametrize("options", [{"mode": "node"}, {"mode": "cores", "reserve": 2}, {"memory": "interleave"}])
def test_every_choice_reaches_the_plan(box: str, capsys: pytest.CaptureFixture[str], options: dict[str, Any]) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["plan", "--ranks", "2", "--json", "--topology", box, *words]) == 0
    assert json.loads(capsys.readouterr().out) == plan_binding(Topology.from_dict(BOX), 2, **options).to_dict()


def test_plan_as_json(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "2", "--json", "--topology", box, "--cores", "4-6,0", "--memory", "bind"]) == 0
    expected = plan_binding(
        Topology.from_dict(BOX), 2, cores="4-6,0", memory="bind", gpus=["0000:17:00.0", "0000:c1:00.0"]
    )
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_plan_as_numactl(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "2", "--numactl", "--memory", "bind", "--gpus", "none", "--topology", box]) == 0
    assert capsys.readouterr().out.splitlines() == ["numactl -m 0 -C 0-3", "numactl -m 1 -C 4-6"]


def test_plan_names_gpus_it_had_to_leave_out(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "3", "--topology", box]) == 0
    assert "2" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--ranks", "2", "--cores", "3-1"], "cores = '3-1': '3-1' runs backwards"),
        (["plan", "--ranks", "99", "--gpus", "none"], "num_local_procs = 99 ranks need 99 CPUs"),
        (["plan", "--ranks", "0"], "num_local_procs = 0"),
        (["plan", "--ranks", "2", "--gpus", "x,y"], "pci = 'x' is not a PCI address"),
    ],
)
def test_what_cannot_be_met_exits_1(
    box: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--topology", box]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(f"ds-numa: {message}")


def test_a_description_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "absent.json"):
        assert main(["show", "--topology", str(tmp_path / name)]) == 1
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["plan"], ["plan", "--ranks", "x"], ["dance"], ["show", "--what"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ds-numa" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["show", "--help"], ["plan", "--help"], ["run", "--help"], ["doctor", "--help"]]
)
def test_help_fits_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


def test_run_without_a_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ranks", "1"]) == 2
    assert "no command" in capsys.readouterr().err


MASK = "import os; print(sorted(os.sched_getaffinity(0)), os.environ.get('OMP_NUM_THREADS'))"
needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)


@needs_two
@pytest.mark.parametrize("rank", [0, 1])
def test_run_binds_and_becomes_the_program(rank: int) -> None:
    expected = plan_binding(Topology.here(), 2)[rank]
    done = call(
        *("run", "--set-omp", "--", sys.executable, "-c", MASK),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.strip() == f"{list(expected.cpus)} {expected.omp_num_threads}", done.stderr
    assert done.stderr.startswith(f"ds-numa: local rank {rank}: bound to CPUs ")


@needs_two
def test_a_script_that_binds_inside_run_keeps_its_share() -> None:
    code = "import os, ds_numa; r = ds_numa.bind(); print(sorted(os.sched_getaffinity(0)) == list(r.cpus), len(r.cpus))"
    done = call("run", "--quiet", "--", sys.executable, "-c", code, LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    assert done.stdout.split() == ["True", str(len(plan_binding(Topology.here(), 2)[0].cpus))]
    assert done.stderr == ""


def test_run_passes_arguments_and_the_exit_code_on() -> None:
    done = call(
        "run", "--", sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(5)", "--ranks", "--", "-x"
    )
    assert (done.returncode, done.stdout.strip()) == (5, "['--ranks', '--', '-x']")
    assert "nothing to bind" in done.stderr


def test_run_of_what_cannot_be_started(tmp_path: Path) -> None:
    assert call("run", "--", "no-such-program-here").returncode == 127
    (tmp_path / "plain.txt").write_text("no program")
    done = call("run", "--", str(tmp_path / "plain.txt"))
    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def test_strict_does_not_start_the_program() -> None:
    done = call("run", "--strict", "--rank", "0", "--ranks", "4096", "--", sys.executable, "-c", "print('started')")
    assert (done.returncode, done.stdout) == (3, "")
    assert "4096 ranks need 4096 CPUs" in done.stderr
    done = call("run", "--quiet", "--rank", "0", "--ranks", "4096", "--", sys.executable, "-c", "print('started')")
    assert (done.returncode, done.stdout.strip()) == (0, "started")
    assert "4096 ranks need 4096 CPUs" in done.stderr


def test_half_an_environment_runs_unbound_unless_strict() -> None:
    program = (sys.executable, "-c", "print('started')")
    done = call("run", "--", *program, LOCAL_RANK="0")
    assert (done.returncode, done.stdout.strip()) == (0, "started")
    assert "does not say how many ranks this machine has (LOCAL_WORLD_SIZE unset" in done.stderr
    done = call("run", "--strict", "--", *program, LOCAL_RANK="0")
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a list and no nodes"),
        ('{"topology": {}, "l3": []}', "holds the keys l3, topology and no nodes"),
        ('{"nodes": {"0": {"cpus": 3}}}', "data is no description of a machine"),
        ('{"nodes": {"0": {"cpus": "0-3"}}, "allowed": "9"}', "CPUs 9, which are in no core"),
    ],
)
@pytest.mark.parametrize("command", [["show"], ["plan", "--ranks", "1"], ["run", "--", "true"], ["doctor"]])
def test_a_file_that_describes_no_machine_is_named(
    command: list[str], text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert main([command[0], "--topology", str(path), *command[1:]]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(f"ds-numa: --topology = '{path}'")
    assert message in written.err


def test_a_folder_without_a_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--topology", str(tmp_path)]) == 1
    assert f"--topology = '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize("words", [["show"], ["show", "--json"], ["plan", "--ranks", "1"]])
def test_output_that_cannot_be_written_is_no_traceback(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ds_numa", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"nodes": {str(i): {"cpus": f"{8 * i}-{8 * i + 7}"} for i in range(4000)}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "ds_numa", "show", "--topology", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"4000 nodes")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_a_name_that_the_encoding_lacks_is_still_written(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"nodes": {"0": {"cpus": "0"}}, "gpus": [{"pci": "0000:17:00.0", "model": "\u00b5"}]}))
    done = call("show", "--topology", str(path), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xb5" in done.stdout


@pytest.mark.parametrize("words", [["show", "--json"], ["plan", "--ranks", "2", "--json"]])
def test_json_is_all_that_stands_on_standard_output(box: str, words: list[str]) -> None:
    done = call(*words, "--topology", box)
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stderr == ""
