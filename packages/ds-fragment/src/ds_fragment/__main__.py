"""``python -m ds_fragment`` says which kernels move the fragments on this machine, and why."""

from __future__ import annotations

from ds_fragment.__about__ import __version__
from ds_fragment.kernels import report


def main() -> None:
    """Print the report."""
    lines = {"ds-fragment": __version__, **report()}
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
