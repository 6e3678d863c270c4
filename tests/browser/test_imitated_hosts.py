"""VS Code and Colab, imitated: they cannot be run here, so these pages have what they are known to give a widget.

VS Code (microsoft/vscode, microsoft/vscode-jupyter): the theme as class and data-vscode-theme-kind of the body and as
CSS variables, styles for all tables and code, and a white box around every widget. Colab (googlecolab/colabtools#1214):
an attribute of the root element, and google.colab. The widget's module is loaded as anywidget loads it, from a blob.
"""

import re

import pytest
from playwright.sync_api import expect

from .conftest import watched
from .widget_page import load_widget

VSCODE = """<!doctype html>
<html style="--vscode-editor-background: #1e1e1e; --vscode-editor-foreground: #d4d4d4">
<head><style>
html { background: var(--vscode-editor-background); }
body { color: var(--vscode-editor-foreground); }
code { color: #d7ba7d; background-color: rgba(255, 0, 0, 0.4); padding: 1px 3px; }
thead { background-color: rgba(130, 130, 130, 0.16); }
table, th, td { border: none !important; text-align: left !important; }
th, td { padding: 4px 8px; }
tr:nth-child(even) { background-color: rgba(130, 130, 130, 0.08); }
.cell-output-ipywidget-background { background: white !important; }
</style></head>
<body class="vscode-dark" data-vscode-theme-kind="vscode-dark" data-vscode-theme-name="Dark Modern">
<div id="container"><div class="output cell-output-ipywidget-background">
<div class="cell-output-ipywidget-background"><div class="cell-output"></div><div id="widget"></div></div>
</div></div></body></html>"""
COLAB = """<!doctype html>
<html theme="dark"><head><style>body { margin: 0; color: #e3e3e3; font-family: Roboto, sans-serif; }</style>
<script>window.google = { colab: { kernel: {} } };</script></head>
<body><div id="output-body"><colab-lumino-adapter><div id="widget"></div></colab-lumino-adapter></div></body></html>"""


@pytest.fixture
def host_page(request, browser, explored):
    """The explorer in an imitated host whose user's system has the other colours than the host."""
    context = browser.new_context(viewport={"width": 900, "height": 900}, color_scheme="light")
    visit = watched(context, request.node.callspec.params["name"])
    visit.page.set_content(request.param)
    load_widget(visit.page, explored)
    yield visit
    assert visit.errors == [] and visit.strangers == []
    context.close()


def ground(locator) -> str:
    return locator.evaluate("e => getComputedStyle(e).backgroundColor")


@pytest.mark.parametrize(("host_page", "name"), [(VSCODE, "vscode"), (COLAB, "colab")], indirect=["host_page"])
def test_the_explorer_works_in_the_hosts_dark_theme(host_page, name):
    widget = host_page.page.locator(".tgpo-explorer")
    expect(widget).to_have_attribute("data-theme", "dark")
    token = widget.locator(".token")
    token.nth(6).hover()
    expect(widget.locator(".detail .place")).to_contain_text("token 7 of 8")
    token.first.click()
    expect(widget.locator(".detail .state")).to_have_text("locked")
    widget.get_by_role("button", name=re.compile("Take the teacher’s token")).click()
    taken = {"kind": "take", "name": "0:0", "position": 0, "token": host_page.page.evaluate("window.sent[0].token")}
    assert host_page.page.evaluate("window.sent") == [taken]
    host_page.page.mouse.move(0, 0)
    host_page.shot("dark", full_page=True)


@pytest.mark.parametrize(("host_page", "name"), [(VSCODE, "vscode")], indirect=["host_page"])
def test_vs_codes_styles_and_white_box_leave_the_explorer_alone(host_page, name):
    page = host_page.page
    page.locator(".token").first.hover()
    for box in page.locator(".cell-output-ipywidget-background").all():
        assert ground(box) == "rgba(0, 0, 0, 0)"
    for part in (
        ".detail code",
        ".top-lists thead",
        ".top-lists tbody tr:nth-child(2)",
        ".updates tbody tr:nth-child(2)",
    ):
        assert ground(page.locator(part).first) == "rgba(0, 0, 0, 0)", part
    assert page.locator(".detail code").first.evaluate("e => getComputedStyle(e).color") == "rgb(230, 230, 230)"


@pytest.mark.parametrize(("host_page", "name"), [(VSCODE, "vscode")], indirect=["host_page"])
@pytest.mark.parametrize(
    ("kind", "classes", "theme", "contrast"),
    [
        ("vscode-light", "vscode-light", "light", "normal"),
        ("vscode-high-contrast", "vscode-high-contrast", "dark", "more"),
        ("vscode-high-contrast-light", "vscode-high-contrast-light vscode-high-contrast", "light", "more"),
    ],
)
def test_vs_codes_themes_are_followed_at_once(host_page, name, kind, classes, theme, contrast):
    page = host_page.page
    widget = page.locator(".tgpo-explorer")
    expect(widget).to_have_attribute("data-theme", "dark")
    switch = "([kind, classes]) => { document.body.className = classes; document.body.dataset.vscodeThemeKind = kind; }"
    page.evaluate(switch, [kind, classes])
    expect(widget).to_have_attribute("data-theme", theme)
    expect(widget).to_have_attribute("data-contrast", contrast)
    ink = widget.evaluate("e => getComputedStyle(e).color")
    assert (ink in ("rgb(0, 0, 0)", "rgb(255, 255, 255)")) == (contrast == "more")
    host_page.shot(kind, full_page=True)


@pytest.mark.parametrize(("host_page", "name"), [(COLAB, "colab")], indirect=["host_page"])
def test_colabs_themes_are_followed_at_once(host_page, name):
    page = host_page.page
    widget = page.locator(".tgpo-explorer")
    page.emulate_media(color_scheme="dark")  # of the system: it does not matter
    for value, theme in (("default", "light"), ("dark", "dark"), (None, "light")):
        page.evaluate(
            "value => value ? document.documentElement.setAttribute('theme', value)"
            " : document.documentElement.removeAttribute('theme')",
            value,
        )
        expect(widget).to_have_attribute("data-theme", theme)
    host_page.shot("light", full_page=True)


def test_a_host_that_drops_styles_still_shows_colours(browser, explored):
    """GitHub: the saved output without any style; a picture of the colour stands before each token."""
    context = browser.new_context(viewport={"width": 900, "height": 500}, offline=True)
    visit = watched(context)
    html = explored._repr_mimebundle_()[0]["text/html"]
    visit.page.set_content(re.sub(r' style="[^"]*"', "", html))
    swatches = visit.page.locator("span[title]")
    shown = visit.page.locator("img")
    expect(shown.first).to_be_visible()
    assert shown.count() == swatches.count() + 9  # and the legend's
    assert shown.last.evaluate("e => e.naturalWidth") == 1
    visit.shot("without-styles")
    visit.page.set_content(html)
    expect(visit.page.locator("img").first).to_be_hidden()
    visit.shot("with-styles")
    context.close()
