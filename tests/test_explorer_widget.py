"""The explorer's state and pages, without a browser: what a change does, and that model text stays data."""

import json
import math
import re
import sys
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import traitlets
from anywidget import _util
from PIL import Image

from tgpo_lab.errors import InputError
from tgpo_lab.explorer.token_colors import LEVELS, cell_colors, palette
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.training import train
from tgpo_lab.widgets import GuidanceExplorer
from tgpo_lab.widgets.pages import SCRIPTS, fallback_page, legend_values, module_source, standalone_page
from tgpo_lab.widgets.quantities import BY_NAME, QUANTITIES, Quantity, place_on_scale, scaled_quantities
from tgpo_lab.widgets.scene import rounded

PROMPT, LIMIT = "1+2+4=", 12
HOSTILE = '</script><script>alert("x")</script></div>&amp;<!--\u2028'


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_config):
    config = tiny_config(
        tmp_path_factory.mktemp("widget"), checkpoint_every=1, keep_checkpoints=0, learning_rate=0.03, temperature=0.9
    )
    return train(config, show_progress=False).directory


@pytest.fixture
def explorer(pair):
    return GuidanceExplorer(pair, PROMPT, answer="7", samples=6, max_new_tokens=LIMIT, seed=1)


@pytest.fixture
def over_steps(pair, run_folder):
    return GuidanceExplorer(pair, run_folder, samples=4)


def entry(explorer, name):
    return next(e for e in explorer.scene["responses"] if e["name"] == name)


def difference(explorer):
    """Name and position of a token that the teacher would have written otherwise."""
    return next(
        (e["name"], p)
        for e in explorer.scene["responses"]
        for p, (written, best) in enumerate(zip(e["tokens"], e["best"], strict=True))
        if written != best
    )


def test_the_scene_has_the_numbers_of_the_view(explorer, pair):
    for response in explorer.responses:
        found, view, row = entry(explorer, response.name), response.view, response.row
        length = response.length
        assert found["tokens"] == view.rollouts.responses[row, :length].tolist()
        assert found["best"] == view.teacher_best[row, :length].tolist()
        assert (found["prompt"], found["answer"], found["reward"]) == (PROMPT, "7", response.reward)
        for name, values in view.quantities().items():
            assert found["columns"][name] == pytest.approx(values[row, :length].tolist(), rel=1e-3, abs=1e-12)
        for at, name in enumerate(("student", "teacher")):
            assert found["top"][at] == getattr(view, f"{name}_top_tokens")[row, :length].tolist()
            logprobs = getattr(view, f"{name}_top_logprobs")[row, :length].flatten().tolist()
            assert [x for listed in found["top_logprobs"][at] for x in listed] == pytest.approx(logprobs, rel=1e-3)
        for position in range(length):
            listed = view.listed_tokens[row, position].tolist()
            assert found["compared"][position][0] == found["tokens"][position]
            assert found["best"][position] in found["compared"][position]
            assert len(set(found["compared"][position])) == len(found["compared"][position]) <= 8
            for (name, _), moves in zip(explorer.scene["methods"], found["updates"][position], strict=True):
                expected = [view.updates[name][row, position, listed.index(t)] for t in found["compared"][position]]
                assert moves == pytest.approx([float(x) for x in expected], rel=1e-3, abs=1e-12)
        for token in found["tokens"]:
            assert explorer.scene["texts"][str(token)] == visible_text(pair.tokenizer, token)
        ranks = [view.student_ranks, view.teacher_ranks, view.student_proposal_ranks]
        assert [*found["ranks"], found["proposal_ranks"]] == [values[row, :length].tolist() for values in ranks]
        proposed = view.student_proposal_logprobs[row, :length].tolist()
        assert found["proposal_logprobs"] == pytest.approx(proposed, rel=1e-3)
    json.dumps(explorer.scene, allow_nan=False)


