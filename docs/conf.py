"""Sphinx's settings. This file is copied beside the pages, so paths are relative to docs/_build/src."""
import configparser, re
from pathlib import Path

_src = Path(__file__).resolve().parent
_root = next(p for p in _src.parents if (p/"settings.ini").exists())
_ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
_ini.read(_root/"settings.ini", encoding="utf-8")
_cfg = _ini["DEFAULT"]

project, author, version = _cfg["title"], _cfg["author"], _cfg["version"]
release, copyright, language = version, _cfg["copyright"], "en"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns, templates_path = ["_*"], ["_templates"]
root_doc = "index"

# Notebooks are committed with their outputs: a page shows what was measured, the build runs nothing.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "Code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

add_module_names = False
python_maximum_signature_line_length = 74
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
nitpicky = True

# One file beside the pages; without MathJax's menu and its speech engine, which would fetch more files.
mathjax_path = "mathjax-tex-svg.js"
mathjax3_config = mathjax4_config = {
    "options": {"enableMenu": False},
    "svg": {"fontCache": "global", "displayAlign": "center"},
    "tex": {"tags": "none"},
}

html_theme, html_title, html_short_title = "furo", project, project
html_baseurl = _cfg["doc_host"] + _cfg["doc_baseurl"] + "/"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_favicon = "_static/favicon.svg"
html_show_sourcelink = html_copy_source = False
html_permalinks_icon = "#"
pygments_style, pygments_dark_style = "friendly", "one-dark"
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-bash pre, div.highlight-python pre, div.highlight-sh pre"
copybutton_prompt_text, copybutton_prompt_is_regexp = r"\$ |>>> |\.\.\. ", True
suppress_warnings = ["mystnb.unknown_mime_type"]

_font = 'system-ui, -apple-system, "Segoe UI", "Inter", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif'
_mono = 'ui-monospace, "SF Mono", SFMono-Regular, "JetBrains Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace'
html_theme_options = {
    "light_css_variables": {
        "font-stack": _font, "font-stack--monospace": _mono,
        "color-foreground-primary": "#1b2330", "color-foreground-secondary": "#4a5568", "color-foreground-muted": "#667085",
        "color-background-primary": "#ffffff", "color-background-secondary": "#f7f8fa", "color-background-border": "#e6e9ef",
        "color-background-hover": "#eef1f6",
        "color-brand-primary": "#0b6e6e", "color-brand-content": "#0b6e6e", "color-brand-visited": "#0b6e6e",
        "color-api-name": "#0b6e6e", "color-api-pre-name": "#667085", "color-problematic": "#b4432c",
        "color-inline-code-background": "#f1f4f7", "color-highlight-on-target": "#fff6d6",
    },
    "dark_css_variables": {
        "color-foreground-primary": "#d9dee7", "color-foreground-secondary": "#a7b0be", "color-foreground-muted": "#8791a1",
        "color-background-primary": "#12161c", "color-background-secondary": "#171c24", "color-background-border": "#2a313c",
        "color-background-hover": "#1f2630",
        "color-brand-primary": "#5fc9c0", "color-brand-content": "#5fc9c0", "color-brand-visited": "#5fc9c0",
        "color-api-name": "#5fc9c0", "color-api-pre-name": "#8791a1", "color-problematic": "#ee8a72",
        "color-inline-code-background": "#1f2630", "color-highlight-on-target": "#3a3413",
    },
}

def _page(app, pagename, templatename, context, doctree):
    "What the templates need to know: where the page's notebook is"
    files = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower()): p.name for p in (_root/_cfg["nbs_path"]).glob("*.ipynb")}
    if nb := files.get(pagename):
        path = f"{_cfg['user']}/{_cfg['repo']}/blob/{_cfg['branch']}/{_cfg['nbs_path']}/{nb}"
        context["colab_url"], context["notebook_url"] = f"https://colab.research.google.com/github/{path}", f"https://github.com/{path}"
    context["is_front"] = pagename == root_doc

def setup(app):
    app.connect("html-page-context", _page)
    return {"parallel_read_safe": True}
