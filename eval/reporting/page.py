"""One self-contained HTML page, without a script and without a network: its parts by name, and pictures inside it.

`PARTS.measured(…)` and the others are the macros of parts.html: plain data → HTML. TABLES are those of tables.md.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from pipeline.errors import UserError

HERE = Path(__file__).parent
STYLE = (HERE / "style.css").read_text("utf-8")
Section = tuple[str, str]  # a title and its HTML
PIXELATED_BELOW_PX = 65  # smaller pictures are enlarged pixel by pixel, so that they stay what they are


def with_code(text: str) -> Markup:
    """Text as HTML, `marked` parts as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # str: Markup would escape the tags


def as_markdown(text: str) -> str:
    """Text as Markdown that shows it, `marked` parts as code: no tag, no link, no further cell, row or paragraph."""
    parts = re.split(r"(`(?:[^`\\]|\\(?!\|))+`)", " ".join(text.split()))  # in code, no more can escape a |
    parts[::2] = [re.sub(r"[\\`<|]|\](?=[(\[:])|&(?=#?\w+;)", _escaped, part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", r"\|") for part in parts[1::2]]  # all else is text in there
    return "".join(parts)


def _escaped(found: re.Match) -> str:
    return {"<": "&lt;", "&": "&amp;"}.get(found[0], "\\" + found[0])


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=jinja2.select_autoescape(),
    trim_blocks=True,
    extensions=["jinja2.ext.do"],
)
_TEMPLATES.filters["code"] = with_code
_TEMPLATES.filters["md"] = as_markdown
PARTS: Any = _TEMPLATES.get_template("parts.html").module
TABLES: Any = _TEMPLATES.get_template("tables.md").module


def readable(text: str) -> str:
    """Text for UTF-8 files and terminals: what is no text, and control characters, become the replacement character."""
    return re.sub("[\ud800-\udfff\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]", "\ufffd", text)


def or_sentence(title: str, make: Callable[[], str]) -> Section:
    """A section, or why it is not there."""
    try:
        return title, make()
    except UserError as error:
        return left_out(title, error)


def left_out(title: str, error: UserError) -> Section:
    """A section that says why it is empty."""
    return title, PARTS.left_out(error)


def whose(shown: dict, other: tuple[str, int] | None = None) -> str:
    """Says which checkpoint a part is about: that of the result `shown`, or an `other` (digest, step)."""
    own = f"Checkpoint {shown['checkpoint_sha256'][:12]}, step {shown['step']}."
    if other is None or other[0] == shown["checkpoint_sha256"]:
        return own
    return f"Checkpoint {other[0][:12]}, step {other[1]}. The results are of another: {own}"


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document, with a contents list."""
    return PARTS.page(title, STYLE, [(f"part-{i}", *section) for i, section in enumerate(sections, 1)])


def _image(image: Image.Image, alt: str, *, lossless: bool, pixelated: bool) -> Markup:
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    image.save(buffer, kind, **({} if lossless else {"quality": 88}))
    return PARTS.image(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, pixelated)


def picture(pixels: np.ndarray | Image.Image, alt: str, most_px: int = 224) -> Markup:
    """An <img>: (H, W, 3) uint8 or an image, shrunk to `most_px` at most; small ones lossless."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    small = max(image.size) < PIXELATED_BELOW_PX
    if max(image.size) > most_px:
        image = image.copy()
        image.thumbnail((most_px, most_px), Image.Resampling.BICUBIC)
    return _image(image, alt, lossless=small, pixelated=small)