def test_rounding_keeps_four_digits_and_spells_what_json_lacks():
    values = torch.tensor([1.23456, -0.000123456, 0.0, 98765.4, math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert rounded(values) == [1.235, -0.0001235, 0.0, 98765.0, "Infinity", "-Infinity", "NaN"]
    assert rounded(torch.tensor(0.25)) == 0.25


def test_taking_a_token_opens_the_branch_beside_its_parent(explorer):
    name, position = difference(explorer)
    explorer.opened = [name]
    branch = explorer.take_token(position)
    assert explorer.opened == [name, "0:b1"] and explorer.branches == [branch]
    found = entry(explorer, "0:b1")
    assert found["branch"]["parent"] == name and found["branch"]["position"] == position
    assert found["branch"]["right"] == branch.right_continuations and found["reward"] == branch.reward
    assert explorer.scene["can_undo"]
    assert explorer.undo_branch() is branch
    assert explorer.opened == [name] and not explorer.scene["can_undo"] and explorer.branches == []


def test_the_page_asks_for_the_same(explorer):
    name, position = difference(explorer)
    best = entry(explorer, name)["best"][position]
    explorer._receive(explorer, {"kind": "take", "name": name, "position": position, "token": best}, [])
    assert [b.branch.token for b in explorer.branches] == [best] and explorer.message == ""
    explorer._receive(explorer, {"kind": "undo"}, [])
    assert explorer.branches == []
    explorer._receive(explorer, {"kind": "take", "name": "0:77", "position": 0, "token": 1}, [])
    assert "no response '0:77'" in explorer.message
    explorer._receive(explorer, {"kind": "something else"}, [])


def test_a_token_may_be_given_as_text(explorer):
    written = explorer.response().frame()["token"][0]
    text = "7" if written != "7" else "8"
    assert explorer.take_token(0, text).frame()["token"][0] == text
    with pytest.raises(InputError, match="is 2 tokens, not one"):
        explorer.take_token(0, "78")


def test_the_selection_is_a_table(explorer):
    explorer.selected_response, explorer.selected_positions = "0:2", [1, 3]
    frame = explorer.selected_frame()
    assert frame["position"].tolist() == [1, 3] and set(frame["response"]) == {"0:2"} and set(frame["step"]) == {0}
    assert frame["token_id"].tolist() == [entry(explorer, "0:2")["tokens"][p] for p in (1, 3)]
    explorer.selected_response, explorer.selected_positions = "", []
    assert len(explorer.selected_frame()) == explorer.response("0:0").length


def test_all_responses_are_a_table(explorer):
    frame = explorer.responses_frame()
    assert frame["response"].tolist() == [f"0:{row}" for row in range(6)]
    assert frame["reward"].tolist() == [r.reward for r in explorer.responses]
    assert frame["length"].tolist() == [r.length for r in explorer.responses]
    assert frame["parent"].isna().all() and frame["continuations"].isna().all()


def test_branches_can_be_compared_in_the_table(explorer, pair):
    name, position = difference(explorer)
    branch = explorer.take_token(position, response=name)
    row = explorer.responses_frame().iloc[-1]
    assert (row["response"], row["parent"], row["position"]) == ("0:b1", name, position)
    assert row["taken"] == visible_text(pair.tokenizer, branch.branch.token)
    assert (row["right_continuations"], row["continuations"]) == (branch.right_continuations, 6)
    assert row["reward"] == branch.reward


def test_the_slider_shows_the_student_of_each_step(over_steps):
    assert over_steps.steps == over_steps.scene["steps"] == [0, 1, 2, 3]
    assert over_steps.responses[0].view.temperature == 0.9, "of the run"
    before = over_steps.scene
    over_steps.step = 3
    assert over_steps.scene["step"] == 3 and over_steps.scene["responses"][0]["step"] == 3
    assert over_steps.scene["responses"] != before["responses"]
    assert [q["full"] for q in over_steps.scene["quantities"]] == [q["full"] for q in before["quantities"]]
    over_steps.step = 0
    assert over_steps.scene == before


def test_the_same_responses_can_be_kept_over_the_steps(over_steps):
    over_steps.step = 1
    shown = [e["tokens"] for e in over_steps.scene["responses"]]
    over_steps.fresh = False
    assert not over_steps.scene["fresh"]
    over_steps.step = 3
    assert [e["tokens"] for e in over_steps.scene["responses"]] == shown
    over_steps.fresh = True
    assert [e["tokens"] for e in over_steps.scene["responses"]] != shown


def test_a_branch_stays_with_its_step(over_steps):
    name, position = difference(over_steps)
    over_steps.opened = [name]
    over_steps.take_token(position)
    over_steps.step = 2
    assert over_steps.opened == [name] and "0:b1" not in [e["name"] for e in over_steps.scene["responses"]]
    over_steps.step = 0
    assert "0:b1" in [e["name"] for e in over_steps.scene["responses"]]
    assert len(over_steps.branches) == 1


def test_changing_the_step_clears_the_lock(over_steps):
    over_steps.selected_response, over_steps.selected_positions = "0:0", [0]
    over_steps.step = 1
    assert (over_steps.selected_response, over_steps.selected_positions) == ("", [])


def test_two_runs_stand_side_by_side(pair, run_folder):
    both = GuidanceExplorer(pair, {"RKL": run_folder, "TGPO": str(run_folder)}, samples=2)
    assert both.opened == ["0:0", "1:0"] and both.scene["runs"] == ["RKL", "TGPO"]
    both.step = 2
    assert both.opened == ["0:0", "1:0"]
    assert set(both.responses_frame()["run"]) == {"RKL", "TGPO"}


def test_rollouts_can_be_given(pair, explorer):
    given = GuidanceExplorer(pair, explorer.response().view.rollouts, answer=["7"] * 6)
    assert [e["tokens"] for e in given.scene["responses"]] == [e["tokens"] for e in explorer.scene["responses"]]
    assert given.fresh is False and given.scene["can_sample"] is False
    given.fresh = True
    assert given.fresh is False


def test_answers_are_looked_up_in_the_runs_data(pair, run_folder):
    assert GuidanceExplorer(pair, run_folder, samples=2).response().answer == "7"
    assert GuidanceExplorer(pair, PROMPT, samples=2, max_new_tokens=4).response().answer is None


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "nothing to look at"),
        (7, {}, "got int"),
        ([1, 2], {}, "nothing to look at"),
        ({}, {}, "not 0"),
        (Path("no/run/here"), {}, "holds no run"),
        (str(Path(__file__).parent), {}, "holds no run"),
        ({"a": "x"}, {}, "holds no run"),
        (PROMPT, {"prompt": "1+1+5="}, "given already"),
        (PROMPT, {"samples": 0}, "samples"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be 1"),
        (PROMPT, {"answer": ["7", "8"]}, "one answer for each prompt"),
        ("1+2+" * 100, {}, "made for at most"),
        ("\0", {"max_new_tokens": 500}, "made for at most"),
    ],
)
def test_wrong_input_gets_one_sentence(pair, source, options, message):
    with pytest.raises(InputError, match=message):
        GuidanceExplorer(pair, source, **options)


