"""The documentation site; `python docs/build.py` builds it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from sphinxcontrib import katex

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WORK = ROOT / "build" / "docs"  # what is kept between builds
sys.path[:0] = [str(DOCS / "_ext"), str(ROOT)]

import jlstm  # noqa: E402

project = "jlstm"
author = "the authors of jlstm"
project_copyright = author
version = release = jlstm.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.katex",
    "pages",
]
exclude_patterns = ["_ext", "_static", "**/_*.md"]
templates_path: list[str] = []

# Pages.
myst_enable_extensions = [
    "attrs_block",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["config.cache"]

# Notebooks. Results are kept from build to build for as long as the library's source
# and versions stay the same.
SMOKE = os.environ.get("JLSTM_DOCS") == "smoke"
# A smoke build runs a page of each kind, so that it ends within 2 minutes.
LONG = [
    "explanation/[a-df-z]*",
    "how-to/[lmorsw]*",
    "tutorials/0[2-9]*",
    "tutorials/1*",
]


def _of_the_library() -> str:
    digest = hashlib.sha256(repr(sorted(jlstm_versions().items())).encode())
    for path in sorted((ROOT / "jlstm").rglob("*")):
        if path.suffix in (".py", ".cc", ".h"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def jlstm_versions() -> dict[str, str]:
    """Versions on which the results of notebooks depend."""
    from importlib.metadata import version as of

    names = ("jax", "jaxlib", "optax", "numpy", "matplotlib", "ipykernel")
    return {name: of(name) for name in names} | {"python": sys.version}


nb_execution_mode = "cache"
nb_execution_cache_path = str(WORK / f"cache-{_of_the_library()}")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_excludepatterns = LONG if SMOKE else []
if SMOKE:  # what is not run does not know its language
    suppress_warnings += ["myst-nb.lexer"]
nb_execution_show_tb = True
nb_output_stderr = "show"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
# Figures are SVG files: sharp at any width, and the file that is shown is the one that
# is downloaded.
nb_mime_priority_overrides = [("html", "image/svg+xml", 1)]

_IPYTHON = WORK / "ipython"
_PROFILE = _IPYTHON / "profile_default"
_PROFILE.mkdir(parents=True, exist_ok=True)
(_PROFILE / "ipython_kernel_config.py").write_text(
    """\
c = get_config()
c.Application.log_level = "ERROR"
c.HistoryManager.enabled = False
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {
    "bbox_inches": "tight", "facecolor": "white", "metadata": {"Date": None},
}
c.InlineBackend.rc = {
    "figure.dpi": 100, "figure.facecolor": "white", "svg.hashsalt": "jlstm",
}
""",
    encoding="utf-8",
)
os.environ["IPYTHONDIR"] = str(_IPYTHON)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

# Reference.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
viewcode_line_numbers = True
toc_object_entries_show_parents = "hide"
nitpicky = True
# Names of types that say more than what they stand for; jlstm/types.py has them.
autodoc_type_aliases = {
    name: name for name in ("Activation", "Array", "Batch", "Initializer", "PyTree")
}
# What is not ours is not linked: the site asks nothing of other sites, not at build
# time either.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(jax|jaxlib|jnp|np|numpy|optax|flax|nnx|grain|orbax|matplotlib|pathlib|typing"
        r"|collections|Any|Callable|ellipsis|types|argparse|contextlib|dataclasses|os)"
        r"(\..*)?",
    ),
    (r"py:class", r"Activation|Array|ArrayLike|Batch|Example|Initializer|PyTree"),
    (r"py:class", r"jlstm\..*\.(CellT|ConfigT|T)"),  # type variables
    # Results of public functions, of which only the fields matter.
    (r"py:class", r"jlstm\..*\.(Linen|NNX|Restored|Runner|SummaryRow)"),
]

# Look.
katex_css_path = "katex/katex.min.css"  # in _static, with its fonts
katex_options = "{throwOnError: false, strict: 'ignore'}"
KATEX = "0.16.22"  # of the files in _static/katex
if katex.katex_version != KATEX:
    raise RuntimeError(
        f"sphinxcontrib-katex: has KaTeX {katex.katex_version}, the style sheet and "
        f"fonts in docs/_static/katex are of {KATEX}; replace them"
    )
html_math_renderer = "katex"
html_theme = "sphinx_book_theme"
html_title = "jlstm"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_favicon = "_static/favicon.svg"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "navbar_persistent": [],
    "footer_content_items": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "use_repository_button": False,
    "search_bar_text": "Search the docs",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
