"""Every check of this repository; all of it derives from one table, `DISTRIBUTIONS`.

``nox`` runs the tests, ``nox -s demo`` the demo; ``nox --list`` names the rest. Only nox is needed to start: each
session makes an environment of its own, and a missing interpreter is skipped and named. Torch is installed first, from
constraints.txt, and only on the Pythons that the variable TORCH_PYTHONS names (3.11 when it is not set): on any other
than the one that you have a build for, an installer takes gigabytes of CUDA libraries. So it does for the rows of
`INCUMBENTS` with another torch. The variable INCUMBENTS names rows to run; without it the pinned one runs, and the
tests of NVMe offload are left out.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import run_summary  # noqa: E402

nox.needs_version = ">=2025.2.9"


@dataclass(frozen=True)
class Distribution:
    """One distribution of the repository.

    Attributes:
        name: its name on the package index, and of its folder in packages/.
        torch: whether it needs torch.
        extras: its extras that its tests install too.
        parts: the distributions that it depends on.
    """

    name: str
    torch: bool = True
    extras: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def import_name(self) -> str:
        """The name that programs import."""
        return self.name.replace("-", "_")

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return ROOT / "packages" / self.name

    @property
    def pyproject(self) -> dict[str, Any]:
        """Its metadata."""
        return nox.project.load_toml(self.folder / "pyproject.toml")


PARTS = (
    Distribution("ds-logging", torch=False, extras=("nvtx", "rich")),
    Distribution("ds-groups"),
    Distribution("ds-ondevice", extras=("rich", "safetensors")),
    Distribution("ds-fragment", extras=("safetensors",)),
    Distribution("ds-z3leaf"),
    Distribution("ds-loader", extras=("torchdata",)),
    Distribution("ds-numa", torch=False, extras=("nvidia",)),
)
META = Distribution("ds-train-utils", parts=tuple(part.name for part in PARTS))
DISTRIBUTIONS = {dist.name: dist for dist in (*PARTS, META)}


@dataclass(frozen=True)
class Incumbent:
    """A DeepSpeed and a torch that the drop-in tests run with.

    Attributes:
        deepspeed: its version, or None for the newest on the index.
        torch: its version, or None for the newest on the index.
        gradients: whether DeepSpeed tells old gradients from new ones, on every stage. Where it does not, ds-fragment
            refuses some, and the tests of all stages are not run.
    """

    deepspeed: str | None
    torch: str | None
    gradients: bool = True

    @property
    def name(self) -> str:
        """How the variable INCUMBENTS and the session name it."""
        return f"deepspeed-{self.deepspeed or 'newest'}-torch-{self.torch or 'newest'}"

    @property
    def pins(self) -> list[str]:
        """What pip is told instead of the two lines in constraints.txt."""
        versions = {"deepspeed": self.deepspeed, "torch": self.torch}
        return [f"{package}=={version}" for package, version in versions.items() if version]


# The oldest and the newest DeepSpeed and torch that are supported, and what lies between; constraints.txt has the row
# that all other sessions use, and that runs alone where the variable INCUMBENTS names none. `ds_train_utils.install`
# names the DeepSpeed versions as those that it was verified on.
INCUMBENTS = (
    Incumbent("0.16.9", "2.6.0", gradients=False),
    Incumbent("0.16.9", "2.13.0", gradients=False),
    Incumbent("0.17.6", "2.13.0", gradients=False),
    Incumbent("0.18.9", "2.13.0", gradients=False),
    Incumbent("0.19.6", "2.13.0"),
    Incumbent("0.19.8", "2.13.0"),
    Incumbent("0.19.8", "2.14.1"),
    Incumbent(None, None),  # what is newest that day: the nightly workflow
)
PINNED = next(row for row in INCUMBENTS if row.name == "deepspeed-0.19.8-torch-2.13.0")
# What `deepspeed.utils` has to do with, and so is tested on every row; the rest of tests-integration on `PINNED` alone.
DROP_IN = ("dropin", "groups", "logging", "z3leaf", "test_surface.py")
STAGES = "deepspeed"  # every ZeRO stage in depth, minutes long
# Its operator takes six minutes to compile on two cores, so these tests run only where INCUMBENTS names rows, as the
# workflow of every push does.
NVME = f"{STAGES}/test_nvme.py"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PYTHON = "3.11"  # for the sessions that run once
TORCH_PYTHONS = os.environ.get("TORCH_PYTHONS", PYTHON).replace(",", " ").split()
CHOSEN = os.environ.get("INCUMBENTS", "").split()  # names of rows, or "pinned" for all with versions
ROWS = [
    row
    for row in INCUMBENTS
    if row.name in CHOSEN or ("pinned" in CHOSEN and row.pins) or (row is PINNED and not CHOSEN)
]
CACHE = ROOT / ".nox"
CONSTRAINTS = str(ROOT / "constraints.txt")
# Clients whose rank tables or loaders are tried, without what they declare: it excludes versions of other clients.
CLIENTS_ALONE = (
    "mosaicml-streaming",
    "megatron-core",
    "torchtitan",
    *("spmd_types", "tyro", "docstring_parser", "typeguard", "shtab", "torch_checkpointing"),  # torchtitan imports them
)

GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")  # the root's dependency groups: what a session's tools are

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.report = str(CACHE / "report.json")
CACHE.mkdir(exist_ok=True)
atexit.register(run_summary.write, CACHE)


@nox.session(python=PYTHONS)
@nox.parametrize("dist", [nox.param(name, id=name) for name in DISTRIBUTIONS])
def tests(session: nox.Session, dist: str) -> None:
    """One distribution's tests, beside its built wheel and what it declares."""
    it = DISTRIBUTIONS[dist]
    if it.torch and session.python not in TORCH_PYTHONS:
        session.skip(f"torch is installed on Python {' '.join(TORCH_PYTHONS)} only (TORCH_PYTHONS names others)")
    install(session, it, groups=(it.pyproject, "test"))
    pytest(session, it.folder / "tests")