def test_a_pairs_name_in_place_of_the_pair_is_refused():
    with pytest.raises(InputError, match="must be a pair"):
        GuidanceExplorer("far", PROMPT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantity", "beauty"),
        ("step", 99),
        ("view", "table"),
        ("sort", "colour"),
        ("fresh", "yes"),
        ("opened", []),
        ("opened", ["0:0", "0:99"]),
    ],
)
def test_impossible_values_are_refused(over_steps, name, value):
    before = getattr(over_steps, name)
    with pytest.raises(traitlets.TraitError):
        setattr(over_steps, name, value)
    assert getattr(over_steps, name) == before


# ── Colours ──────────────────────────────────────────────────────────────────────────────────────
def contrast(first: str, second: str) -> float:
    def luminance(color):
        color = "".join(2 * c for c in color[1:]) if len(color) == 4 else color[1:]
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_colour(dark):
    colors = palette(dark=dark)
    assert len(colors) == LEVELS and colors[LEVELS // 2] == cell_colors(0, dark=dark)
    assert all(contrast(*pair) >= 4.5 for pair in colors)
    assert len({background for background, _ in colors}) == LEVELS


def test_purple_and_orange_are_told_apart_by_colour_blind_readers():
    """In blue minus yellow, which red-green blindness leaves: purple is bluer than grey, orange yellower."""
    for dark in (False, True):
        for level, (background, _) in enumerate(palette(dark=dark)):
            red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
            side = blue - (red + green) / 2
            if level < LEVELS // 2 - 2:
                assert side > 0, background
            if level > LEVELS // 2 + 2:
                assert side < 0, background


def test_what_speaks_against_a_token_is_orange():
    assert place_on_scale(BY_NAME["token_reward"], -4) == 1 and place_on_scale(BY_NAME["token_reward"], 9) == -1
    assert place_on_scale(BY_NAME["student_surprise"], 2) == 0.5
    assert place_on_scale(BY_NAME["agreement"], 1) == 0 and place_on_scale(BY_NAME["agreement"], 0) == 1
    assert place_on_scale(BY_NAME["weight_rkl"], -math.inf) == 1


def test_scales_of_weights_are_round_numbers_that_hold_every_value(explorer):
    view = explorer.response().view
    for quantity in scaled_quantities([view]):
        largest = float(view.quantities()[quantity.name].abs().max())
        if quantity.name.startswith("weight_") and largest > 0:
            assert largest <= quantity.full < 10 * largest
            assert f"{quantity.full:e}"[0] in "125"
        else:
            assert quantity.full == BY_NAME[quantity.name].full
        assert legend_values(quantity) == sorted(legend_values(quantity))


def test_every_quantity_of_the_view_can_be_shown(explorer):
    assert set(explorer.response().view.quantities()) == {q.name for q in QUANTITIES}


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────
class Page(HTMLParser):
    """Elements and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        (self.scripts if self._inside == "script" else self.texts).append(data)

    def handle_endtag(self, tag):
        self._inside = ""


def hostile_scene(explorer):
    """The scene of a model whose first token, whose proposal and whose prompt are mark-up."""
    scene = json.loads(json.dumps(explorer.scene))
    first = scene["responses"][0]
    scene["texts"][str(first["tokens"][0])] = HOSTILE
    scene["texts"][str(first["best"][0])] = HOSTILE
    first["prompt"] = first["answer"] = HOSTILE
    return scene


def test_the_fallback_shows_tokens_colours_legend_and_proposals(explorer):
    name, position = difference(explorer)
    explorer.opened = [name]
    bundle, _ = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("GuidanceExplorer: ")
    page, found = Page(bundle["text/html"]), entry(explorer, name)
    texts = explorer.scene["texts"]
    shown = " ".join(page.texts)
    assert all(texts[str(token)] in shown for token in found["tokens"])
    assert texts[str(found["best"][position])] in shown
    differing = sum(w != b for w, b in zip(found["tokens"], found["best"], strict=True))
    assert sum(tag == "sup" for tag, _ in page.elements) == differing
    quantity = next(q for q in scaled_quantities([explorer.response().view]) if q.name == "token_reward")
    value = found["columns"]["token_reward"][position]
    assert f"background-color:{cell_colors(place_on_scale(quantity, value))[0]}" in bundle["text/html"]
    assert quantity.low in shown and not any(tag in ("script", "style", "link") for tag, _ in page.elements)


def test_the_fallback_has_its_colours_without_styles(explorer):
    """As GitHub shows it: one picture before each token and each number of the legend, in the colour of its style."""
    explorer.opened = ["0:0"]
    page = Page(explorer._repr_mimebundle_()[0]["text/html"])
    found = entry(explorer, "0:0")
    quantity = next(q for q in explorer.scene["quantities"] if q["name"] == "token_reward")
    values = [*legend_values(Quantity(**quantity)), *map(float, found["columns"]["token_reward"])]
    expected = [cell_colors(place_on_scale(Quantity(**quantity), value))[0] for value in values]
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [picture["style"] for picture in pictures] == ["display:none"] * len(expected)
    pixels = []
    for picture in pictures:
        head, _, data = picture["src"].partition(",")
        assert head == "data:image/gif;base64"
        pixel = Image.open(BytesIO(b64decode(data))).convert("RGB").getpixel((0, 0))
        pixels.append("#" + "".join(f"{channel:02x}" for channel in pixel))
    assert pixels == expected and len(set(pixels)) > 3


def test_colab_is_told_which_widget_manager_shows_the_explorer(explorer, monkeypatch):
    """Its output module, imitated: what shows other people's widgets must be named with the output."""
    output = ModuleType("google.colab.output")
    output._widgets = SimpleNamespace(_installed_url=None)
    output.enable_custom_widget_manager = lambda: setattr(output._widgets, "_installed_url", "https://manager.js")
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    _util.enable_custom_widget_manager_once.cache_clear()
    data, metadata = explorer._repr_mimebundle_()
    _util.enable_custom_widget_manager_once.cache_clear()
    view = "application/vnd.jupyter.widget-view+json"
    assert view in data and metadata[view]["colab"]["custom_widget_manager"]["url"] == "https://manager.js"


def test_the_fallback_is_the_same_every_time(pair, explorer):
    again = GuidanceExplorer(pair, PROMPT, answer="7", samples=6, max_new_tokens=LIMIT, seed=1)
    assert again._repr_mimebundle_()[0]["text/html"] == explorer._repr_mimebundle_()[0]["text/html"]
    assert again._repr_mimebundle_()[0]["text/plain"] == explorer._repr_mimebundle_()[0]["text/plain"]


def test_model_text_in_the_fallback_is_data(explorer):
    page = Page(fallback_page(hostile_scene(explorer), "token_reward", ["0:0"]))
    assert not any(tag == "script" for tag, _ in page.elements)
    assert all(
        attributes["src"].startswith("data:image/gif;base64,") for tag, attributes in page.elements if tag == "img"
    )
    assert HOSTILE in "".join(page.texts)


def test_invisible_characters_of_prompts_and_answers_are_shown(pair):
    """One that turns the direction of writing would reorder what stands beside it."""
    turned = GuidanceExplorer(pair, f"{PROMPT}\u202e\n", answer="7\u200f", samples=2, max_new_tokens=4)
    found = entry(turned, "0:0")
    assert found["prompt"] == PROMPT + "\\u202e↵" and found["answer"] == "7\\u200f"
    assert turned.response().prompt == f"{PROMPT}\u202e\n" and turned.response().answer == "7\u200f"
    for page in (turned._repr_mimebundle_()[0]["text/html"], standalone_page("", {}, {0: turned.scene})):
        assert "\u202e" not in page and "\u200f" not in page


def test_infinite_values_reach_the_fallback(explorer):
    scene = json.loads(json.dumps(explorer.scene))
    scene["responses"][0]["columns"]["token_reward"][0] = "-Infinity"
    assert "−∞" in fallback_page(scene, "token_reward", ["0:0"])


def test_a_saved_file_holds_every_step_and_asks_no_host(over_steps, tmp_path):
    path = over_steps.save_html(tmp_path / "new" / "page.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert set(data["scenes"]) == {"0", "1", "2", "3"}
    over_steps.step = 2
    assert data["scenes"]["2"] == json.loads(json.dumps(over_steps.scene))
    assert not re.search(r"https?://", text)
    assert not any("src" in attributes for _, attributes in page.elements)
    only = over_steps.save_html(tmp_path / "one.html", every_step=False)
    assert set(json.loads(Page(only.read_text(encoding="utf-8")).scripts[0])["scenes"]) == {"2"}


def test_model_text_in_a_saved_file_is_data(explorer):
    scene = hostile_scene(explorer)
    text = standalone_page(HOSTILE, {"scene": scene}, {0: scene})
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert json.loads(page.scripts[0])["scenes"]["0"]["responses"][0]["prompt"] == HOSTILE
    assert HOSTILE in page.texts


def test_what_cannot_be_written_is_refused(explorer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        explorer.save_html(tmp_path / "file" / "page.html")
    with pytest.raises(InputError, match="is a folder"):
        explorer.save_html(tmp_path)


def test_the_scripts_put_model_text_in_as_text_alone():
    source = module_source()
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert forbidden not in source, forbidden
    assert "</script" not in source.lower() and not re.search(r"https?:|import\s*\(|^import ", source, re.MULTILINE)
    assert source.count("export default") == 1 and len(SCRIPTS) == 6
