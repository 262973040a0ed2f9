"""The colours and matplotlib settings that all figures of the command share."""

from typing import Any

INK, MUTED, FAINT = "#1f2328", "#6e7781", "#d8dee4"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, searchable, small
    "svg.hashsalt": "normclip",  # the same figures give the same file
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "xtick.color": MUTED,
}
"""matplotlib settings, for ``rc_context``."""
