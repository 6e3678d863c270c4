"""How fast the guidance explorer is on one long response, in a headless Chromium.

    pip install -e .[browser]
    python benchmarks/explorer_speed.py

The response has random tokens, so the teacher would write another one nearly everywhere and a proposal stands above
nearly every token: more work for the page than any real response. The page is the standalone file, with the scripts
and styles of the notebook's widget. First paint is from the start of navigation to the end of the first frame that
shows the tokens. Hover is from the pointer's arrival on a token to the end of the frame that shows its detail, on
tokens spread over the whole response.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bad_input import require_at_least, run_script
from playwright.sync_api import Browser, sync_playwright

from tgpo_lab.errors import InputError
from tgpo_lab.files import write_json
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.provenance import provenance
from tgpo_lab.random_pair import Dimensions, RandomPair, write_random_pair
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.widgets import GuidanceExplorer

RESULTS = Path(__file__).parent / "results" / "explorer_speed.json"
PAIR = RandomPair(Dimensions(64, 2, 4), Dimensions(128, 3, 4), vocabulary_size=2048, prompt_tokens=9)

# A task that is posted from within a frame's callback runs once that frame has been painted.
PAINTED = """const painted = () => new Promise((done) => requestAnimationFrame(() => {
  const channel = new MessageChannel();
  channel.port1.onmessage = done;
  channel.port2.postMessage(0);
}));"""
TIME_PAINT = f"""{PAINTED}
new MutationObserver((_, observer) => {{
  if (!document.querySelector(".token")) return;
  observer.disconnect();
  painted().then(() => {{ window.painted = performance.now(); }});
}}).observe(document.body, {{ childList: true, subtree: true }});
"""
TIME_HOVER = """async (positions) => {
  PAINTED
  const tokens = document.querySelectorAll(".token");
  const place = document.querySelector(".detail");
  const found = [];
  for (const position of positions) {
    tokens[position].scrollIntoView({ block: "center" });
    await painted();
    const start = performance.now();
    tokens[position].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    place.getBoundingClientRect();
    const script = performance.now() - start;
    await painted();
    if (!place.textContent.includes(`token ${position + 1} of`)) throw new Error("the detail is of another token");
    found.push([script, performance.now() - start]);
  }
  return found;
}""".replace("PAINTED", PAINTED)


@dataclass(frozen=True)
class Options:
    """Time the guidance explorer in a headless Chromium."""

    tokens: int = 4000
    """Length of the response."""
    loads: int = 7
    """How often the page is opened."""
    hovers: int = 40
    """Tokens that are pointed at."""
    output: Path = RESULTS
    """Where the result goes."""
    note: str = ""
    """Whatever a reader should know of the machine."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "tokens", "loads", "hovers")


def write_page(options: Options, folder: Path) -> tuple[Path, dict[str, float]]:
    """The standalone page of a long random response, and the seconds that Python took for it."""
    paths = write_random_pair(PAIR, folder)
    pair = load_pair(paths["student"], paths["teacher"])
    for model in (pair.student, pair.teacher):
        model.config.max_position_embeddings = options.tokens + PAIR.prompt_tokens  # rotary positions have no table
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(2, PAIR.vocabulary_size, (1, options.tokens), generator=generator)
    mask = torch.ones_like(response, dtype=torch.bool)
    rollouts = Rollouts([[2] * PAIR.prompt_tokens], response, mask, torch.tensor([False]), pair.pad_token)
    start = time.perf_counter()
    explorer = GuidanceExplorer(pair, rollouts)
    computed = time.perf_counter()
    page = explorer.save_html(folder / "page.html")
    return page, {"compute": computed - start, "save": time.perf_counter() - computed}


def time_first_paint(browser: Browser, page: Path) -> float:
    """Milliseconds from the start of navigation to the end of the first frame with tokens."""
    text = page.read_text(encoding="utf-8")
    timed = text.replace('<script type="module">', f'<script type="module">{TIME_PAINT}')
    if timed == text:
        raise InputError(f"{page} has no module script to time.")
    copy = page.with_name("timed.html")
    copy.write_text(timed, encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(copy.as_uri())
    tab.wait_for_function("window.painted !== undefined")
    found = tab.evaluate("window.painted")
    tab.close()
    return found


def time_hovers(browser: Browser, page: Path, options: Options) -> list[list[float]]:
    """Milliseconds of script and layout, and until the end of the frame, for each token that is pointed at."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector(".token")
    positions = [round(index * (options.tokens - 1) / max(1, options.hovers - 1)) for index in range(options.hovers)]
    return tab.evaluate(TIME_HOVER, positions)


def spread(values: list[float]) -> dict[str, float]:
    """Median and both ends, in milliseconds."""
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def main(options: Options) -> None:
    """Measure and write the result.

    Raises:
        InputError: there is no Chromium.
    """
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise InputError("There is no Chromium: install it, or set CHROMIUM to its path.")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page, seconds = write_page(options, Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        paints = [time_first_paint(browser, page) for _ in range(options.loads)]
        hovers = time_hovers(browser, page, options)
        result = {
            "tokens": options.tokens,
            "page_megabytes": round(page.stat().st_size / 1e6, 2),
            "python_seconds": {name: round(value, 2) for name, value in seconds.items()},
            "first_paint_ms": spread(paints),
            "hover_script_and_layout_ms": spread([script for script, _ in hovers]),
            "hover_until_painted_ms": spread([painted for _, painted in hovers]),
            "loads": options.loads,
            "hovers": options.hovers,
            "chromium": browser.version,
            "note": options.note,
            **provenance(),
        }
        browser.close()
    write_json(options.output, result)
    for name in ("first_paint_ms", "hover_script_and_layout_ms", "hover_until_painted_ms"):
        print(
            f"{name.removesuffix('_ms').replace('_', ' ')}: {result[name]['median']} ms (largest {result[name]['max']})"
        )


if __name__ == "__main__":
    run_script(main, Options)
