"""What the small panels share: sliders above one figure, and a table where there is no kernel."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape

import ipywidgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..plots import style

# Colour-blind-safe, and apart in grey print, too.
STUDENT, TEACHER = "#4c72b0", "#dd8452"
# Matplotlib draws text and lines in this colour, which nothing else has; in the picture it becomes the page's own.
INK = "#010203"
FIGURE_STYLE = {
    **style({"background": "none", "text": INK, "grid": INK}),
    "grid.alpha": 0.15,
    "hatch.color": INK,
    "svg.fonttype": "path",  # the same on every machine
}


class Panel(ipywidgets.VBox):
    """Controls and the figure that they decide, in the colours of the page. :attr:`table` has the figure's numbers."""

    def __init__(
        self,
        controls: Sequence[ipywidgets.Widget],
        compute: Callable[[], tuple[pd.DataFrame, str]],
        draw: Callable[[pd.DataFrame], Figure],
        title: str,
    ):
        """Put the parts together and draw for the first time.

        Args:
            controls: whatever their ``value``, ``compute`` reads it.
            compute: the numbers for the present controls, and a sentence on them (or an empty one).
            draw: their figure.
            title: what the panel shows, in a few words.
        """
        self._compute, self._draw, self._title = compute, draw, title
        self.table = pd.DataFrame()
        self.said = ipywidgets.HTML()
        self.picture = ipywidgets.HTML(layout=ipywidgets.Layout(max_width="100%"))
        box = ipywidgets.Box(list(controls), layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([box, self.said, self.picture])
        for control in controls:
            control.observe(self._changed, "value")
        self._changed()

    def _changed(self, _change: object = None) -> None:
        self.table, said = self._compute()
        self.said.value = escape(said)
        with mpl.rc_context(FIGURE_STYLE | {"svg.hashsalt": self._title}):
            figure = self._draw(self.table)
            plt.close(figure)
            self.picture.value = themed_svg(figure, f"{self._title}. {said}")

    def _repr_mimebundle_(self, **options: object) -> dict:
        """The panel for a live page, and its numbers for a page without a kernel."""
        table = self.table.to_html(float_format=lambda value: f"{value:.4g}", border=0, na_rep="–")
        bundle = super()._repr_mimebundle_(**options) or {}
        said = f"<p>{self.said.value}</p>" if self.said.value else ""  # escaped already
        page = f"<p>{self._title}, without a kernel:</p>{said}{table}"
        return {**bundle, "text/plain": self._title, "text/html": page}


def themed_svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element whose :data:`INK` is the colour of the text around it, so that it follows the page.

    Args:
        figure: drawn with :data:`FIGURE_STYLE`. The same figure gives the same text.
        description: for those who do not see it.
    """
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    element = text[text.index("<svg") :].replace(INK, "currentColor")
    attributes = f'role="img" aria-label="{escape(description)}" style="max-width: 100%; height: auto"'
    return element.replace("<svg", f"<svg {attributes}", 1)


def slider(
    label: str, value: float, low: float, high: float, step: float, *, decades: bool = False, width: int = 330
) -> ipywidgets.FloatSlider | ipywidgets.FloatLogSlider:
    """A slider with a label of any width; ``decades`` for one whose ends are powers of ten."""
    made = ipywidgets.FloatLogSlider if decades else ipywidgets.FloatSlider
    return made(
        value=value,
        min=low,
        max=high,
        step=step,
        description=label,
        continuous_update=True,
        readout_format=".1e" if decades else ".3g",
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width=f"{width}px", max_width="100%"),
    )
