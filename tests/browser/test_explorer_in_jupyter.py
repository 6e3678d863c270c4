"""The explorer in a real JupyterLab and Notebook 7, step by step; the tests build on each other, in order."""

import re

import pytest
from playwright.sync_api import Locator, expect

from .conftest import SHOTS, Visit, watched
from .hosts import PAGES


def explorer(visit: Visit, number: int = 0) -> Locator:
    """The explorer of a cell (0: one student, 1: two runs, 2: hostile text), scrolled into sight."""
    found = visit.cell(number).locator(".tgpo-explorer")
    found.wait_for()
    return found


def card(widget: Locator, number: int = 0) -> Locator:
    return widget.locator(".card").nth(number)


def token(widget: Locator, position: int, number: int = 0) -> Locator:
    return card(widget, number).locator(".token").nth(position)


def test_no_cell_failed(visit):
    expect(visit.page.locator(".jp-OutputArea-output[data-mime-type*='error']")).to_have_count(0)


def test_no_news_is_fetched_or_offered(visit):
    """As `make lab` starts JupyterLab: no question about news in a corner, and no request for news or updates."""
    visit.page.wait_for_timeout(1000)
    expect(visit.page.locator(".Toastify__toast")).to_have_count(0)
    assert not [url for url in visit.asked if "/lab/api/news" in url or "/lab/api/update" in url]


def test_tokens_are_shown_with_colours_and_proposals(visit):
    widget = explorer(visit)
    expect(widget).to_have_attribute("data-theme", "light")
    first = token(widget, 0)
    expect(first.locator(".written")).to_have_text("␣the")
    expect(first.locator(".proposal")).to_have_text("<think>")
    background = first.locator(".written").evaluate("e => getComputedStyle(e).backgroundColor")
    neutral = token(widget, 1).locator(".written").evaluate("e => getComputedStyle(e).backgroundColor")
    assert background != neutral
    expect(widget.locator(".legend .scale span")).to_have_count(9)
    visit.shot("light")


def test_pointing_shows_the_detail(visit):
    widget = explorer(visit)
    token(widget, 6).hover()
    expect(widget.locator(".detail .place")).to_contain_text("token 7 of 8")
    expect(widget.locator(".top-lists table")).to_have_count(2)
    expect(widget.locator(".updates tbody tr")).not_to_have_count(0)
    token(widget, 5).hover()
    expect(widget.locator(".detail .place")).to_contain_text("token 6 of 8")


def test_a_click_locks_and_another_clears(visit):
    widget = explorer(visit)
    token(widget, 0).click()
    expect(token(widget, 0)).to_have_attribute("aria-selected", "true")
    token(widget, 3).hover()
    expect(widget.locator(".detail .place")).to_contain_text("token 1 of 8")
    expect(widget.locator(".detail .state")).to_have_text("locked")
    expect(widget.locator(".is-written").first).to_contain_text("␣the")
    visit.shot("light-locked")
    token(widget, 0).click()
    expect(token(widget, 0)).to_have_attribute("aria-selected", "false")


def test_the_keyboard_does_it_all_and_leaves_the_notebook_alone(visit):
    widget, keys = explorer(visit), visit.page.keyboard
    cells = visit.page.locator(".jp-CodeCell").count()
    token(widget, 0).focus()
    keys.press("ArrowRight")
    expect(token(widget, 1)).to_be_focused()
    keys.press("End")
    expect(token(widget, 7)).to_be_focused()
    keys.press("Home")
    keys.press("d")
    keys.press("Shift+D")
    keys.press("d")
    expect(widget.locator(".token:focus")).to_have_class(re.compile("differs"))
    expect(widget.locator(".token:focus")).to_have_attribute("aria-label", re.compile("the teacher would write"))
    spoken = widget.locator(".spoken")
    expect(spoken).to_contain_text(re.compile(r"Reverse-KL reward .* nats\. Student: .* Teacher: .*"))
    keys.press("Enter")
    expect(widget.locator('.token[aria-selected="true"]')).to_have_count(1)
    expect(spoken).to_contain_text("Locked: token")
    keys.press("Home")
    keys.press("Space")
    expect(token(widget, 0)).to_have_attribute("aria-selected", "true")
    expect(widget.locator('.token[aria-selected="true"]')).to_have_count(2)
    keys.press("Space")
    expect(widget.locator('.token[aria-selected="true"]')).to_have_count(1)
    keys.press("d")
    keys.press("Shift+ArrowRight")
    expect(widget.locator('.token[aria-selected="true"]')).to_have_count(2)
    keys.press("Escape")
    expect(widget.locator('.token[aria-selected="true"]')).to_have_count(0)
    assert visit.page.locator(".jp-CodeCell").count() == cells, "a key reached the notebook"
    assert token(widget, 1).get_attribute("role") == "option"
    assert widget.locator('.token[tabindex="0"]').count() == 1, "one stop of the tab key for each list"


