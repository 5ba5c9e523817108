"""The built site, opened in a real browser that can reach this machine only.

`make test` builds the site first. Chromium is taken from CHROMIUM or the usual places; where there is none these tests
skip, except under CI=true, where they fail.
"""
import http.server, os, re, shutil, subprocess, sys, threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

root = Path(__file__).resolve().parent.parent
html = root/"docs"/"_build"/"html"
names = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()
flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}

def unavailable(reason):
    if os.environ.get("CI") == "true": pytest.fail(f"{reason} (CI=true: this may not be skipped)")
    pytest.skip(reason)

@pytest.fixture(scope="module")
def site():
    "The built site, newer than its sources"
    sources = [*(root/"nbs").glob("*.ipynb"), *(root/"docs").glob("*.py"), *(root/"docs"/"_static").glob("*"), *(root/"docs"/"_templates").rglob("*.html")]
    front = html/"index.html"
    if not front.exists() or front.stat().st_mtime < max(f.stat().st_mtime for f in sources):
        r = subprocess.run([sys.executable, "-W", "ignore", root/"docs"/"build.py", "--strict"], capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr[-4000:]
    return html

@pytest.fixture(scope="module")
def server(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(site))
        def log_message(self, *a): pass
    srv = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{srv.server_address[1]}"
    srv.shutdown()

@pytest.fixture(scope="module")
def browser():
    exe = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if exe is None: unavailable(f"no Chromium found: none of {', '.join(names)} is on PATH and CHROMIUM is not set")
    try: from playwright.sync_api import sync_playwright
    except ImportError: unavailable("playwright is not installed: pip install -e '.[dev]'")
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=flags)
        yield b
        b.close()

