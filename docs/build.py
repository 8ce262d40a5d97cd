"""Builds the site, and holds its pages to what they say.

    python docs/build.py                    # everything; the site is in build/docs/html
    python docs/build.py --smoke            # less the longest notebooks, for CI
    python -m http.server -d build/docs/html

Five steps, each of which ends the build where it fails: the notebooks are run, two at a
time, and their results kept in build/docs; Sphinx makes the pages, any warning being an
error; the Python of all other pages is run, blocks of a page one after another, and the
examples with prompts compared; every link, anchor and file of the site is looked up, of
which none may come from elsewhere; pytest runs the examples of all docstrings, and
looks for public names without a page (not with --smoke: the tests have done that). At
the end the pages are listed with the seconds that each took.
"""

from __future__ import annotations

import argparse
import doctest
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The sources of all pages."""
    return sorted(p for p in DOCS.rglob("*.md") if "_static" not in p.parts)


def is_notebook(page: Path) -> bool:
    """Whether a page is run as a notebook."""
    return page.read_text(encoding="utf-8").startswith("---\nfile_format: mystnb")


def execute(jobs: int) -> dict[str, float]:
    """Runs the notebooks that are not in the cache yet; returns seconds by page."""
    import conf
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from jupyter_cache.executors.utils import single_nb_execution
    from myst_nb.core.read import read_myst_markdown_notebook

    cache = get_cache(conf.nb_execution_cache_path)
    seconds: dict[str, float] = {}
    todo = []
    for page in filter(is_notebook, pages()):
        name = page.relative_to(DOCS).as_posix()
        notebook = read_myst_markdown_notebook(page.read_text(encoding="utf-8"))
        if any(fnmatch(name, pattern) for pattern in conf.nb_execution_excludepatterns):
            continue
        try:
            record = cache.match_cache_notebook(notebook)
            seconds[name] = record.data.get("execution_seconds", 0.0)
        except KeyError:
            todo.append((name, page, notebook))

    def run(job):
        name, page, notebook = job
        with tempfile.TemporaryDirectory() as folder:
            result = single_nb_execution(
                notebook,
                folder,
                conf.nb_execution_timeout,
                allow_errors=False,
                startup_timeout=180,
            )
        return name, page, notebook, result

    with ThreadPoolExecutor(jobs) as pool:
        for name, page, notebook, result in pool.map(run, todo):
            if result.err is not None:
                sys.exit(f"{page}: a cell failed\n{result.exc_string}")
            print(f"  {name}: {result.time:.1f} s", flush=True)
            seconds[name] = result.time
            data = {"execution_seconds": result.time}
            bundle = CacheBundleIn(notebook, str(page), data=data)
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return seconds


def sphinx(out: Path) -> None:
    """Makes the pages; a warning is an error."""
    # Everything is made anew: the reference depends on all of the library.
    if (out / ".buildinfo").exists():
        shutil.rmtree(out)
    command = [sys.executable, "-m", "sphinx", "-E", "-n", "-W", "--keep-going", "-q"]
    command += ["-b", "html", "-d", str(out.parent / "doctrees"), str(DOCS), str(out)]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("sphinx: failed")


def run_page(page: Path) -> float:
    """Runs the Python blocks of one page in an empty folder; returns seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = [sys.executable, __file__, "--page", str(page)]
        done = subprocess.run(code, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{page}: its Python fails\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def run_blocks(page: Path) -> int:
    """Runs the blocks of a page in this process; examples with prompts are compared."""
    space: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    failed = 0
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        if ">>> " in match[1]:
            test = doctest.DocTestParser().get_doctest(
                match[1], space, page.name, str(page), line
            )
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            failed += runner.run(test, clear_globs=False).failed
            space = test.globs
        else:
            exec(compile("\n" * line + match[1], str(page), "exec"), space)
    return failed


class Page(html.parser.HTMLParser):
    """What a built page refers to, and what may be referred to in it."""

    def __init__(self, path: Path) -> None:
        """Reads a page."""
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes links and anchors."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        for name in ("href", "src"):
            if name in values:
                self.links.append((tag, values[name]))
        if tag == "img" and not values.get("alt"):
            self.links.append(("img without alt text", values.get("src", "")))


def check_links(out: Path) -> list[str]:
    """Looks up every link of the built site; returns what is wrong."""
    paths = [p for p in sorted(out.rglob("*.html")) if "_static" not in p.parts]
    site = {path: Page(path) for path in paths}
    wrong = []
    for path, page in site.items():
        where = path.relative_to(out)
        for tag, link in page.links:
            parts = urlsplit(link)
            if tag.startswith("img without"):
                wrong.append(f"{where}: {tag}: {link}")
            elif parts.scheme or parts.netloc:
                if tag != "a" and parts.scheme != "data":
                    wrong.append(f"{where}: <{tag}> comes from elsewhere: {link}")
            else:
                target = path.parent / unquote(parts.path) if parts.path else path
                target = Path(os.path.normpath(target))
                if not target.is_file():
                    wrong.append(f"{where}: there is no {link}")
                elif (
                    parts.fragment
                    and target in site
                    and unquote(parts.fragment) not in site[target].ids
                ):
                    wrong.append(f"{where}: there is no anchor {link}")
    for path in sorted(out.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        if found := re.search(r"(?:@import|url\()\s*['\"]?(https?:)?//[^)'\"]*", text):
            wrong.append(f"{path.relative_to(out)}: asks for {found[0]}")
    return wrong


def main() -> None:
    """Builds the site."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs" / "html")
    parser.add_argument(
        "--smoke", action="store_true", help="less the longest notebooks"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--page", type=Path, help="run the Python of one page alone")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sys.path[:0] = [str(DOCS), str(ROOT)]
    if options.page:
        sys.exit(run_blocks(options.page))
    if options.smoke:
        os.environ["JLSTM_DOCS"] = "smoke"
    out = options.out.resolve()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s  {text}", flush=True)

    start = time.perf_counter()
    say("notebooks")
    seconds = execute(options.jobs)
    say("pages")
    sphinx(out)
    say("Python of the other pages")
    others = [p for p in pages() if not is_notebook(p)]
    others = [p for p in others if BLOCK.search(p.read_text(encoding="utf-8"))]
    with ThreadPoolExecutor(options.jobs) as pool:
        times = dict(zip(others, pool.map(run_page, others), strict=True))
    say("links")
    if wrong := check_links(out):
        sys.exit("\n".join(wrong))
    if not options.smoke:
        say("examples of docstrings")
        command = [sys.executable, "-m", "pytest", "-q", "--doctest-modules"]
        if subprocess.run(
            [*command, "jlstm", "tests/test_docs.py"], cwd=ROOT
        ).returncode:
            sys.exit("docstrings: failed")
    read = json.loads((out.parent / "seconds.json").read_text(encoding="utf-8"))
    print(f"\n{'page':40} {'made':>6} {'run':>6}  seconds")
    for page in pages():
        name = page.relative_to(DOCS).as_posix()
        run = seconds.get(name, times.get(page))
        ran = f"{run:6.1f}" if run is not None else 6 * " "
        print(f"{name:40} {read.get(name.removesuffix('.md'), 0):6.1f} {ran}")
    print(f"\n{len(pages())} pages in {time.perf_counter() - start:.0f} s: {out}")


if __name__ == "__main__":
    main()
