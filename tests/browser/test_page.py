"""The page's own part of the explorer, on a page without a host: what is hovered, locked, said, sent and kept."""

import re

import pytest
from playwright.sync_api import expect

from tgpo_lab.models.pairs import load_pair
from tgpo_lab.widgets import GuidanceExplorer

from .conftest import watched
from .widget_page import load_widget


@pytest.fixture
def show(browser):
    """Function that shows an explorer and returns the page; at the end nothing may have gone wrong."""
    context = browser.new_context(viewport={"width": 1000, "height": 900}, color_scheme="light")
    visit = watched(context)

    def show(explorer):
        visit.page.set_content('<!doctype html><html><body><div id="widget"></div></body></html>')
        load_widget(visit.page, explorer)
        return visit.page

    yield show
    assert visit.errors == [] and visit.strangers == []
    context.close()


def model(page, name):
    return page.evaluate("name => model.get(name)", name)


def test_pointing_at_another_token_makes_no_element(show, explored):
    """Otherwise the page would make hundreds at every move of the pointer."""
    page = show(explored)
    tokens = page.locator(".token")
    tokens.nth(9).hover()
    expect(page.locator(".detail .place")).to_contain_text("token 2 of 48")
    page.evaluate(
        """() => {
          window.made = 0;
          const count = (changes) => { for (const { addedNodes } of changes) window.made += addedNodes.length; };
          new MutationObserver(count).observe(document.body, { childList: true, subtree: true });
        }"""
    )
    for position in (20, 9, 30):
        tokens.nth(position).hover()
        expect(page.locator(".detail .place")).to_contain_text(f"token {position - 7} of 48")
    assert page.evaluate("window.made") == 0


def test_the_detail_is_of_the_scene_that_is_shown(show, explored):
    """A branch that is undone and taken anew has the name of the old one."""
    page = show(explored)
    page.locator(".token").first.hover()
    expect(page.locator(".detail .big")).to_have_text("␣the")
    first = str(explored.scene["responses"][0]["tokens"][0])
    scene = {**explored.scene, "texts": {**explored.scene["texts"], first: "new"}}
    page.evaluate("scene => model.receive({ scene })", scene)
    expect(page.locator(".token .written").first).to_have_text("new")
    expect(page.locator(".detail .big")).to_have_text("new")


def test_a_list_without_the_written_or_the_proposed_token_gets_it_with_its_rank(show):
    explorer = GuidanceExplorer(load_pair("far"), "91+47+11=", samples=2, top_k=1)
    page = show(explorer)
    page.locator(".token").first.hover()
    view, rows = explorer.response().view, []
    for table in page.locator(".top-lists table").all():
        rows.append([row.inner_text().split() for row in table.locator("tbody tr:visible").all()])
    student, teacher = rows
    assert [row[:3] for row in student] == [["1", "␣the", "written"], ["2", "<think>", "teacher’s"]]
    rank = str(int(view.teacher_ranks[0, 0]))
    assert [row[:3] for row in teacher] == [["1", "<think>", "teacher’s"], [rank, "␣the", "written"]]
    logprob = float(view.student_proposal_logprobs[0, 0])
    assert float(student[1][4].replace("−", "-")) == pytest.approx(logprob, abs=0.01)
    page.locator(".token").nth(1).hover()
    expect(page.locator(".top-lists tbody tr:visible")).to_have_count(2)


def test_keys_lock_add_and_clear(show, explored):
    page = show(explored)
    keys = page.keyboard
    page.locator(".token").first.focus()
    keys.press("Enter")
    assert (model(page, "selected_response"), model(page, "selected_positions")) == ("0:0", [0])
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    keys.press("Space")
    assert model(page, "selected_positions") == [0, 2]
    keys.press("Space")
    assert model(page, "selected_positions") == [0]
    keys.press("Enter")
    assert model(page, "selected_positions") == [2]
    keys.press("Shift+ArrowRight")
    assert model(page, "selected_positions") == [2, 3]
    keys.press("Escape")
    assert (model(page, "selected_response"), model(page, "selected_positions")) == ("", [])


