"""The report: nothing in it acts, nothing is fetched, everything measured is in it, and it is readable."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.metrics import metrics_frame
from tgpo_lab.reports import report as report_module
from tgpo_lab.reports.report import token_style, write_report
from tgpo_lab.reports.sample_rollouts import AnnotatedRollout, AnnotatedToken
from tgpo_lab.runs import RunResult

HOSTILE = ["<script>alert(1)</script>", "</div></span>", '"><img src=x onerror=alert(1)>', "{{ 7 * 6 }}", "&lt;b&gt;"]
VOID = {"meta", "link", "img", "source", "wbr", "br"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails where a tag is closed that is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.texts_of: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts_of.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        self.text.append(data)
        for tag in set(self._open):
            self.texts_of[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]


def a_run(folder: Path, seed: int = 0, completed: bool = True, **changes) -> RunResult:
    rows = [
        {"step": i, "reward": i / 10, "length": 5.0 + i, "entropy": 1.0, "reverse_kl": 3.0 - i / 5, "agreement": 0.5,
         "rejected": 0.25, "gradient_norm": 1.0 + i, "seconds_sample": 2.0, "seconds_update": 1.0}
        | ({"accuracy": i / 10} if i % 5 == 0 else {})
        for i in range(10)
    ]  # fmt: skip
    rows += [{"step": 10, "accuracy": 0.875}] if completed else []
    return RunResult(folder, TrainConfig(steps=10, seed=seed, **changes), metrics_frame(rows), None, completed)


def a_rollout(*tokens: AnnotatedToken, prompt: str = "1+2+4=", answer: str = "7") -> AnnotatedRollout:
    return AnnotatedRollout(prompt, answer, list(tokens), reward=1.0, finished=True, temperature=1.0)


AGREED = AnnotatedToken("agreed", -0.5, -0.25, "agreed", False)
OTHER = AnnotatedToken("written", -0.5, -7.0, "proposed", True)


def page_of(tmp_path, title="Title", runs=None, rollouts=None, **options) -> tuple[str, Page]:
    runs = {"tgpo": a_run(tmp_path / "tgpo")} if runs is None else runs
    path = write_report(tmp_path / "report.html", title, runs, rollouts, **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_hostile_texts_are_shown_and_never_become_markup(tmp_path):
    tokens = [AnnotatedToken(text, -1.0, -9.0, text[::-1] + text, True) for text in HOSTILE]
    rollouts = {
        HOSTILE[0]: {stage: [a_rollout(*tokens, prompt=p, answer=p) for p in HOSTILE] for stage in ("before", "after")}
    }
    run = a_run(tmp_path, dataset=HOSTILE[2], prompt_column=HOSTILE[1])
    stored = {"config": {}, "command": HOSTILE[0], "versions": {"x": HOSTILE[1]}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    _, page = page_of(tmp_path, HOSTILE[0] + HOSTILE[1], {HOSTILE[0]: run}, rollouts)
    shown = "".join(page.text)
    for hostile in HOSTILE:
        assert hostile in shown
    assert not page.all("script")
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))


def test_nothing_is_fetched_from_anywhere(tmp_path):
    text, page = page_of(tmp_path, rollouts={"tgpo": {"before": [a_rollout(AGREED)], "after": [a_rollout(OTHER)]}})
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "url(" not in text and "@import" not in text
    assert not re.search(r"https?://", text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_figures_are_pictures_with_a_text_that_says_the_same(tmp_path):
    _, page = page_of(tmp_path)
    images, sources = page.all("img"), page.all("source")
    assert len(images) == len(sources) == 8  # nine default columns, but this run has no schedule
    for image, source in zip(images, sources, strict=True):
        for uri in (image["src"], source["srcset"]):
            assert base64.b64decode(uri.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        assert image["src"] != source["srcset"]
    assert source["media"] == "(prefers-color-scheme: dark)"
    assert images[0]["alt"] == "Line chart of accuracy over steps: tgpo from 0 at step 0 to 0.875 at step 10."
    captions = page.texts_of["figcaption"]
    assert len(captions) == 8 and all("What to look for:" in caption for caption in captions)
    assert not any("`" in caption for caption in captions)


def test_tokens_show_the_teachers_proposal_only_where_it_differs_and_all_numbers(tmp_path):
    rollouts = {"tgpo": {"before": [a_rollout(AGREED, OTHER)], "after": [a_rollout(AGREED)]}}
    _, page = page_of(tmp_path, rollouts=rollouts)
    assert page.texts_of["rt"] == ["proposed"]
    assert [t.strip() for t in page.texts_of["ruby"]] == ["agreed", "writtenproposed", "agreed"]
    shown = re.sub(r"\s+", " ", " ".join(page.text))
    assert "written −0.50 −7.00 6.50 proposed" in shown
    assert "agreed −0.50 −0.25 −0.25 the same" in shown
    assert shown.index("Before training") < shown.index("After training")
    styles = [a["style"] for a in page.all("span") if a.get("class", "").startswith("written")]
    assert styles == [token_style(-0.25), token_style(6.5), token_style(-0.25)]


def test_the_summary_holds_the_numbers_of_the_runs(tmp_path):
    runs = {"tgpo": a_run(tmp_path / "a"), "grpo": a_run(tmp_path / "b", completed=False)}
    _, page = page_of(tmp_path, runs=runs, before={"tgpo": 0.125, "grpo": 0.25}, after={"tgpo": 0.75, "grpo": 0.5})
    cells = page.texts_of["td"]
    assert cells[:7] == ["12.5 %", "75.0 %", "5", "10", "1.2", "14.0", "10"]
    assert cells[7:14] == ["25.0 %", "50.0 %", "5", "never", "1.2", "14.0", "10"]
    shown = re.sub(r"\s+", " ", "".join(page.text))
    assert "grpo is not finished: it stands at step 9 of 10." in shown
    assert "tgpo is not finished" not in shown


def test_configuration_and_provenance_are_compared_run_by_run(tmp_path):
    for name, command in (("a", "tgpo-lab train a"), ("b", "tgpo-lab train b")):
        (tmp_path / name).mkdir()
        stored = {"config": {}, "command": command, "versions": {"torch": "2.99"}, "time": "2026-01-02T03:04:05+00:00"}
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
    runs = {"first": a_run(tmp_path / "a", seed=5), "second": a_run(tmp_path / "b", seed=6)}
    _, page = page_of(tmp_path, runs=runs)
    shown = re.sub(r"\s+", " ", " ".join(page.text))
    assert "seed 5 6" in shown
    assert "command tgpo-lab train a tgpo-lab train b" in shown
    assert "versions.torch 2.99" in shown and "versions.torch 2.99 2.99" not in shown
    assert "time 2026-01-02T03:04:05+00:00" in shown
    assert "time in the training loop 30 s" in shown
    assert "group_size 8" in shown


def test_the_page_can_be_navigated(tmp_path):
    rollouts = {"tgpo": {"before": [a_rollout(AGREED)], "after": [a_rollout(OTHER)]}}
    text, page = page_of(tmp_path, rollouts=rollouts)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def luminance(color: str) -> float:
    color = "".join(2 * c for c in color) if len(color) == 3 else color
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("difference", [*np.linspace(-6, 6, 49), math.inf, -math.inf])
def test_text_on_every_colour_has_the_contrast_that_wcag_asks_for(difference):
    background, text = re.fullmatch(r"background:#(\w{6});color:#(\w{3})", token_style(difference)).groups()
    lighter, darker = sorted((luminance(background), luminance(text)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_colours_diverge_from_white_and_are_full_at_four_nats():
    assert token_style(4) == token_style(99) == token_style(math.inf)
    assert token_style(-4) == token_style(-math.inf)
    assert token_style(3.9) != token_style(4)
    backgrounds = {d: token_style(d)[12:18] for d in (-4, -2, 0, 2, 4)}
    brightness = [luminance(color) for color in backgrounds.values()]
    assert brightness[0] < brightness[1] < brightness[2] > brightness[3] > brightness[4]
    red, blue = (lambda c: int(c[:2], 16)), (lambda c: int(c[4:], 16))
    assert red(backgrounds[4]) > blue(backgrounds[4]) and red(backgrounds[-4]) < blue(backgrounds[-4])


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    write_report(path, "First", {"tgpo": a_run(tmp_path)})
    before = path.read_text(encoding="utf-8")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("tgpo_lab.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "Second", {"tgpo": a_run(tmp_path)})
    assert path.read_text(encoding="utf-8") == before


def test_a_run_without_a_single_measurement_has_a_report_without_figures(tmp_path):
    run = RunResult(tmp_path, TrainConfig(steps=10), metrics_frame([]), None, completed=False)
    _, page = page_of(tmp_path, runs={"tgpo": run})
    assert not page.all("figure")
    assert "it stands at step 0 of 10" in "".join(page.text)


@pytest.mark.parametrize(
    "rollouts",
    [
        {"unknown": {"before": [], "after": []}},
        {"tgpo": {"before": []}},
        {"tgpo": {"before": [a_rollout(AGREED)], "after": []}},
    ],
)
def test_rollouts_that_do_not_fit_the_runs_are_refused(tmp_path, rollouts):
    with pytest.raises(InputError, match="do not fit"):
        page_of(tmp_path, rollouts=rollouts)
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one run"):
        write_report(tmp_path / "report.html", "Nothing", {})


def test_the_template_lies_in_the_package():
    assert report_module.TEMPLATE.parent == Path(report_module.__file__).parent
    assert report_module.TEMPLATE.exists()
