"""Directives of the site: the reference from public names, tables from result files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util import inspect as sphinx_inspect
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[2]
# What classes have from elsewhere, and no reader needs.
FOREIGN = (
    "Alias for field number",
    "Returns a new object replacing",
    "Create new inst",
)

_held: dict[str, list[str]] = {}
_began: dict[str, float] = {}
_took: dict[str, float] = {}


def find(name: str) -> Any:
    """The object of a dotted name, or None."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:k]))
        except ImportError:
            continue
        for part in parts[k:]:
            value = getattr(value, part, None)
        return value
    return None


class Symbols(SphinxDirective):
    """Names in jlstm: a table of their first sentences, then each in full."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"members": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Writes the directives of autodoc."""
        names = [f"jlstm.{name}" for line in self.content for name in line.split()]
        values = {name: find(name) for name in names}
        for name, value in values.items():
            if value is None:
                raise self.error(f"symbols: there is no {name}")
        modules = [name for name in names if inspect.ismodule(values[name])]
        names = [name for name in names if name not in modules]
        lines = [""]
        for name in modules:
            lines += [f".. automodule:: {name}", "   :no-members:", ""]
        if len(names) > 1:
            lines += [".. currentmodule:: None", ""]
            lines += [".. autosummary::", "   :nosignatures:", ""]
            lines += [f"   {name}" for name in names]
        for name in names:
            is_class = inspect.isclass(values[name])
            callable_ = inspect.isroutine(values[name]) or hasattr(
                values[name], "__wrapped__"
            )
            kind = "class" if is_class else "function" if callable_ else "data"
            lines += ["", f".. auto{kind}:: {name}"]
            if is_class and "members" in self.options:
                lines += ["   :members:"]
        text = "\n".join(["````{eval-rst}", *lines, "````"])
        return self.parse_text_to_nodes(text)


class Measured(SphinxDirective):
    """A table or figure made from result files, by `experiments/report.py`."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Reads the files, and writes a table in Markdown or draws a figure."""
        sys.path.insert(0, str(ROOT / "experiments"))
        report = import_module("report")
        for path in (ROOT / "experiments" / "results").glob("*.json"):
            self.env.note_dependency(path)
        name = self.arguments[0]
        if not name.endswith("_figure"):
            return self.parse_text_to_nodes(getattr(report, name)())
        path = ROOT / "build" / "docs" / "figures" / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        getattr(report, name)(path)
        page = Path(self.env.doc2path(self.env.current_document.docname))
        return self.parse_text_to_nodes(
            f"```{{image}} {os.path.relpath(path, page.parent)}\n"
            f":alt: {self.options['alt']}\n```"
        )


def skip(
    app: Sphinx, what: str, name: str, value: Any, skipped: bool, options: Any
) -> bool | None:
    """Leaves out methods that come with named tuples and dataclasses of flax."""
    if (inspect.getdoc(value) or "").startswith(FOREIGN):
        return True
    return None


def hold(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Hides docstrings of fields from Napoleon, which takes a colon for a type."""
    if what in ("attribute", "property"):
        _held[name] = lines[:]
        lines.clear()


def give_back(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Undoes `hold`."""
    if what in ("attribute", "property"):
        lines[:] = _held.pop(name)


def unwrap(
    app: Sphinx,
    what: str,
    name: str,
    value: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Writes functions that are defaults by their names."""

    def names(text: str | None) -> str | None:
        text = text and re.sub(r"<function (\w+)>", r"\1", text)
        return text and text.replace("<factory>", "...")  # that it may be parsed

    signature = names(signature)
    if signature and dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            # Functions that are objects, such as jax.nn.relu.
            if (word := getattr(field.default, "__name__", None)) is not None:
                start = rf"(\b{field.name}: [^=]*= )<[^>]*>"
                signature = re.sub(start, rf"\g<1>{word}", signature)
    return signature, names(returns)


def begin(app: Sphinx, name: str, source: list[str]) -> None:
    """Notes when a page begins to be read."""
    _began[name] = time.perf_counter()


def align(app: Sphinx, tree: nodes.document) -> None:
    """Wraps formulas of several lines, which KaTeX takes in no other way."""
    for node in tree.findall(nodes.math_block):
        formula = node.astext()
        if ("&" in formula or r"\\" in formula) and r"\begin{" not in formula:
            lines = r"\begin{aligned}" + f"\n{formula}\n" + r"\end{aligned}"
            node.children = [nodes.Text(lines)]


def end(app: Sphinx, tree: nodes.document) -> None:
    """Notes how long a page took."""
    name = app.env.current_document.docname
    _took[name] = time.perf_counter() - _began.pop(name)


def report(app: Sphinx, error: Exception | None) -> None:
    """Writes the seconds of each page beside the site."""
    path = Path(app.outdir).parent / "seconds.json"
    path.write_text(json.dumps(_took), encoding="utf-8")


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node
) -> nodes.Node | None:
    """Links a name to where its object is documented under another one."""
    if node.get("refdomain") != "py" or app.builder is None:
        return None
    target = node["reftarget"]
    known = env.domains.python_domain.objects
    last = target.rpartition(".")[2]
    names = [name for name in known if name.rpartition(".")[2] == last]
    if last == target:  # of a first sentence, which has lost its module
        names = [f"jlstm.{target}"] if f"jlstm.{target}" in names else names
        names = names if len({known[name].node_id for name in names}) == 1 else []
    else:
        value = find(target)
        names = [n for n in names if value is not None and find(n) is value]
    for name in names:
        entry = known[name]
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, content, name
        )
    return None


def mend_anchors(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object
) -> None:
    """Corrects links from source pages, which take all of a file to have one prefix."""
    if not page.startswith("_modules/") or "body" not in context:
        return
    known = app.env.domains.python_domain.objects

    def mend(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            rest = name.removeprefix("jlstm.")
            name = next((n for n in known if n.endswith("." + rest)), name)
        return f'#{name}"'

    context["body"] = re.sub(r'#(jlstm\.[\w.]+)"', mend, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directives."""
    # Sphinx writes names of types as they are, but forgets to in unions.
    if forgotten := getattr(sphinx_inspect, "TypeAliasForwardRef", None):
        forgotten.__repr__ = lambda self: self.name
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_directive("symbols", Symbols)
    app.add_directive("measured", Measured)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", hold, priority=400)
    app.connect("autodoc-process-docstring", give_back, priority=600)
    app.connect("autodoc-process-signature", unwrap)
    app.connect("source-read", begin)
    app.connect("doctree-read", align)
    app.connect("doctree-read", end)
    app.connect("build-finished", report)
    app.connect("html-page-context", mend_anchors)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
