"""The file that save_html writes, opened from the disk without a network."""

import re

import pytest
from playwright.sync_api import expect

from .conftest import watched


@pytest.fixture(scope="module")
def saved(explored, tmp_path_factory):
    return explored.save_html(tmp_path_factory.mktemp("saved") / "page.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 320])
def test_the_saved_file_works_alone_and_offline(browser, saved, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    alone = watched(context)
    alone.page.goto(saved.as_uri())
    widget = alone.page.locator(".tgpo-explorer")
    expect(widget).to_have_attribute("data-theme", scheme)
    first = widget.locator(".card").first.locator(".token")
    expect(first).to_have_count(8)
    first.first.click()
    expect(widget.locator(".detail .state")).to_have_text("locked")
    expect(widget.get_by_role("button", name=re.compile("Take the teacher"))).to_be_disabled()
    alone.shot(f"saved-{scheme}-{width}", full_page=True)
    scrolls = alone.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not scrolls, "the page is wider than the screen"
    cut = widget.locator(".scroll").evaluate("e => e.scrollWidth > e.clientWidth")
    assert not cut, "bars of a method are out of sight"
    widget.get_by_role("combobox", name="View", exact=True).select_option("heatmap")
    expect(widget.locator(".heatmap-row")).to_have_count(3)
    alone.shot(f"saved-{scheme}-{width}-heatmap", full_page=True)
    assert alone.errors == [] and alone.strangers == []
    context.close()
