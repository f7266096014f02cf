"""One web page that needs no server: texts as they were drawn, their surprisal, and what models cost."""

from dflow.page.document import document
from dflow.page.figures import Figures, Point, curve_of, figures
from dflow.page.traces import Shade, Trace, pieces_of, role_of, shade, traces

__all__ = [
    "Figures",
    "Point",
    "Shade",
    "Trace",
    "curve_of",
    "document",
    "figures",
    "pieces_of",
    "role_of",
    "shade",
    "traces",
]