@pytest.mark.parametrize("key", ["d", "D"])
def test_the_next_difference_is_found_with_small_and_capital_letters(show, explored, key):
    page = show(explored)
    tokens, best = (explored.scene["responses"][0][name] for name in ("tokens", "best"))
    places = [place for place, token in enumerate(tokens) if token != best[place]]
    page.locator(".token").first.focus()
    found = []
    for shift in (False, False, True):
        page.evaluate(
            """([key, shiftKey]) => document.activeElement.dispatchEvent(
              new KeyboardEvent("keydown", { key, shiftKey, bubbles: true }))""",
            [key, shift],
        )
        found.append(int(page.evaluate("document.activeElement.dataset.position")))
    assert found == [places[1], places[2], places[1]]


@pytest.mark.parametrize("key", ["t", "T"])
def test_a_key_takes_the_teachers_token(show, explored, key):
    page = show(explored)
    page.locator(".token").first.focus()
    page.keyboard.press(key)
    best = explored.scene["responses"][0]["best"][0]
    assert page.evaluate("window.sent") == [{"kind": "take", "name": "0:0", "position": 0, "token": best}]


def test_what_a_focused_token_is_called_and_what_is_said(show, explored):
    page = show(explored)
    first = page.locator(".token").first
    first.focus()
    expect(first).to_have_attribute(
        "aria-label", re.compile("^Token 1 of 8: .␣the.; the teacher would write .<think>.\\.$")
    )
    said = page.locator('[role="status"]')
    expect(said).to_have_text(
        re.compile("^Reverse-KL reward .* −14.22 nats. Student: .␣the. ≈ 1, .*Teacher: .<think>. ≈ 1, .*$")
    )
    assert said.get_attribute("aria-live") == "polite"
    page.keyboard.press("Enter")
    expect(said).to_have_text(re.compile("^Locked: token 1. Reverse-KL reward"))


def test_the_sliders_places_are_the_steps(show, explored):
    page = show(explored)
    page.evaluate("scene => model.receive({ scene })", {**explored.scene, "steps": [0, 5, 20]})
    slider = page.get_by_role("slider", name="Step")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert model(page, "step") == 5
    expect(page.locator(".step-shown")).to_have_text("5 of 20")
    expect(slider).to_have_attribute("aria-valuetext", "step 5")
    page.keyboard.press("End")
    assert model(page, "step") == 20


def test_one_scale_for_all_responses(show, explored):
    """Cells of one value have one colour in every card, in the heatmap's cells and in the legend."""
    page = show(explored)
    scene = {**explored.scene, "responses": [
        {**entry, "columns": {**entry["columns"], "token_reward": [-4.0] * len(entry["tokens"])}}
        for entry in explored.scene["responses"]
    ]}  # fmt: skip
    page.evaluate("scene => model.receive({ scene })", scene)
    expect(page.locator(".card").nth(1).locator(".written").first).to_have_class("written level-32")
    grounds = page.locator(".written, .legend .scale span:first-child").evaluate_all(
        "found => [...new Set(found.map((e) => getComputedStyle(e).backgroundColor))]"
    )
    assert len(grounds) == 1
    page.get_by_role("combobox", name="View", exact=True).select_option("heatmap")
    pixels = page.locator("canvas").evaluate_all(
        """found => [...new Set(found.map((canvas) => {
          const [red, green, blue] = canvas.getContext("2d").getImageData(1, 4, 1, 1).data;
          return `rgb(${red}, ${green}, ${blue})`;
        }))]"""
    )
    assert pixels == grounds


def test_a_refusal_of_python_is_said(show, explored):
    page = show(explored)
    page.locator(".token").first.focus()
    page.keyboard.press("t")
    expect(page.locator(".tgpo-explorer")).to_have_class(re.compile("busy"))
    page.evaluate("() => model.receive({ message: 'That cannot be <b>done</b>.' })")
    expect(page.get_by_role("alert")).to_have_text("That cannot be <b>done</b>.")
    expect(page.locator(".tgpo-explorer")).not_to_have_class(re.compile("busy"))
