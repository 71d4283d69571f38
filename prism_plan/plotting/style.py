"""How figures look: sizes, colours and fonts, independent of the user's configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

DPI = 100
WIDTH_IN = 15.0
TITLE_PT, PANEL_PT, TICK_PT = 13, 10, 8
#: Colours of Okabe and Ito and one of Tol: colour-blind readers can distinguish them.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"),
    "#882255",
)
LINE_COLOURS = (*COLOURS[:6], "#000000")
LINE_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NO_DATA = "#BBBBBB"
MISSING = "#D55E00"
SETTINGS = {
    # The second is for readers of an SVG file whose machine lacks the first.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": PANEL_PT,
    "axes.titlesize": PANEL_PT,
    "axes.labelsize": 9,
    "xtick.labelsize": TICK_PT,
    "ytick.labelsize": TICK_PT,
    "image.interpolation": "nearest",
    "savefig.bbox": None,
    "savefig.transparent": False,
    "pdf.fonttype": 42,  # TrueType: publishers refuse the Type 3 fonts of the default
    "svg.fonttype": "none",  # text as text, which can be searched, edited and set in another font
    "svg.hashsalt": "prism-plan",
    "text.usetex": False,
}


@contextlib.contextmanager
def matplotlib_settings() -> Iterator[None]:
    """Draw with :data:`SETTINGS` whatever the user's matplotlib configuration is."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield
