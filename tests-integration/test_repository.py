"""The repository's own tools: what a release checks, what a run of nox says last, and pins that stand twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import release_check  # noqa: E402
import run_summary  # noqa: E402


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    package = tmp_path / "packages" / "ds-numa"
    (package / "src" / "ds_numa").mkdir(parents=True)
    (package / "changelog.d").mkdir()
    (package / "changelog.d" / ".gitkeep").touch()
    (package / "pyproject.toml").touch()
    (package / "src" / "ds_numa" / "__about__.py").write_text('"""Version."""\n\n__version__ = "0.2.0"\n')
    (package / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2026-11-22)\n\n- New.\n\n## 0.1.0\n\n- First.\n")
    return tmp_path


def test_release_of_the_version_that_is_written(repository: Path) -> None:
    assert release_check.check("ds-numa-v0.2.0", repository) == ("ds-numa", "0.2.0")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v0.2.0", "no release tag: name it <distribution>-v<version>"),
        ("ds-numa-0.2.0", "no release tag"),
        ("ds-numa-v0.2", "no release tag"),
        ("ds-numa-v0.2.0\n", "no release tag"),
        ("ds-numa-v0.2.0; rm", "no release tag"),
        ("ds-nums-v0.2.0", "'ds-nums' is none of ds-numa"),
        ("ds-numa-v0.2.1", "__about__.py says 0.2.0"),
    ],
)
def test_release_of_a_wrong_tag_is_refused(repository: Path, tag: str, message: str) -> None:
    with pytest.raises(release_check.ReleaseError, match=re.escape(message)):
        release_check.check(tag, repository)


def test_release_needs_a_changelog_entry_of_its_own(repository: Path) -> None:
    changelog = repository / "packages" / "ds-numa" / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## 0.2.0rc1\n\n- see 0.2.0\n\n### 0.2.0\n")
    with pytest.raises(release_check.ReleaseError, match=r"no entry '## 0\.2\.0'"):
        release_check.check("ds-numa-v0.2.0", repository)


def test_release_refuses_fragments_that_wait(repository: Path) -> None:
    (repository / "packages" / "ds-numa" / "changelog.d" / "+bind.fixed.md").write_text("Bind.")
    with pytest.raises(release_check.ReleaseError, match=r"\+bind\.fixed\.md: run towncrier"):
        release_check.check("ds-numa-v0.2.0", repository)


@pytest.mark.parametrize("package", sorted(path.name for path in (ROOT / "packages").iterdir()))
def test_every_package_can_be_released_as_it_says(package: str) -> None:
    about = (ROOT / "packages" / package / "src" / package.replace("-", "_") / "__about__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', about)
    assert version is not None
    entry = f"## {version[1]}"
    assert entry in (ROOT / "packages" / package / "CHANGELOG.md").read_text()


def test_release_check_as_a_program() -> None:
    program = [sys.executable, str(ROOT / "tools" / "release_check.py")]
    refused = subprocess.run([*program, "ds-numa-v99.0.0"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "ds-numa-v99.0.0" in refused.stderr
    assert subprocess.run(program, capture_output=True, check=False).returncode == 2


def junit(path: Path, *cases: tuple[str, str]) -> None:
    body = "".join(f'<testcase classname="test_x" name="{name}">{inner}</testcase>' for name, inner in cases)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")


def skipped(reason: str) -> str:
    return f"<skipped message={quoteattr(reason)}/>"


def test_summary_adds_up_tests_checks_and_skips(tmp_path: Path) -> None:
    junit(
        run_summary.results_file(tmp_path, "tests-3.11(ds-numa)"),
        ("a", ""),
        ("b", ""),
        ("c", "<failure/>"),
        ("d", skipped("no GPU")),
        ("e", "<error/>"),
    )
    junit(run_summary.results_file(tmp_path, "integration"), ("a", ""), ("b", ""))  # a crash after the last test
    sessions = [
        {"signatures": ["tests-3.11(ds-numa)"], "result": "failed"},
        {"signatures": ["integration"], "result": "failed"},
        {"signatures": ["lint"], "result": "success"},
        {"signatures": ["docs"], "result": "aborted"},
        {"signatures": ["tests-3.10(a)"], "result": "skipped", "reason": "Python interpreter 3.10 not found"},
        {"signatures": ["tests-3.10(b)"], "result": "skipped", "reason": "Python interpreter 3.10 not found"},
        {"signatures": ["tests-3.12(c)"], "result": "skipped", "reason": "no torch"},
        {"signatures": ["tests-3.13(c)"], "result": "skipped", "reason": "no torch"},
    ]
    lines = run_summary.render(run_summary.summarize(tmp_path, sessions)).splitlines()
    assert lines == [
        "",
        "sessions that ran: 4",
        "failed: tests-3.11(ds-numa): test_x.c",
        "failed: tests-3.11(ds-numa): test_x.e",
        "failed: integration",
        "failed: docs",
        "skipped 1: ds-numa: no GPU",
        "skipped 2: no torch",
        "missing interpreters, their sessions did not run: Python 3.10",
        "5 passed, 4 failed, 3 skipped",
    ]


def test_summary_leaves_out_results_of_an_earlier_run(tmp_path: Path) -> None:
    results = run_summary.results_file(tmp_path, "tests-3.11(ds-numa)")
    junit(results, ("a", ""), ("b", ""))
    session = {"signatures": ["tests-3.11(ds-numa)"], "result": "failed"}
    late = run_summary.summarize(tmp_path, [session], since=results.stat().st_mtime + 1)
    assert (late.passed, late.failed) == (0, 1)


def test_pre_commit_has_the_versions_of_constraints() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = set(re.findall(r"[a-z-]+==[0-9.]+", text))
    assert len(pins) == 3
    assert pins <= set((ROOT / "constraints.txt").read_text().splitlines())
