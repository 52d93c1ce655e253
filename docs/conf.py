"""How the documentation is built: `make docs`."""

import logging as python_logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode.parser import VariableCommentPicker
from sphinx.util import logging

import wnjax

HERE = Path(__file__).parent
STAR = r"(?<=[(\s])\*(?=\w)(?![^*]*\w\*)"  # of *args, which no other star closes
ALIASES = ("Axes", "AxisName")
logger = logging.getLogger(__name__)

project = "wnjax"
author = "The wnjax developers"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_pictures", "conf.py", "pictures", "notebooks/*/*"]
nitpicky = True
smartquotes_action = "D"  # dashes: a prime is no quotation mark
nitpick_ignore_regex = [  # documented elsewhere, and the build needs no network
    (r"py:.*", r"(jax|jaxlib|flax|nn|nnx|optax|numpy|np|os|collections)\b.*"),
    ("py:class", "|".join(ALIASES)),  # spelled out by the arguments
    (
        "py:class",
        "Callable|Concatenate|Mapping|types.EllipsisType|[TPR]",
    ),  # in the signatures that api.md writes
]

html_theme = "furo"
html_title = "wnjax"
html_copy_source = False
html_show_copyright = False

# Every cell runs on every build: what a page shows is what the library does.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 300  # seconds a cell
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "warn"
nb_merge_streams = True
python_logging.getLogger("traitlets").setLevel("WARNING")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ALIASES}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def draw_pictures(app: Sphinx) -> None:
    """Runs every script in `pictures`, each of which draws one picture."""
    out = HERE / "_pictures"
    out.mkdir(exist_ok=True)
    for script in sorted((HERE / "pictures").glob("*.py")):
        subprocess.run([sys.executable, script, out / f"{script.stem}.svg"], check=True)


def refuse_unexecuted(app: Sphinx, docname: str, source: list[str]) -> None:
    """Python on a page is a `code-cell`, which runs; a plain block would only claim to."""
    block = r"^ *[`~]{3,} *\{?(python|py|pycon|code|code-block)(?![\w-])"
    if re.search(block, source[0], re.MULTILINE):
        logger.warning("a block of Python that is not executed", location=docname)


def whole_returns(docstring: GoogleDocstring, preprocess_types: bool = False) -> list[Any]:
    """What is returned, in words: a colon among them does not end a type."""
    return [("", "", docstring._dedent(docstring._consume_to_next_section()))]


def link_names(*event: Any) -> None:
    """Makes links of public names in single backticks, and code of all else in them."""
    *_, lines = event
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(rf"`([^`<>]+)`(?=(\w?))|\||{STAR}", as_rst, line)


def as_rst(match: re.Match[str]) -> str:
    """One name in single backticks, bar of an absolute value, or star of an argument."""
    if match[0] in "|*":  # no substitution and no emphasis begins here
        return f"\\{match[0]}"
    name = match[1].removeprefix("wnjax.")
    role = f":py:obj:`{match[1]} <wnjax.{name}>`" if is_public(name) else f"``{match[1]}``"
    return role + (r"\ " if match[2] else "")  # where a letter follows, as a plural's


def is_public(name: str) -> bool:
    """Whether `wnjax` has a function or class of this name."""
    thing = wnjax
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return callable(thing)


def setup(app: Sphinx) -> None:
    """Connects the above."""
    GoogleDocstring._consume_returns_section = whole_returns
    # One signature of each function: api.md writes it where there are overloads.
    VariableCommentPicker.is_overload = lambda self, decorators: False
    app.connect("builder-inited", draw_pictures)
    app.connect("source-read", refuse_unexecuted)
    app.connect("autodoc-process-docstring", link_names)
