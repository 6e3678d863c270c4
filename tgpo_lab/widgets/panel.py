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

from ..plots import DARK, LIGHT, style

DOTS_PER_INCH = 110
# Colour-blind-safe, and apart in grey print, too.
STUDENT, TEACHER = "#4c72b0", "#dd8452"


class Panel(ipywidgets.VBox):
    """Controls and the figure that they decide. :attr:`table` has the numbers of the figure."""

    def __init__(
        self,
        controls: Sequence[ipywidgets.Widget],
        compute: Callable[[], tuple[pd.DataFrame, str]],
        draw: Callable[[pd.DataFrame], Figure],
        title: str,
        *,
        dark: bool,
    ):
        """Put the parts together and draw for the first time.

        Args:
            controls: whatever their ``value``, ``compute`` reads it.
            compute: the numbers for the present controls, and a sentence on them (or an empty one).
            draw: their figure.
            title: what the panel shows, in a few words.
            dark: for a dark page.
        """
        self._compute, self._draw, self._dark, self._title = compute, draw, dark, title
        self.table = pd.DataFrame()
        self.said = ipywidgets.HTML()
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))
        box = ipywidgets.Box(list(controls), layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([box, self.said, self.image])
        for control in controls:
            control.observe(self._changed, "value")
        self._changed()

    def _changed(self, _change: object = None) -> None:
        self.table, said = self._compute()
        self.said.value = escape(said)
        with mpl.rc_context(style(DARK if self._dark else LIGHT)):
            figure = self._draw(self.table)
            plt.close(figure)
            target = io.BytesIO()
            figure.savefig(target, format="png", dpi=DOTS_PER_INCH)
        self.image.value = target.getvalue()

    def _repr_mimebundle_(self, **options: object) -> dict:
        """The panel for a live page, and its numbers for a page without a kernel."""
        table = self.table.to_html(float_format=lambda value: f"{value:.4g}", border=0, na_rep="–")
        bundle = super()._repr_mimebundle_(**options) or {}
        return {**bundle, "text/plain": self._title, "text/html": f"<p>{self._title}, without a kernel:</p>{table}"}


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
