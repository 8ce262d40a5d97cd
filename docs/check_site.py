"""Opens every page of the built site in a browser, and says what is wrong.

    pip install playwright            # and a Chromium, such as apt install chromium
    python docs/check_site.py --shots /tmp/shots

At three widths, in light and in dark: no error in the console, no request that fails or
goes elsewhere, all mathematics rendered, all images there and with alt text, nothing
wider than the page; and the search finds "bidirectional". Pages of source are opened
once. Screenshots of whole pages go to the folder given. It ends with code 1 if anything
is wrong.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parents[1] / "build" / "docs" / "html"
WIDTHS = (375, 768, 1280)
MODES = ("light", "dark")
LOOK = r"""() => {
  const wrong = [];
  const article = document.querySelector("article") || document.body;
  const copy = article.cloneNode(true);
  copy.querySelectorAll("pre, code, script, .katex").forEach((e) => e.remove());
  const raw = copy.textContent.match(/\$\$|\\\(|\\\[|\\begin\{/);
  if (raw) wrong.push("raw mathematics: " + raw[0]);
  article.querySelectorAll(".math").forEach((e) => {
    if (!e.querySelector(".katex")) wrong.push("not rendered: " + e.textContent);
  });
  article.querySelectorAll(".katex-error").forEach((e) =>
    wrong.push("KaTeX: " + e.title));
  document.querySelectorAll("img").forEach((e) => {
    if (!e.alt.trim()) wrong.push("no alt text: " + e.src);
    if (!e.complete || !e.naturalWidth) wrong.push("no picture: " + e.src);
  });
  const width = document.documentElement.scrollWidth;
  if (width > window.innerWidth) {
    const scrolls = (e) => e && e !== document.documentElement &&
      (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
    const widest = [...document.body.querySelectorAll("*")].find((e) =>
      e.getBoundingClientRect().right > window.innerWidth + 1 &&
      !scrolls(e.parentElement));
    wrong.push(`${width} wide: ${widest ? widest.outerHTML.slice(0, 120) : "?"}`);
  }
  return wrong;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def listen(page: Any, base: str, wrong: list[str]) -> None:
    """Notes what a page complains of, and what it asks for."""

    def note(text: str) -> None:
        wrong.append(f"{page.url.removeprefix(base)}: {text}")

    page.on("console", lambda m: note(f"console: {m.text}") if m.type == "error" else 0)
    page.on("pageerror", lambda error: note(f"script: {error.stack or error}"))

    def failed(r: Any) -> None:
        if r.failure != "net::ERR_ABORTED":  # which is what leaving a page does
            note(f"failed, {r.failure}: {r.url}")

    page.on("requestfailed", failed)
    page.on("response", lambda r: note(f"{r.status}: {r.url}") if r.status > 399 else 0)

    def request(r: Any) -> None:
        if not r.url.startswith((base, "data:", "blob:")):
            note(f"asks elsewhere: {r.url}")

    page.on("request", request)


def check(site: Path, chromium: str, shots: Path | None) -> tuple[int, list[str]]:
    """Opens all pages; returns how many views there were, and what is wrong."""
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    names = sorted(
        path.relative_to(site).as_posix()
        for path in site.rglob("*.html")
        if "_static" not in path.parts
    )
    wrong: list[str] = []
    views = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        for width in WIDTHS:
            for mode in MODES:
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=mode
                )
                page = context.new_page()
                listen(page, base, wrong)
                for name in names:
                    once = name.startswith("_modules")
                    if once and (width, mode) != (WIDTHS[-1], MODES[0]):
                        continue
                    page.goto(base + name, wait_until="load")
                    where = f"{name} ({width}, {mode})"
                    wrong += [f"{where}: {text}" for text in page.evaluate(LOOK)]
                    theme = page.evaluate("document.documentElement.dataset.theme")
                    if theme != mode:
                        wrong.append(f"{where}: the theme is {theme}")
                    views += 1
                    if shots and not once:
                        path = shots / f"{width}-{mode}-{name.replace('/', '_')}.png"
                        page.screenshot(path=path, full_page=True)
                page.goto(f"{base}search.html?q=bidirectional")
                try:
                    page.wait_for_selector("#search-results li a", timeout=10_000)
                except Exception as error:
                    wrong.append(f"search ({width}, {mode}): {error}")
                context.close()
        browser.close()
    server.shutdown()
    return views, wrong


def main() -> None:
    """Checks the site."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    if not options.chromium:
        parser.error("--chromium: there is no chromium on the path; give its place")
    if not (options.site / "index.html").exists():
        parser.error(f"--site: {options.site} has no index.html; run docs/build.py")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    views, wrong = check(options.site, options.chromium, options.shots)
    print("\n".join(dict.fromkeys(wrong)))
    print(f"{views} views, {len(wrong)} wrong, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
