"""A picture made of boxes, words and arrows, as SVG."""

from html import escape

# Legible on the white ground that every picture brings along, and told apart without colour too.
VIDEO, AUDIO, MASKED, WORK, PLAIN = "#9ecae1", "#fdbf6f", "#e0e0e0", "#c7e9c0", "#ffffff"
_LINE = "#333333"


class Picture:
    """What is drawn goes on top of what is there; coordinates in pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
        )
        self._parts = [
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{_LINE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = PLAIN, text: str = ""
    ) -> None:
        """A rectangle, with the lines of `text` in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{_LINE}" stroke-width="0.8"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4 + 15 * (i - (len(lines) - 1) / 2), line, "middle")

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        """Words whose base line begins, ends or has its middle at (x, y)."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#111111">'
            f"{escape(words)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{_LINE}" '
            'marker-end="url(#head)"/>'
        )

    def __str__(self) -> str:
        return "\n".join([self._head, *self._parts, "</svg>\n"])
