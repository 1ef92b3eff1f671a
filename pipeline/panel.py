"""What the page shows while it draws, as HTML: how far it is, the pictures so far, what was wrong; and how it looks."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

PIXELATED_BELOW = 128  # pixels: smaller images are enlarged pixel by pixel, larger ones smoothly
HINT = '<p class="hint">The images will appear here, out of noise.</p>'
PIXELATED = "<style>#panel img, #gallery img { image-rendering: pixelated; }</style>"
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#about p, #panel figcaption, #panel .hint, #bar { color: var(--body-text-color); opacity: 0.75; }
#panel, #bar, #panel > div, #bar > div { padding: 0 !important; }
#bar .going { display: flex; gap: 0.9rem; align-items: center; font-variant-numeric: tabular-nums; }
#bar .track { flex: 1; height: 0.4rem; border-radius: 1rem; background: var(--border-color-primary); }
#bar .track div { height: 100%; border-radius: 1rem; background: var(--primary-500); transition: width 0.2s; }
#panel .images, #gallery .grid-container {
  display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) !important;
}
#panel figure { margin: 0; }
#panel img { width: 100%; display: block; border-radius: 6px; }
#panel figcaption { font-size: 0.85rem; padding-top: 0.25rem; }
#panel figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#panel .hint { padding: 6.5rem 1rem; text-align: center; border: 1px dashed; border-radius: 8px; }
#panel .error { margin: 0; padding: 0.75rem 1rem; border-radius: 8px; border-left: 4px solid #dc2626; }
#panel .error { background: var(--background-fill-secondary); color: var(--body-text-color); }
#code .cm-gutters { display: none; }
#gallery .grid-wrap { min-height: 0; max-height: none; }
"""


def bar(step: int, num_steps: int, said: str | None = None) -> str:
    """How far a drawing is, or what is said in place of it."""
    told = said or f"step {step} of {num_steps}"
    track = f'<div class="track"><div style="width: {100 * step / num_steps:.1f}%"></div></div>'
    return f'<div class="going">{track}<span role="status">{html.escape(told)}</span></div>'


def pictures(images: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """N images, each over its caption."""
    figures = (
        f'<figure><img src="{data_url(image)}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption>'
        for image, text in zip(images, captions, strict=True)
    )
    return f'<div class="images">{"</figure>".join(figures)}</figure></div>'


def error(told: str) -> str:
    """What was wrong, in one line."""
    return f'<p class="error" role="alert">{html.escape(told)}</p>'


def caption(said: Mapping[str, Any]) -> str:
    """A few words under an image.  `said`: what it was asked for, as its file says it."""
    words = [said.get("class"), said.get("prompt"), f"seed {said['seed']}"]
    return " · ".join(word for word in words if word)


def data_url(image: Image.Image) -> str:
    """An image as part of a page: exact where it is small, as a JPEG where its bytes count."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) < PIXELATED_BELOW else "jpeg"
    image.save(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