class Visit:
    "A page, with what the browser complained about and what it asked other hosts for"
    def __init__(self, browser, base, size, scheme="light"):
        self.base, self.complaints, self.foreign = base, [], []
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.context.route("**/*", self.route)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(f"exception: {e}"))
        self.page.on("response", lambda r: self.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    def route(self, route):
        url = route.request.url
        if url.startswith(self.base) or urlsplit(url).scheme in ("data", "blob", "about"): return route.continue_()
        self.foreign.append(url); route.abort()
    def open(self, path):
        self.page.goto(f"{self.base}/{path}", wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        return self.page

@pytest.fixture
def visit(browser, server):
    made = []
    def f(size=DESK, scheme="light"):
        made.append(Visit(browser, server, size, scheme))
        return made[-1]
    yield f
    for v in made: v.context.close()

def pages(): return sorted(p.name for p in html.glob("*.html"))

# An element sticks out if its right edge is past the window and no box around it scrolls or hides.
sticks_out = """() => {
  const w = document.documentElement.clientWidth, bad = [];
  const boxed = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= w + 1
        && !p.matches('.content, .main, .page, article')) return true; return false; };
  for (const e of document.querySelectorAll('.main *')) {
    const r = e.getBoundingClientRect();
    if (r.width && r.right > w + 1 && !boxed(e) && !e.closest('.toc-drawer, mjx-assistive-mml'))
      bad.push(e.tagName + '.' + (e.getAttribute('class') || '') + ': ' + Math.round(r.right) + ' px, ' + (e.textContent || '').trim().slice(0, 50));
  }
  return [document.documentElement.scrollWidth - w, bad.slice(0, 5)];
}"""

def test_every_notebook_has_its_page(site):
    expected = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", f.stem.lower()) + ".html" for f in (root/"nbs").glob("*.ipynb") if f.name[0] not in "._"}
    assert expected <= set(pages())
    assert {"index.html", "search.html", "genindex.html"} <= set(pages())

def test_no_file_names_another_host_as_source(site):
    "Also without a browser: nothing that is loaded may come from elsewhere"
    loads = re.compile(r"""(?:<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc|<link\b(?![^>]*rel="(?:canonical|next|prev)")[^>]*?\bhref)\s*=\s*["'](?:https?:)?//[^"']+""", re.I)
    for f in site.rglob("*.html"):
        found = loads.findall(f.read_text(encoding="utf-8"))
        assert not found, f"{f.name}: {found[:3]}"
    for f in site.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+", f.read_text(encoding="utf-8"))
        assert not found, f"{f.name}: {found[:3]}"

def test_pages_hold_no_paths_of_this_machine(site):
    home = {str(root), str(Path.home())} - {"/", "/root"}
    for f in site.glob("*.html"):
        text = f.read_text(encoding="utf-8")
        assert not any(h in text for h in home), f"{f.name} names a folder of this machine"

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_opens_quietly_on_a_desk(site, visit, scheme):
    v, tex = visit(DESK, scheme), 0
    for name in pages():
        page = v.open(name)
        assert not v.complaints, f"{name}: {v.complaints}"
        assert not v.foreign, f"{name} asked other hosts: {v.foreign}"
        formulas, drawn, broken = page.evaluate("""() => [document.querySelectorAll('.math').length, document.querySelectorAll('.math mjx-container svg').length,
            [...document.querySelectorAll('mjx-merror, [data-mjx-error], .math g[data-mml-node="merror"]')].map(e => e.textContent)]""")
        assert drawn >= formulas and not broken, f"{name}: {drawn} of {formulas} formulas drawn, errors: {broken}"
        raw = page.evaluate(r"""() => { const t = [...document.querySelectorAll('article p, article td, article li, dd')].filter(e => !e.closest('pre, .cell_output'))
            .map(e => { const c = e.cloneNode(true); c.querySelectorAll('code, mjx-container, .math').forEach(x => x.remove()); return c.textContent; })
            return t.filter(s => /\$[^\s$][^$]*\\[a-z]+[^$]*\$|\{py:\w+\}/.test(s)).slice(0, 3); }""")
        assert not raw, f"{name} shows TeX or markup unrendered: {raw}"
        over, bad = page.evaluate(sticks_out)
        assert over <= 0 and not bad, f"{name} is wider than the window by {over} px: {bad}"
        assert page.evaluate("() => [...document.images].every(i => i.complete && i.naturalWidth > 0)"), f"{name}: an image does not load"
        tex += formulas
    assert tex, "no page has mathematics"

def test_no_page_scrolls_sideways_on_a_phone(site, visit):
    v = visit(PHONE)
    for name in pages():
        over, bad = v.open(name).evaluate(sticks_out)
        assert over <= 0 and not bad, f"{name} is wider than {PHONE['width']} px by {over} px: {bad}"
        assert not v.complaints and not v.foreign, f"{name}: {v.complaints + v.foreign}"

def test_folded_parts_fit_a_phone_too(site, visit):
    v = visit(PHONE)
    for name in pages():
        page = v.open(name)
        page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
        over, bad = page.evaluate(sticks_out)
        assert over <= 0 and not bad, f"{name} with everything unfolded sticks out by {over} px: {bad}"

def test_search_finds_the_callback(site, visit):
    if not (html/"mixmatch.html").exists(): pytest.skip("there is no page on MixMatch")
    v = visit()
    page = v.open("index.html")
    page.fill("input.sidebar-search", "MixMatchCallback")
    page.press("input.sidebar-search", "Enter")
    page.wait_for_selector("#search-results .search li a")
    page.wait_for_function("() => /finished|found/i.test(document.querySelector('#search-results').textContent)")
    first = page.locator("#search-results .search li a").first
    assert "MixMatchCallback" in first.inner_text()
    first.click()
    page.wait_for_url("**/mixmatch.html*")
    assert page.locator("dt[id='ssl_notes.mixmatch.MixMatchCallback']").is_visible()
    # Sphinx's search looks for `#a.b` and finds no summary for a name with dots; it says so if it gets that far in time.
    complaints = [o for o in v.complaints if "Anchored content block not found" not in o]
    assert not complaints and not v.foreign, complaints + v.foreign

def test_dark_mode_is_a_button_and_readable(site, visit):
    v = visit()
    page = v.open("index.html")
    lum = """() => { const c = s => s.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        const l = s => { const [r, g, b] = c(s); return .2126 * r + .7152 * g + .0722 * b };
        const bg = getComputedStyle(document.body).backgroundColor, fg = getComputedStyle(document.querySelector('article p')).color;
        const [a, b] = [l(bg), l(fg)].sort((x, y) => y - x); return [l(bg), (a + .05) / (b + .05)]; }"""
    seen = {}
    for _ in range(3):
        seen[page.evaluate("() => document.body.dataset.theme")] = page.evaluate(lum)
        page.locator(".theme-toggle-content button.theme-toggle").click()
        page.wait_for_timeout(300)
    assert {"light", "dark"} <= set(seen), seen
    assert seen["light"][0] > .9 and seen["dark"][0] < .05, seen
    assert all(contrast > 7 for _, contrast in seen.values()), seen

def test_every_notebook_page_opens_in_colab(site, visit):
    page_of = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", f.stem.lower()): f.name for f in (root/"nbs").glob("*.ipynb") if f.name[0] not in "._"}
    for name, nb in page_of.items():
        text = (html/f"{name}.html").read_text(encoding="utf-8")
        assert re.search(rf'href="https://colab\.research\.google\.com/github/[\w./-]+/nbs/{re.escape(nb)}"', text), f"{name}.html has no Colab button"

def test_source_and_names_are_on_the_method_page(site):
    if not (html/"mixmatch.html").exists(): pytest.skip("there is no page on MixMatch")
    text = (html/"mixmatch.html").read_text(encoding="utf-8")
    assert "tag_equation-code" in text, "the code of the equations is not shown"
    assert 'class="docments' in text, "no table of arguments"
    assert re.search(r'href="https://(docs\.fast\.ai|(docs\.)?pytorch\.org)/', text), "no link to fastai or torch"
    assert (html/"objects.inv").exists()