@nox.session(python=PYTHON)
@nox.parametrize("name", [nox.param(row.name, id=row.name) for row in ROWS])
def integration(session: nox.Session, name: str) -> None:
    """All distributions together, with one DeepSpeed and torch; as root it installs libaio and two MPI launchers."""
    row = next(row for row in ROWS if row.name == name)
    complete = (
        Path("/usr/include/libaio.h").exists() and shutil.which("mpirun.openmpi") and shutil.which("mpirun.mpich")
    )
    if not complete and shutil.which("apt-get") and os.geteuid() == 0:
        packages = ["libaio-dev", "openmpi-bin", "mpich"]  # for NVMe offload and ds-numa; without, tests are skipped
        for command in (["update", "-q"], ["install", "-q", "-y", *packages]):
            session.run("apt-get", *command, external=True, silent=True, success_codes=range(256))
    others = [line for line in Path(CONSTRAINTS).read_text().splitlines() if not re.match("(deepspeed|torch)==", line)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*others, *row.pins]) + "\n")
    install(session, *DISTRIBUTIONS.values(), groups=(GROUPS, "integration"), constraints=str(constraints))
    session.install("-c", str(constraints), "--no-deps", *CLIENTS_ALONE)
    # From its sdist, with no compiled operators; its build reads torch, so the build uses this environment.
    session.install("-c", str(constraints), "--no-build-isolation", "deepspeed", env={"DS_BUILD_OPS": "0"})
    # What one version of DeepSpeed compiles for itself is not another's.
    extensions = CACHE / "torch_extensions" / row.name
    env = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4", "TORCH_EXTENSIONS_DIR": str(extensions)}
    folder = ROOT / "tests-integration"
    # Compiled here, or the first tests would wait for a compiler, and a test that is stopped meanwhile leaves a lock.
    operators = [] if CHOSEN else ["ShareMemCommBuilder", "FusedAdamBuilder"]
    session.run("python", "tools/compile_deepspeed.py", *operators, env=env)
    parts = [""] if row is PINNED else [*DROP_IN, *([STAGES] if row.gradients else [])]
    left_out = [] if CHOSEN else [f"--ignore={folder / NVME}"]
    if left_out:
        session.log(f"{NVME} is left out: it runs where INCUMBENTS names this row")
    pytest(session, *(folder / part for part in parts), options=left_out, env=env)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Ruff, import contracts, spelling, clang-format, and the tables that must agree with the one above."""
    session.install("-c", CONSTRAINTS, *nox.project.dependency_groups(GROUPS, "lint"))
    check_tables(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": source_path()})
    session.run("codespell")
    sources = (path for path in ROOT.glob("packages/*/csrc/**/*") if path.suffix in {".c", ".cpp", ".cu", ".cuh", ".h"})
    native = [str(path) for path in sources]
    if native:
        session.run("clang-format", "--dry-run", "-Werror", *native)


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Mypy, strict, on every source file, and on a program that imports the whole surface."""
    install(session, *DISTRIBUTIONS.values(), groups=(GROUPS, "types"))
    surface = Path(session.create_tmp()) / "surface.py"
    contract = ROOT / f"tests-integration/contract/deepspeed-{PINNED.deepspeed}.json"
    modules = json.loads(contract.read_text())["modules"]
    names = [(module, name) for module, found in modules.items() for name in found if not name.startswith("_")]
    surface.write_text("".join(f"from ds_train_utils.{module} import {name}\n" for module, name in names))
    folders = [str(dist.folder / "src") for dist in DISTRIBUTIONS.values()]
    session.run("mypy", *folders, str(surface), env={"MYPYPATH": source_path()})


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors."""
    install(session, *DISTRIBUTIONS.values(), groups=(GROUPS, "docs"))
    session.run("sphinx-build", "-E", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build", *session.posargs)
    session.log("the documentation is in docs/_build/index.html")


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Wheels and sdists by hatch, checked by twine, each wheel installed into an empty environment and imported."""
    session.install("-c", CONSTRAINTS, *nox.project.dependency_groups(GROUPS, "build"))
    out = CACHE / "dist"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(session.create_tmp())
    for dist in DISTRIBUTIONS.values():
        with session.chdir(dist.folder):
            session.run("hatch", "build", str(out), env={"HATCH_DATA_DIR": str(CACHE / "hatch")}, silent=True)
        check_archives(session, dist, out)
    session.run("twine", "check", "--strict", *(str(path) for path in sorted(out.iterdir())))
    venvs = Path(session.create_tmp())
    for dist in DISTRIBUTIONS.values():
        # One environment without torch and one with it: emptied of the distribution before the next one comes.
        venv = venvs / ("with-torch" if dist.torch else "without-torch")
        python = str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        if not venv.exists():
            session.run("python", "-m", "venv", str(venv))
            if dist.torch:
                session.run(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, "torch", external=True)
        names = (*dist.parts, dist.name)
        files = [str(next(out.glob(f"{name.replace('-', '_')}-*.whl"))) for name in names]
        session.run(python, "-m", "pip", "install", "-q", *files, external=True)
        session.run(python, "-m", "pip", "check", silent=True, external=True)
        session.run(python, "-c", IMPORT_CHECK, dist.import_name, str(dist.torch and not dist.parts), external=True)
        session.run(python, "-m", "pip", "uninstall", "-q", "-y", *names, external=True)
    shutil.rmtree(venvs)


