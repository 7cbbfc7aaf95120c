"""Settings of the documentation site; `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import activation_pages  # noqa: E402
import api_page  # noqa: E402

from rtdetr_act.version import __version__  # noqa: E402

project = "rtdetr-act"
author = "The rtdetr-act developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_generated", "example_activation", "activations/table.md", "activations/measured.md"]

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]

# Docstrings are Google style, with `code` in single backticks.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A strict build (-W -n) fails on every broken reference, but for the types of other projects, whose inventories would
# have to be downloaded, and for the type aliases and internal types that signatures mention.
nitpick_ignore_regex = [("py:.*", r"(?!rtdetr_act\.).*"), ("py:.*", r"rtdetr_act\.\w+\.[\w.]+")]

html_theme = "furo"
html_title = f"rtdetr-act {__version__}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Write what is generated before Sphinx reads the folder."""
    folder = Path(__file__).parent
    activation_pages.write_pages(folder / "activations")
    api_page.write_api(folder / "_generated" / "api.md")
    app.connect("autodoc-process-docstring", escape_plans)


def escape_plans(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep plans such as "dyrelu_b@backbone" outside of examples from becoming links to e-mail addresses."""
    lines[:] = [
        line if ">>>" in line else re.sub(r"(?<=\w)@(?=\w)(?=[^`]*(`[^`]*`[^`]*)*$)", r"\\@", line) for line in lines
    ]
