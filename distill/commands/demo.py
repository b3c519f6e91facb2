"""`distill demo`: a page on this machine that shows what a student sees in an image."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.benchmarks.files import read_image
from distill.commands.predict import logits_of, mask_of, open_model
from distill.deployment.runtimes import ModelFile, needs
from distill.drawing.overlays import blend, shares
from distill.errors import UserError

HOST = "127.0.0.1"
SHOWN = 1280  # the longer side of an overlay at most: a browser shows no more
CLASSES = 5
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is fetched
HEIGHT = 360
STYLE = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
.about h1 { font-size: 1.5rem; font-weight: 650; margin: 0.75rem 0 0.25rem; }
.about h1, .legend li { overflow-wrap: anywhere; }
.about p, .note p { opacity: 0.75; margin: 0; }
.note .problem { color: var(--error-icon-color); opacity: 1; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.legend { display: flex; flex-wrap: wrap; gap: 0.4rem 1.25rem; list-style: none; padding: 0; }
.legend { margin: 0 0 0.75rem; }
.legend li { display: flex; align-items: center; gap: 0.5rem; margin: 0; }
.legend i { width: 0.9rem; height: 0.9rem; border-radius: 3px; border: 1px solid #8888; }
.legend b { font-weight: 400; font-variant-numeric: tabular-nums; opacity: 0.75; }
"""


def demo(model: str, *, port: int, trust: bool = False) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C. Uploads are gone when it ends.

    Args:
        model: A run folder, an exported student, or a file that `distill export` wrote.
        port: Of the page.
        trust: Open a TorchScript file too, see `open_model`.

    Raises:
        UserError: The model gives no predictions, the port is taken, or gradio is missing.
    """
    _check_free(port)
    opened = open_model(model, trust=trust)
    opened.run(np.zeros((1, 3, *opened.metadata["image_size"]), np.float32))  # the first is slow
    with tempfile.TemporaryDirectory() as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        gradio = needs("gradio", "demo")
        page = build_page(gradio, model, opened)
        page.launch(
            server_name=HOST, server_port=port, share=False, inline=False, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, footer_links=[], css=STYLE,
            theme=gradio.themes.Default(primary_hue="blue", font=FONT, font_mono="monospace"),
        )  # fmt: skip
        print(f"{model} at http://{HOST}:{port}; press Ctrl-C to stop", flush=True)
        threading.Event().wait()  # the server's thread ends with the program


def _check_free(port: int) -> None:
    """Before anything is loaded, which takes seconds."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be a number from 1 to 65535")
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"--port {port}: {reason.lower()}; choose another") from error


def build_page(gradio: Any, name: str, model: ModelFile) -> Any:
    """The page as gradio's `Blocks`; its endpoint `predict` returns the results of `look`.

    Args:
        gradio: The module.
        name: What the page calls the model.
        model: A segmenter or a classifier.
    """
    view = {"height": HEIGHT, "format": "png", "interactive": False, "elem_classes": "picture"}
    with gradio.Blocks(title=f"{name} - distill demo") as page:
        gradio.HTML(_about(name, model.metadata), elem_classes="about", padding=False)
        # An input of images would show what the browser makes of a file, readable or not.
        file = gradio.File(label="Your image", file_types=["image"], height=150)
        with gradio.Row():
            with gradio.Column(min_width=280):
                image = gradio.Image(label="Image", buttons=["fullscreen"], **view)
            with gradio.Column(min_width=280):
                if model.metadata["what"] == "segmenter":
                    buttons = ["download", "fullscreen"]
                    answer = gradio.Image(label="Mask", buttons=buttons, **view)
                else:
                    answer = gradio.Label(label="Class", num_top_classes=CLASSES)
                note = gradio.HTML(elem_classes="note", padding=False)
        done = file.upload(partial(look, model), file, [image, answer, note], api_name="predict")
        # Ready for the next one.
        done.then(lambda: None, outputs=file, api_visibility="private", show_progress="hidden")
    return page


def look(model: ModelFile, path: str) -> tuple[Image.Image | None, Any, str]:
    """Predict a file for the page.

    Returns:
        The image, upright; of a segmenter the overlay, of a classifier the probability of every
        class; as HTML the legend, largest class first, and the time. Or what is wrong alone.
    """
    try:
        pixels = read_image(Path(path), upright=True)
    except UserError:
        name = escape(Path(path).name)
        wrong = f"{name} cannot be read as an 8-bit image; try a JPEG or PNG."
        return None, None, f'<p class="problem">{wrong}</p>'
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    began = time.perf_counter()
    (logits,) = logits_of(model, [pixels])
    taken = 1e3 * (time.perf_counter() - began)
    height, width = model.metadata["image_size"]
    seen = f"{image.width} x {image.height} px, seen at {width} x {height} px"
    note = f"<p>{taken:.0f} ms for {seen}</p>"
    image.thumbnail((SHOWN, SHOWN))
    names = model.metadata["class_names"]
    if model.metadata["what"] == "classifier":
        return image, dict(zip(names, logits.softmax(0).tolist(), strict=True)), note
    mask, palette = mask_of(logits, (image.height, image.width)), model.metadata["palette"]
    return image, blend(np.array(image), mask, palette), _legend(mask, names, palette) + note


def _legend(mask: NDArray[np.uint8], names: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    rows = "".join(
        f'<li><i style="background: rgb{tuple(palette[index])}"></i>{escape(names[index])} '
        f"<b>{share:.1%}</b></li>"
        for index, share in shares(mask).items()
    )
    return f'<ul class="legend">{rows}</ul>'


def _about(name: str, metadata: dict[str, Any]) -> str:
    height, width = metadata["image_size"]
    classes = len(metadata["class_names"])
    return (
        f"<h1>{escape(name)}</h1><p>{escape(metadata['provenance']['model'])}, a "
        f"{metadata['what']} of {classes} classes at {width} x {height} px. "
        "Images stay on this machine.</p>"
    )
