"""Check a release tag: `ds-numa-v0.2.0` releases version 0.2.0 of ds-numa, and of nothing else.

    python tools/release_check.py TAG

Prints ``dist=`` and ``version=`` lines, which a workflow appends to its outputs; exits with 1 and the reason when the
tag does not agree with the distribution's ``__about__.py`` and CHANGELOG.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TAG = re.compile(r"(?P<dist>ds-[a-z0-9-]+)-v(?P<version>[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?)")


class ReleaseError(ValueError):
    """A tag that must not be released, with the reason."""


def check(tag: str, root: Path = ROOT) -> tuple[str, str]:
    """The distribution and version that a tag releases.

    Args:
        tag: the name of the tag, as ``ds-numa-v0.2.0``.
        root: the root of the repository.

    Raises:
        ReleaseError: the tag is no release tag, names no distribution, differs from the distribution's
            ``__about__.py``, or has no entry in its CHANGELOG.md; or change fragments wait in changelog.d.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ReleaseError(f"tag {tag!r} is no release tag: name it <distribution>-v<version>, as ds-numa-v0.2.0")
    dist, version = match["dist"], match["version"]
    folder = root / "packages" / dist
    about = folder / "src" / dist.replace("-", "_") / "__about__.py"
    if not about.is_file():
        known = ", ".join(sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml")))
        raise ReleaseError(f"tag {tag!r} names no distribution: {dist!r} is none of {known}")
    found = re.search(r'^__version__ = "([^"]+)"$', about.read_text(), re.MULTILINE)
    if found is None or found[1] != version:
        raise ReleaseError(
            f"tag {tag!r} is for version {version}, but {about.relative_to(root)} says "
            f"{found[1] if found else 'none'}: change it there first, then tag"
        )
    if not re.search(rf"^## {re.escape(version)}(\s|$)", (folder / "CHANGELOG.md").read_text(), re.MULTILINE):
        raise ReleaseError(f"packages/{dist}/CHANGELOG.md has no entry '## {version}': run towncrier build there")
    waiting = sorted(path.name for path in (folder / "changelog.d").glob("*") if not path.name.startswith("."))
    if waiting:
        raise ReleaseError(f"packages/{dist}/changelog.d still holds {', '.join(waiting)}: run towncrier build there")
    return dist, version


def main(argv: list[str]) -> int:
    """Check the tag that is the one argument; return the exit status."""
    if len(argv) != 1:
        sys.stderr.write("usage: release_check.py TAG\n")
        return 2
    try:
        dist, version = check(argv[0])
    except ReleaseError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"dist={dist}\nversion={version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
