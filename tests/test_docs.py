"""Holds the pages to the source: public names, links, pictures, words of errors."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jlstm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = (
    "",
    "cells",
    "convert",
    "data",
    "decode",
    "diagnostics",
    "export",
    "flax",
    "init",
    "testing",
    "train",
)
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_static" not in p.parts)
READMES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "experiments/README.md",
    )
]
HALVES = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+(?:\([^()]*\))?)\)")


def load(folder: Path, name: str) -> ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def listed() -> dict[str, str]:
    """Maps the names on reference pages to their pages."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in re.findall(r"^```\{symbols\}\n(.*?)^```", text(page), re.S | re.M):
            for line in block.splitlines():
                if line.startswith(":"):
                    continue
                for symbol in line.split():
                    assert symbol not in found, f"{name(page)}: {symbol} is there twice"
                    found[symbol] = name(page)
    return found


def public(module: ModuleType) -> list[str]:
    """What a module exports: ``__all__``, or what it defines without a low line."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or callable(value))
        and type(value).__name__ != "TypeVar"
    ]


def resolve(symbol: str) -> object:
    value: object = jlstm
    for part in symbol.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    home = importlib.import_module(f"jlstm.{module}".rstrip("."))
    values = {id(resolve(symbol)) for symbol in listed()}
    missing = [n for n in public(home) if id(getattr(home, n)) not in values]
    assert not missing, f"on no page of docs/reference: {missing}"


def test_reference_names_nothing_that_is_not_there_and_nothing_twice():
    symbols = listed()
    seen: dict[int, str] = {}
    for symbol in symbols:
        value = resolve(symbol)
        assert id(value) not in seen, f"{symbol} is also {seen[id(value)]}"
        seen[id(value)] = symbol


def test_every_page_is_in_a_toctree():
    entries = {DOCS / "index.md"}
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text(page), re.S | re.M):
            for line in block.splitlines():
                if not line.strip() or line.startswith(":"):
                    continue
                if "*" in line:
                    entries |= set(page.parent.glob(f"{line}.md")) - {page}
                else:
                    target = page.parent / f"{line}.md"
                    assert target.exists(), f"{name(page)}: there is no page {line}"
                    entries.add(target)
    assert set(PAGES) == entries


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    plain = re.sub(r"\{[a-z:]+\}|[`*]", "", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    outside = HALVES.sub("", text(page))
    found = {anchor(t) for t in re.findall(r"^#+ (.*)$", outside, re.M)}
    return found | set(re.findall(r"^\(([\w-]+)\)=$", outside, re.M))


@pytest.mark.parametrize("page", PAGES + READMES, ids=name)
def test_links_lead_somewhere_and_images_have_words(page):
    outside = re.sub(r"`[^`\n]*`", "``", HALVES.sub("", text(page)))
    for image, words, target in LINK.findall(outside):
        assert not image or words.strip(), f"{name(page)}: no alt text: {target}"
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: there is no {target}"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{name(page)}: {target} leaves the site"
        if fragment and file.suffix == ".md":
            assert fragment in anchors(file), f"{name(page)}: no anchor {target}"
    for words in re.findall(r"\{doc\}`([^`]*)`", text(page)):
        found = re.search(r"<(.*)>$", words)
        target = found[1] if found else words
        base = DOCS if target.startswith("/") else page.parent
        file = base / f"{target.lstrip('/')}.md"
        assert file.exists(), f"{name(page)}: there is no page {target}"
    for head, block in re.findall(
        r"^```\{(?:image|figure|include)\} (\S+)\n(.*?)^```", text(page), re.S | re.M
    ):
        # What is drawn at build has its words on the page all the same.
        assert (page.parent / head).exists(), f"{name(page)}: there is no {head}"
        if head.rpartition(".")[2] in ("png", "svg", "gif", "jpg"):
            assert re.search(r"^:alt: \S", block, re.M), f"{name(page)}: {head}: no alt"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_of_cells_can_be_read(page):
    for cell in re.findall(r"^```\{code-cell\}.*\n(.*?)^```", text(page), re.S | re.M):
        options, rest = re.match(r"((?::.*\n)*)(.*)", cell, re.S).groups()  # type: ignore
        assert not options or not re.match(r"[ \t]+\S", rest), (
            f"{name(page)}: options of several lines stand between two lines of ---:\n"
            f"{cell[:300]}"
        )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_of_notebooks_have_words(page):
    for cell in re.findall(r"^```\{code-cell\}.*?^```", text(page), re.S | re.M):
        draws = re.search(r"\bplt\.|subplots|\.plot\(|imshow|Figure\(", cell)
        silent = "remove-output" in cell or "remove-cell" in cell
        if (
            draws
            and not silent
            and not re.search(r"^\s*(def|class|import) ", cell, re.M)
        ):
            assert "alt:" in cell, f"{name(page)}: a figure without alt text:\n{cell}"


def test_picture_of_the_front_page_is_what_its_script_draws():
    drawn = load(DOCS, "draw").picture()
    assert text(DOCS / "images" / "unrolled.svg") == drawn, "run python docs/draw.py"


def test_tables_of_readmes_are_those_of_results():
    report = load(ROOT / "experiments", "report")
    for page in report.PAGES:
        assert "<!-- experiments -->" in text(page), f"{name(page)} has no table"
        assert report.filled(text(page)) == text(page), (
            "run experiments/report.py --write"
        )


def test_runs_become_rows(tmp_path, monkeypatch, capsys):
    report = load(ROOT / "experiments", "report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for seed, value in enumerate((0.25, 0.75)):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        result = {
            "experiment": "adding", "preset": "cpu", "seed": seed, "value": value,
            "metric": "squares", "floor": 1.0, "floor_name": "nothing",
            "beats_floor": True, "seconds": 600 + seed, "others": {"net": 1 + seed},
        }  # fmt: skip
        for file, content in (("result", result), ("config", {}), ("env", {})):
            (folder / f"{file}.json").write_text(report.json.dumps(content))
    report.collect([tmp_path / "run0", tmp_path / "run1"])
    assert "adding-cpu-seed1.json" in capsys.readouterr().out
    (line,) = report.table().splitlines()[2:]
    assert line.startswith("| The adding problem")
    assert (
        "<br>`adding.py --preset cpu` | **0.5000 ± 0.35 (2 seeds)** squares |" in line
    )
    beside, time = "floor 1.000: nothing<br>1.500 ± 0.71: net", "10 min"
    assert f"| {beside} | {time.replace(' ', chr(0xA0))} |" in line
    page = "a\n<!-- experiments -->\nold\n<!-- end of experiments -->\nz\n"
    assert report.filled(page) == page.replace("old\n", report.HEAD + line + "\n")
    with pytest.raises(SystemExit, match=r"has no result\.json"):
        report.collect([tmp_path])


def messages() -> list[str]:
    """All strings of the source, with … for what is filled in."""
    found = []
    for path in (ROOT / "jlstm").rglob("*.py"):
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(v.value) if isinstance(v, ast.Constant) else "…"
                    for v in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_errors_of_the_page_are_those_of_the_source():
    page = text(DOCS / "reference" / "errors.md")
    begins = re.findall(r"^`(.*)`\n: ", page, re.M)
    assert len(begins) > 50
    known = messages()
    lost = []
    for begin in begins:
        forms = {begin, begin.partition(": ")[2] or begin}  # less the place
        if not any(form in message for form in forms for message in known):
            lost.append(begin)
    assert not lost