def test_the_quantity_recolours(visit):
    widget = explorer(visit)
    before = token(widget, 0).locator(".written").get_attribute("class")
    widget.get_by_role("combobox", name="Colour", exact=True).select_option("student_entropy")
    expect(token(widget, 0).locator(".written")).not_to_have_class(before)
    expect(widget.locator(".legend")).to_contain_text("undecided")
    widget.get_by_role("combobox", name="Colour", exact=True).select_option("token_reward")
    expect(token(widget, 0).locator(".written")).to_have_class(before)


def test_the_teachers_token_opens_a_branch_with_its_reward(visit):
    widget = explorer(visit)
    token(widget, 0).click()
    widget.get_by_role("button", name="Take the teacher’s token <think>").click()
    expect(widget.locator(".card")).to_have_count(2)
    branch = card(widget, 1)
    expect(branch.locator(".badge")).to_have_text("reward 1")
    expect(branch.locator(".facts")).to_contain_text("8 of 8 continuations right")
    expect(token(widget, 0, 1).locator(".written")).to_have_text("<think>")
    expect(card(widget, 0).locator(".badge")).to_have_text("reward 0")
    expect(widget.locator(".spoken")).to_contain_text("branch 1 with <think>: reward 1; 8 of 8 continuations right")
    visit.shot("light-branch")


def test_any_other_token_can_be_taken_and_undone(visit):
    widget = explorer(visit)
    token(widget, 4).click()
    widget.locator(".top-lists .take:visible").first.click()
    expect(widget.locator(".card")).to_have_count(3)
    widget.get_by_role("button", name="Undo branch").click()
    expect(widget.locator(".card")).to_have_count(2)
    card(widget, 1).get_by_role("button", name=re.compile("Close")).click()
    expect(widget.locator(".card")).to_have_count(1)
    card(widget).get_by_role("combobox", name="Response in this card", exact=True).select_option("0:b1")
    expect(card(widget).locator(".badge")).to_have_text("reward 1")


def test_many_responses_can_be_sorted_and_one_opened(visit):
    widget = explorer(visit)
    widget.get_by_role("combobox", name="View", exact=True).select_option("heatmap")
    rows = widget.locator(".heatmap-row")
    expect(rows).to_have_count(9)  # eight samples and the branch
    widget.get_by_role("combobox", name="Sort", exact=True).select_option("length")
    expect(rows.first).to_have_attribute("data-response", "0:b1")
    widget.get_by_role("combobox", name="Sort", exact=True).select_option("reward")
    expect(rows.first).to_have_attribute("data-response", "0:b1")
    visit.shot("light-heatmap")
    rows.first.focus()
    visit.page.keyboard.press("ArrowDown")
    expect(rows.nth(1)).to_be_focused()
    opened = rows.nth(1).get_attribute("data-response")
    visit.page.keyboard.press("Enter")
    expect(card(widget)).to_have_attribute("data-response", opened)
    card(widget).get_by_role("combobox", name="Response in this card", exact=True).select_option("0:0")
    expect(card(widget)).to_have_attribute("data-response", "0:0")


