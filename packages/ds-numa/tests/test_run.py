"""Around a launcher: what `ds-numa run` puts into the environment, and what each Python process below makes of it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ds_numa
import pytest
from ds_numa._launchers import LAUNCHERS

SITE = Path(ds_numa.__file__).parent / "_site"
needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two CPUs"
)
SEE = "import os, sys; print(len(os.sched_getaffinity(0)), 'ds_numa' in sys.modules)"


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ds_numa", "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def shell(*commands: str) -> list[str]:
    """A launcher: a shell that starts Python programs, each with its environment in front."""
    return ["bash", "-c", "\n".join(commands)]


def python(code: str, rank: int | None = None, ranks: int = 2, flags: str = "") -> str:
    set_rank = "" if rank is None else f"LOCAL_RANK={rank} LOCAL_WORLD_SIZE={ranks} "
    return f'{set_rank}{sys.executable} {flags} -c "{code}"'


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def test_the_names_of_ranks_are_those_of_the_table() -> None:
    tree = ast.parse((SITE / "sitecustomize.py").read_text())
    assigned = next(node for node in tree.body if isinstance(node, ast.Assign))
    assert set(ast.literal_eval(assigned.value)) == {one.local_rank or one.rank for one in LAUNCHERS}


@needs_two
def test_ranks_bind_and_other_processes_pay_nothing() -> None:
    done = run("--ranks", "2", "--", *shell(python(SEE), python(SEE, 0), python(SEE, 1)))
    cpus = len(os.sched_getaffinity(0))
    assert done.stdout.splitlines() == [f"{cpus} False", f"{cpus - cpus // 2} True", f"{cpus // 2} True"]
    assert [line.partition(": bound")[0] for line in done.stderr.splitlines()] == [
        "ds-numa: local rank 0",
        "ds-numa: local rank 1",
    ]


@needs_two
def test_what_a_rank_starts_is_not_bound_again() -> None:
    code = "import os, subprocess, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); " + (
        "sys.stdout.flush(); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    for ranks in (1, 2):
        done = run("--quiet", "--", *shell(f'{python(code, 0, ranks)} "{SEE}"'), "--")
        assert done.stdout.split()[0] == "1", done.stderr
        assert done.stderr == ""


def test_a_launcher_that_a_launcher_started_does_not_bind(tmp_path: Path) -> None:
    launcher = tmp_path / "torchrun"
    launcher.write_text(SEE)
    done = run("--", *shell(f"LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 {sys.executable} {launcher}"))
    assert done.stderr.count("local rank") == 0
    assert done.stdout.split()[0] == str(len(os.sched_getaffinity(0)))


def test_an_unknown_program_is_taken_for_a_launcher_and_that_is_said() -> None:
    done = run("--", *shell(python(SEE)))
    assert "bash is taken for a launcher" in done.stderr
    assert run("--quiet", "--", *shell("true")).stderr == ""
    assert "nothing to bind" in run("--ranks", "1", "--", *shell("true")).stderr


def test_a_python_program_without_a_launcher_is_the_only_rank_and_that_is_said() -> None:
    done = run("--", sys.executable, "-c", "print('started')")
    assert (done.stdout, done.returncode) == ("started\n", 0)
    assert "no launcher set a rank, so this is taken for the only one" in done.stderr


def test_the_users_own_module_is_still_loaded(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("whose = 'the user'\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"import sitecustomize, sys; print(sitecustomize.whose, sys.path.count('{SITE}'))"
    done = run("--quiet", "--", *shell(python(code)), PYTHONPATH=path)
    assert (done.stdout, done.stderr) == ("the user 0\n", "")


def test_a_broken_module_of_the_user_is_reported_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import no_such_module_here\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("--quiet", "--", *shell(python("print('on')")), PYTHONPATH=path)
    assert done.stdout == "on\n"
    assert "no_such_module_here" in done.stderr


def test_nothing_is_written_where_there_is_no_other_module() -> None:
    done = run("--quiet", "--", *shell(python("import sitecustomize; print(sitecustomize.__file__)")))
    assert done.stderr == ""
    assert "sitecustomize" in done.stdout


def test_an_interpreter_without_ds_numa_says_so_for_ranks_alone(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ds_numa'] = None"  # before any sitecustomize: what a .pth file would do
    (tmp_path / "sitecustomize.py").write_text("")
    code = f"{hide}; import runpy; runpy.run_path('{SITE / 'sitecustomize.py'}')"
    for rank in (None, 0):
        env = {} if rank is None else {"LOCAL_RANK": "0"}
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.modules['sitecustomize'] = sys; {code}"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "DS_NUMA_RUN": "{}", **env},
        )
        assert ("it cannot import ds_numa" in done.stderr) == (rank == 0), done.stderr


def test_the_path_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; print(os.environ['PYTHONPATH'])"
    before = os.environ.get("PYTHONPATH", "")
    for given in (f"/a::/b{os.pathsep}{before}", f"{SITE}{os.pathsep}/a{os.pathsep}{before}"):
        done = run("--quiet", "--", *shell(python(code)), PYTHONPATH=given)
        rest = given if not given.startswith(str(SITE)) else given.partition(os.pathsep)[2]
        assert done.stdout.strip() == f"{SITE}{os.pathsep}{rest}"


def test_strict_ends_a_rank_with_3_and_says_why_once() -> None:
    done = run("--strict", "--ranks", "4096", "--", *shell(python("print('started')", 0, 4096)))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("4096 ranks need 4096 CPUs") == 1
    done = run("--strict", "--ranks", "4", "--", *shell(python("print('started')", 0, 2)))
    assert (done.returncode, done.stdout) == (3, "")
    assert "started 2 ranks here, but --ranks is 4" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "num_local_procs = 0"),
        (["--ranks", "2", "--rank", "2"], "local_rank = 2"),
        (["--ranks", "2", "--cores", "3-1"], "'3-1' runs backwards"),
        (["--ranks", "2", "--topology", "/no/such/file"], "--topology = '/no/such/file' cannot be read"),
    ],
)
def test_what_is_wrong_for_every_rank_is_said_once_before_the_start(words: list[str], message: str) -> None:
    done = run(*words, "--", *shell("echo started"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count(message) == 1


@needs_two
def test_a_described_machine_reaches_the_ranks(tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    data = {"nodes": {"0": {"cpus": f"{first},{second}"}}, "numa": False, "notes": ["x" * 300_000]}
    (tmp_path / "box.json").write_text(json.dumps(data))
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    done = subprocess.run(
        [sys.executable, "-m", "ds_numa", "run", "--quiet", "--topology", "box.json", "--", *shell(python(code, 1))],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str([second]), done.stderr


def test_a_signal_reaches_the_program_itself() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ds_numa", "run", "--quiet", "--", "bash", "-c", "echo up; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(timeout=30) == -15
    process.stdout.close()
