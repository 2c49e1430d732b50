"""Settings of the documentation: Sphinx with MyST and furo; the API pages come from docstrings, guides from READMEs."""

import re
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).resolve().parent.parent / "packages"

project = "ds-train-utils"
author = "The ds-train-utils developers"
copyright = f"2026, {author}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples", "_build"]
html_theme = "furo"
html_title = "ds-train-utils"
html_static_path = ["_static"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def read_guide(app: Any, docname: str, source: list[str]) -> None:
    """Put a package's README in the place of its guide, with its links to other READMEs and files made to fit."""
    if docname.startswith("guides/ds-"):
        readme = PACKAGES / docname.removeprefix("guides/") / "README.md"
        app.env.note_dependency(str(readme))
        text = re.sub(r"\]\(\.\./(ds-[a-z-]+)/README\.md", r"](\1.md", readme.read_text(encoding="utf-8"))
        text = re.sub(r"\]\((?:\.\./)*docs/([a-z/-]+\.md)", r"](../\1", text)
        source[0] = re.sub(r"\[([^\]]*)\]\((?!https?://|#|\.\./[a-z/-]+\.md|ds-)[^)]*\)", r"\1", text)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_guide)
