"""The explorer without a kernel: a static table of tokens for a saved notebook, and a file that stands alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..explorer.token_colors import cell_colors
from .quantities import Quantity, place_on_scale

FOLDER = Path(__file__).with_name("browser")
# In this order they make one ES module: no part imports another, so that a notebook can take it as one text.
SCRIPTS = ("colors.js", "tokens.js", "detail.js", "heatmap.js", "controls.js", "explorer.js")
STYLES = FOLDER / "explorer.css"
FALLBACK_TOKENS = 400  # of each response; a saved notebook must stay small
_PAGES = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,  # prompts and tokens are data, whatever they look like
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def module_source() -> str:
    """The explorer as one ES module that a notebook loads."""
    return _script() + "\nexport default { render };\n"


def style_source() -> str:
    """Its styles."""
    return STYLES.read_text(encoding="utf-8")


def standalone_page(title: str, state: Mapping[str, object], scenes: Mapping[int, Mapping[str, object]]) -> str:
    """One HTML file with the explorer and the scenes of some steps, which asks no host for anything.

    Args:
        title: of the page.
        state: values of the explorer that a reader can change.
        scenes: key of a step → its scene.
    """
    return _PAGES.get_template("standalone.html").render(
        title=title,
        style=style_source(),
        script=_script(),
        # Inside a script element only "<" could end it or begin a comment: as an escape JSON keeps its meaning.
        data=json.dumps({"state": state, "scenes": scenes}, ensure_ascii=False, allow_nan=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029"),
    )


def fallback_page(scene: Mapping[str, object], quantity: str, opened: list[str]) -> str:
    """HTML without script: tokens, colours, legend and proposals of the open responses; the same input, the same text.

    Colours stand in each element, because many hosts drop style sheets. GitHub drops the styles of elements, too: for
    it there is a small picture of the colour before each token, which those styles hide elsewhere. Proposals are
    superscripts: JupyterLab drops the elements of ruby text from a notebook that is not trusted.
    """
    by_name = {response["name"]: response for response in scene["responses"]}
    found = next(Quantity(**q) for q in scene["quantities"] if q["name"] == quantity)
    return _PAGES.get_template("fallback.html").render(
        scene=scene,
        quantity=found,
        legend=[(value, _style(found, value), _swatch(found, value)) for value in legend_values(found)],
        responses=[by_name[name] for name in opened if name in by_name],
        style=lambda value: _style(found, float(value)),
        swatch=lambda value: _swatch(found, float(value)),
        limit=FALLBACK_TOKENS,
        number=_number,
    )


def legend_values(quantity: Quantity) -> list[float]:
    """Values that the legend shows, ascending."""
    if quantity.offset:
        return [0.0, 1.0]
    steps = range(-4, 5) if quantity.signed else range(5)
    return [step * quantity.full / 4 for step in steps]


def _style(quantity: Quantity, value: float) -> str:
    background, text = cell_colors(place_on_scale(quantity, value))
    return f"background-color:{background};color:{text}"


def _swatch(quantity: Quantity, value: float) -> str:
    """A picture of one pixel in the value's colour: a GIF, the smallest that every browser shows, as data URL."""
    color = bytes.fromhex(cell_colors(place_on_scale(quantity, value))[0][1:])
    head, pixel = b"GIF89a\1\0\1\0\x80\0\0", b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    return "data:image/gif;base64," + base64.b64encode(head + color + pixel).decode()


def _number(value: float | str) -> str:
    """Two decimals, or as many digits as a small number needs, with a true minus sign."""
    value = float(value)
    if value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return text.replace("-", "−")


def _script() -> str:
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
