"""Colours of tokens: a diverging scale that colour-blind readers can tell apart, for light and for dark pages.

Orange stands for values that speak against a token, purple for the others; the middle is the page's own tone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import seaborn as sns

LEVELS = 33  # odd, so that one of them is the middle
# The outermost colours of PuOr are too dark to be told apart.
USED_SHARE = 0.84
DARK_SCALE = ("#b9a5ec", "#65539c", "#262b32", "#8f5410", "#f7a54a")


def cell_colors(place: float, *, dark: bool = False) -> tuple[str, str]:
    """Background and text colour at ``place`` from −1 (purple) over 0 to 1 (orange), as #rrggbb.

    The text is black or white, whichever has the larger contrast by the relative luminance of WCAG 2.
    """
    place = 0.5 + 0.5 * max(-1.0, min(1.0, place))
    scale = _scale(dark)
    rgb = scale(place if dark else 0.5 + USED_SHARE * (place - 0.5))[:3]

    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    luminance = sum(share * linear(c) for share, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))
    text = "#000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#fff"
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb), text


def palette(*, dark: bool = False) -> list[tuple[str, str]]:
    """:data:`LEVELS` pairs of background and text from −1 to 1."""
    return [cell_colors(2 * level / (LEVELS - 1) - 1, dark=dark) for level in range(LEVELS)]


@cache
def _scale(dark: bool) -> Callable[[float], tuple[float, ...]]:
    return sns.blend_palette(DARK_SCALE, as_cmap=True) if dark else sns.color_palette("PuOr_r", as_cmap=True)