def test_the_slider_moves_both_runs_and_play_goes_on(visit):
    widget = explorer(visit, 1)
    expect(widget.locator(".card")).to_have_count(2)
    expect(card(widget).locator(".facts")).to_contain_text("student of step 0")
    slider = widget.get_by_role("slider", name="Step")
    slider.focus()
    visit.page.keyboard.press("ArrowRight")
    expect(card(widget, 0).locator(".facts")).to_contain_text("student of step 1")
    expect(card(widget, 1).locator(".facts")).to_contain_text("student of step 1")
    expect(slider).to_be_focused()
    visit.shot("light-steps")
    widget.get_by_role("button", name="Play").click()
    expect(widget.locator(".step-shown")).to_have_text("4 of 4")
    expect(widget.get_by_role("button", name="Play")).to_be_visible()
    widget.get_by_label("new responses at each step").uncheck()
    texts = card(widget).locator(".tokens").inner_text()
    slider.focus()
    visit.page.keyboard.press("Home")
    expect(card(widget).locator(".facts")).to_contain_text("student of step 0")
    written = [text for text in card(widget).locator(".written").all_inner_texts()]
    assert all(text in texts for text in written), "the responses changed although they were kept"


def test_model_text_is_shown_and_never_interpreted(visit):
    widget = explorer(visit, 2)
    expect(token(widget, 0).locator(".written")).to_contain_text("<script>window.hacked=1</script></div><img")
    token(widget, 0).click()
    expect(widget.locator(".detail .big")).to_contain_text("<img src=x onerror=")
    assert widget.locator("img, script").count() == 0
    assert visit.page.evaluate("window.hacked") is None
    token(widget, 0).click()


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_the_hosts_theme_is_followed_at_once(visit, theme):
    page = visit.page
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {theme}$")).click()
    widget = explorer(visit)
    expect(widget).to_have_attribute("data-theme", theme.lower())
    token(widget, 0).hover()
    visit.shot(f"{theme.lower()}-theme")
    widget = explorer(visit, 1)
    visit.shot(f"{theme.lower()}-steps")
    colors = widget.evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]")
    panel = visit.cell(3).locator("svg[role=img]")
    colors.append(panel.evaluate("e => getComputedStyle(e.querySelector('#axes_1 [style*=currentColor]')).stroke"))
    ground, ink, ink_of_panel = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (ground < ink) == (ground < ink_of_panel) == (theme == "Dark")
    visit.cell(4).screenshot(path=SHOTS / f"{visit.host}-{theme.lower()}-panel.png")


def test_panels_are_shown(visit):
    for number in range(3, 6):
        cell = visit.cell(number)
        expect(cell.locator("svg[role=img]")).to_be_visible()
        expect(cell.locator(".widget-slider, .widget-select, .widget-inline-hbox").first).to_be_visible()
        cell.screenshot(path=SHOTS / f"{visit.host}-panel-{number - 2}.png")


def test_python_reads_what_was_done_on_the_page(visit, folder):
    widget = explorer(visit)
    token(widget, 1).click()
    expect(token(widget, 1)).to_have_attribute("aria-selected", "true")
    last = visit.page.locator(".jp-CodeCell").last
    last.scroll_into_view_if_needed()
    last.locator(".cm-content").click()
    visit.page.keyboard.press("Control+Enter")
    output = last.locator(".jp-OutputArea-output")
    expect(output).to_contain_text("('0:b1', 0, 1.0, 8)")
    expect(output).to_contain_text("selected ['␣sum']")
    expect(output).to_contain_text("saved saved.html")
    assert (folder / "saved.html").stat().st_size > 10_000


def test_a_saved_notebook_shows_the_static_table(browser, host, address):
    """Before its kernel has run anything, and untrusted, so that JupyterLab cleans the HTML."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    fresh = watched(context, host)
    fresh.page.goto(f"{address}/{PAGES[host].format('saved.ipynb')}")
    output = fresh.page.locator(".jp-OutputArea-output")
    expect(output).to_contain_text("2 of 2 continuations right")
    expect(output.locator("sup").first).to_have_text("<think>")
    token = output.locator("span[title]").first
    assert token.evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"
    fresh.shot("saved-notebook")
    assert fresh.strangers == []
    context.close()


def test_nothing_was_asked_beyond_the_loopback_and_nothing_failed(visit):
    assert visit.strangers == []
    # Notebook 7.6 loads its shortcuts before their settings are there, with or without a widget.
    known = "reading 'schema'" if visit.host == "notebook7" else None
    assert [error for error in visit.errors if not (known and known in error)] == []
