"""One self-contained HTML page: its style, and the pieces that a report is put together from. No script, no network."""

import base64
import html
import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

PIXELATED_BELOW_PX = 65  # smaller pictures are enlarged pixel by pixel, so that they stay what they are

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1c1d1f;--soft:#5d6168;--line:#dcdcd8;--card:#fff;--ours:#eef4fb;
--accent:#1f66b0;--good:#1a7437;--bad:#a8391f;--c0:#3b73b9;--c1:#e07b1f;--c2:#3f9a4a;--c3:#cc3f45;--c4:#8b63b8;
--c5:#94614f;--c6:#d56aae;--c7:#777b80;--c8:#a8a01f;--c9:#1f9fb0}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e6e7e9;--soft:#a2a7ae;--line:#34383e;--card:#1c1f23;
--ours:#1d2a38;--accent:#78b3ee;--good:#6cc686;--bad:#ee8d72;--c0:#6ba3e6;--c1:#f39b4a;--c2:#63bf6f;--c3:#f0757a;
--c4:#b792e0;--c5:#bd8b78;--c6:#ee92cc;--c7:#a6abb1;--c8:#cfc74f;--c9:#52c6d6}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 8px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:24px 0 6px}
p{margin:6px 0;max-width:46rem}
.soft,.absent,figcaption{color:var(--soft);font-size:.9rem}
.absent{border-left:3px solid var(--line);padding-left:10px}
code{font-size:.88em;overflow-wrap:anywhere}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:left;border-top:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;border-top:0;white-space:nowrap}
.n{text-align:right;white-space:nowrap}
td small{display:block;color:var(--soft)}
@media(max-width:600px){td.n{white-space:normal}td .none{white-space:nowrap}}
td:first-child{min-width:9rem}td:nth-child(5){min-width:14rem}
tr.ours td{background:var(--ours)}
.none{color:var(--soft)}
.plus{color:var(--good)}.minus{color:var(--bad)}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr))}
.card{border:1px solid var(--line);border-radius:8px;background:var(--card);padding:10px 12px;min-width:0}
figure{margin:12px 0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:10.5px system-ui,sans-serif}
svg .t{fill:var(--fg);font-weight:600;font-size:12px}
svg .e{text-anchor:end}svg .m{text-anchor:middle}
svg .g{stroke:var(--line);stroke-width:.7}
svg .l{fill:none;stroke:var(--accent);stroke-width:1.4;stroke-linejoin:round}
svg .p{fill:var(--accent)}
.map{max-width:560px}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.85rem;max-width:none}
.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:5px}
.matrix img{width:100%;max-width:420px;image-rendering:pixelated;border:1px solid var(--line);background:var(--card)}
.pictures{display:flex;flex-wrap:wrap;gap:14px}
.pair,.row{display:flex;gap:4px;align-items:flex-start}
.pair img{width:84px;height:84px;border-radius:4px;display:block}
.row{overflow-x:auto;padding:8px 0;border-top:1px solid var(--line)}
.row figure{margin:0;flex:0 0 76px;width:76px}
.row figure:first-child{margin-right:12px}
.row img{width:76px;height:76px;border-radius:4px;display:block;object-fit:contain}
.row figcaption{font-size:.72rem;line-height:1.25;margin-top:3px;overflow-wrap:anywhere}
.row .hit img,.row .query img{outline:2px solid var(--good);outline-offset:-2px}
.row .miss img{outline:2px solid var(--bad);outline-offset:-2px}
.row .query img{outline-color:var(--soft)}
.pixelated{image-rendering:pixelated}
.bars{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:2px 28px}
.bars div{display:grid;grid-template-columns:8.5rem 1fr 3rem;gap:8px;align-items:center;font-size:.88rem}
.bars span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bars b{background:var(--line);height:10px;border-radius:5px;overflow:hidden}
.bars i{display:block;height:100%;background:var(--accent)}
.bars em{font-style:normal;text-align:right;font-variant-numeric:tabular-nums}
"""


def readable(text: str) -> str:
    """Text that can be written as UTF-8: what a name has of other bytes is shown as the replacement character."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind` is a class of the style: soft, absent."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int], marked: Sequence[int] = ()
) -> str:
    """Cells are HTML already; columns in `numeric` are set to the right, rows in `marked` stand out."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr{' class=ours' if i in marked else ''}>{cells('td', row)}</tr>\n" for i, row in enumerate(rows))
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def data_uri(image: Image.Image, kind: str) -> str:
    """The image as a URI; `kind` "PNG" or "JPEG"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(pixels: np.ndarray | Image.Image, alt: str, most_px: int = 224) -> str:
    """An <img>: (H, W, 3) uint8 or an image, shrunk to `most_px` at most; small ones lossless."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    small = max(image.size) < PIXELATED_BELOW_PX
    if max(image.size) > most_px:
        image = image.copy()
        image.thumbnail((most_px, most_px), Image.Resampling.BICUBIC)
    kind = ' class="pixelated"' if small else ""
    return f'<img{kind} alt="{html.escape(alt)}" src="{data_uri(image, "PNG" if small else "JPEG")}">'


def matrix_picture(matrix: np.ndarray, alt: str) -> str:
    """An <img> of a (d, d) matrix in [−1, 1]: blue above 0, orange below, at 0 clear, so that the page shows."""
    strength = (np.abs(matrix).clip(0, 1) * 255).round().astype(np.uint8)
    colour = np.where((matrix > 0)[..., None], np.uint8([43, 116, 200]), np.uint8([226, 110, 25])).astype(np.uint8)
    rgba = np.concatenate([colour, strength[..., None]], 2)
    return f'<img alt="{html.escape(alt)}" src="{data_uri(Image.fromarray(rgba), "PNG")}">'