IMPORT_CHECK = """
import importlib, sys
name, needs_torch = sys.argv[1], sys.argv[2] == "True"
importlib.import_module(name)
others = {module.partition(".")[0] for module in sys.modules if module.startswith("ds_")} - {name}
assert not others, f"importing {name} imports {sorted(others)}"
assert needs_torch or "torch" not in sys.modules, f"importing {name} imports torch"
"""


@nox.session(python=PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Every package's benchmarks; what follows -- goes to each of them."""
    install(session, *DISTRIBUTIONS.values(), groups=(GROUPS, "demo"))
    for dist in DISTRIBUTIONS.values():
        for program in sorted(dist.folder.glob("benchmarks/[!_]*.py")):
            session.run("python", str(program), *session.posargs)


@nox.session(python=PYTHON, default=False)
def demo(session: nox.Session) -> None:
    """Train a small sharded mixture-of-experts model with everything; what follows -- goes to train_moe.py."""
    install(session, *DISTRIBUTIONS.values(), groups=(GROUPS, "demo"))
    session.run("python", "docs/examples/train_moe.py", *session.posargs)


def install(
    session: nox.Session, *dists: Distribution, groups: tuple[dict[str, Any], str], constraints: str = CONSTRAINTS
) -> None:
    """Put torch (if needed), the wheels of distributions and a dependency group into the session's environment."""
    if any(dist.torch for dist in dists):
        session.install("-c", constraints, "torch")
    names = dict.fromkeys(name for dist in dists for name in (*dist.parts, dist.name))
    wheels = {name: wheel(session, DISTRIBUTIONS[name]) for name in names}
    extras = {dist.name: f"[{','.join(dist.extras)}]" for dist in dists if dist.extras}
    wanted = [f"{path}{extras.get(name, '')}" for name, path in wheels.items()]
    session.install("-c", constraints, *wanted, *nox.project.dependency_groups(*groups))
    # An environment that was kept may hold an older build of the same version.
    session.install("--no-deps", "--force-reinstall", *map(str, wheels.values()))


def wheel(session: nox.Session, dist: Distribution) -> Path:
    """The wheel of a distribution, built once for all sessions and again when a source changes."""
    left_out = {"tests", "benchmarks", "changelog.d", "dist", "build", "__pycache__"}
    digest = hashlib.sha256()
    for path in sorted(dist.folder.rglob("*")):
        relative = path.relative_to(dist.folder)
        if path.is_file() and not left_out.intersection(relative.parts):
            digest.update(f"{relative}\0".encode() + path.read_bytes())
    folder = CACHE / "wheels" / dist.name / digest.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        partial = folder.with_suffix(".partial")
        session.run(
            *("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(partial), str(dist.folder)),
            env={"DS_FRAGMENT_CUDA_ARCHS": "90"},  # one is enough to test with; `build` compiles for all
            silent=True,
        )
        partial.rename(folder)
    return next(folder.glob("*.whl"))


def pytest(session: nox.Session, *paths: Path, options: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
    """Run tests and leave their counts where the summary at the end finds them."""
    results = run_summary.results_file(CACHE, session.name)
    results.unlink(missing_ok=True)
    # For the programs that tests start; pyproject.toml has the same for pytest itself, and says why.
    env = {"PYTHONWARNINGS": "ignore:Failed to initialize NumPy:UserWarning", **(env or {})}
    command = ("python", "-m", "pytest", "-q", f"--junitxml={results}", *options)
    session.run(*command, *map(str, paths), *session.posargs, env=env)


def source_path() -> str:
    """The source folders of all distributions, as PYTHONPATH and MYPYPATH want them."""
    return os.pathsep.join(str(dist.folder / "src") for dist in DISTRIBUTIONS.values())


def check_archives(session: nox.Session, dist: Distribution, out: Path) -> None:
    """Fail if a wheel holds anything but the package, or an sdist misses what its tests need."""
    built = next(out.glob(f"{dist.import_name}-*.whl"))
    with zipfile.ZipFile(built) as archive:
        paths = [Path(name) for name in archive.namelist()]
    allowed = re.compile(rf"{dist.import_name}(-[^/]+\.dist-info)?")
    not_tests = {"tests", "benchmarks"}.isdisjoint
    strays = [str(path) for path in paths if not (allowed.fullmatch(path.parts[0]) and not_tests(path.parts))]
    if strays:
        session.error(f"{built.name} holds {strays}: a wheel holds the package and nothing else")
    source = next(out.glob(f"{dist.import_name}-*.tar.gz"))
    with tarfile.open(source) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    missing = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} - held
    if missing:
        session.error(f"{source.name} misses {sorted(missing)}: name them in [tool.hatch.build.targets.sdist]")


def check_tables(session: nox.Session) -> None:
    """Fail if the README or the meta-package's dependencies do not say what the table of distributions says."""
    rows = ["| distribution | import | needs | what it holds |", "|---|---|---|---|"]
    for dist in DISTRIBUTIONS.values():
        project = dist.pyproject["project"]
        needs = "all seven" if dist.parts else ", ".join(f"`{need}`" for need in project["dependencies"]) or "nothing"
        extras = ", ".join(f"`{extra}`" for extra in project.get("optional-dependencies", {}))
        needs += f"; extra {extras}" if extras else ""
        link = f"[`{dist.name}`](packages/{dist.name}/README.md)"
        rows.append(f"| {link} | `{dist.import_name}` | {needs} | {project['description']} |")
        if dist.torch != any(need.startswith(("torch", "ds-")) for need in project["dependencies"]):
            session.error(f"{dist.name} and noxfile.py disagree on whether it needs torch")
        if not set(dist.extras) <= set(project.get("optional-dependencies", {})):
            session.error(f"{dist.name} has no extras {dist.extras}: correct its row in noxfile.py")
    if "\n".join(rows) not in (ROOT / "README.md").read_text():
        session.error("README.md: the table of distributions is stale, put this in its place:\n" + "\n".join(rows))
    folders = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    if folders != set(DISTRIBUTIONS):
        session.error(f"packages/ and noxfile.py differ in {sorted(folders ^ set(DISTRIBUTIONS))}")
    wanted = {f"{part}~=" for part in META.parts}
    found = {need[: need.index("~=") + 2] for need in META.pyproject["project"]["dependencies"] if "~=" in need}
    if found != wanted:
        session.error(f"{META.name} depends on {sorted(found)}, not on compatible ranges of {sorted(META.parts)}")
