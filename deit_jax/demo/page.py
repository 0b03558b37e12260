"""The page itself, with Gradio, and the server: of `deit demo` and of a Space alike."""

import contextlib
import importlib
import importlib.resources
import logging
import os
import socket
import tempfile
import threading
from typing import Any

from deit_jax.analysis.report.html import data_uri, element, inline
from deit_jax.demo.pictures import png_pixels
from deit_jax.demo.session import Session
from deit_jax.errors import UserError

log = logging.getLogger("deit_jax")

DROP = "Drop an image, or click on an example."
LARGEST = "200mb"  # of a file that is dropped
ON_CLICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", {index: Number(button.dataset.index), value: ""});
});"""
HOUR = 3600  # seconds after which dropped files are removed


def require_gradio() -> Any:
    """Return Gradio, which then tells nobody anything; raise UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # A folder of its own, which is gone with this process.
    if "GRADIO_TEMP_DIR" not in os.environ:
        _kept.append(tempfile.TemporaryDirectory(prefix="deit-demo-"))
        os.environ["GRADIO_TEMP_DIR"] = _kept[-1].name
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}: pip install 'deit_jax[demo]'") from error
    return gradio


_kept: list[tempfile.TemporaryDirectory] = []


def build(session: Session):
    """Return the page as a gradio.Blocks, for `serve`; the models are compiled."""
    gr = require_gradio()
    session.warm_up()
    with contextlib.suppress(ImportError):  # else Gradio does so at the first answer, for a second
        importlib.import_module("matplotlib.pyplot")
    first = session.examples[0] if session.examples else None
    block = max(session.depth, 1)

    def show(path, block):
        if not path:
            return _empty(), "", {}
        answer = session.answer(path, int(block))
        return answer.html, path, answer.json

    def choose(block, event):
        path = str(session.folder / session.examples[event.index].file)
        return *show(path, block), None

    choose.__annotations__["event"] = gr.SelectData  # by which Gradio knows what to hand over
    start = show(str(session.folder / first.file), block) if first else (_empty(), "", {})
    name = " and ".join(model.title for model in session.models)
    # Analytics are off twice: here, and in the environment for what Gradio does on import.
    with gr.Blocks(
        title=f"{name}: DeiT", analytics_enabled=False, delete_cache=(HOUR, HOUR)
    ) as page:
        gr.HTML(_header(session), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=270):
                file = gr.File(label="Image", height=150, elem_id="file")
                gallery = _gallery(gr, session)
                slider = gr.Slider(
                    1,
                    max(block, 2),
                    value=block,
                    step=1,
                    label="Block whose heads are shown",
                    visible=session.depth > 1,
                    elem_id="block",
                )
            with gr.Column(scale=3, min_width=310):
                out = gr.HTML(start[0], elem_id="answer", apply_default_css=False)
        current, said = gr.State(start[1]), gr.JSON(visible=False)
        outputs = [out, current, said]
        known: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "look"}
        file.upload(show, [file, slider], outputs, api_name="look", **known)
        slider.change(
            show, [current, slider], outputs, api_name=False, trigger_mode="always_last", **known
        )
        if gallery is not None:
            gallery.select(choose, [slider], [*outputs, file], api_name=False, **known)
    return page


def _gallery(gr, session: Session):
    """Return the examples to click on, None without any."""
    if not session.examples:
        return None
    buttons = []
    for number, example in enumerate(session.examples):
        picture = data_uri(png_pixels(session.folder / example.thumbnail))
        image = element("img", src=picture, alt="", width="96", height="96")
        caption = element("span", example.truth)
        text = f"example {number + 1}: {example.truth}"
        about = {"data_index": str(number), "type": "button", "aria_label": text}
        buttons.append(element("button", image, caption, **about))
    title = element("h3", "Examples from the evaluation data")
    box = element("div", title, element("div", buttons, class_="examples"), class_="deit")
    known: dict[str, Any] = {"elem_id": "examples", "js_on_load": ON_CLICK}
    return gr.HTML(inline(box), apply_default_css=False, **known)


def _header(session: Session) -> str:
    distilled = any(model.distilled for model in session.models)
    title = "What two tokens see" if distilled else "What the model sees"
    names = ", ".join(model.title for model in session.models)
    words = f"{names}. {DROP if session.examples else 'Drop an image.'}"
    words += " It stays on the machine that serves this page."
    parts = [element("h1", title), element("p", words, class_="faint")]
    return inline(element("div", element("header", parts), class_="deit"))


def _empty() -> str:
    return inline(element("div", element("p", "No image yet.", class_="empty"), class_="deit"))


def serve(page, host: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Serve the page until the process is told to stop; raise UserError for a port that is taken.

    Without `host` and `port` Gradio's own: what GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say, as
    in a Space, or else 127.0.0.1 from port 7860 on. `share` asks Gradio for a public address.
    """
    begin(page, host, port, share)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)


def begin(page, host: str | None = None, port: int | None = None, share: bool = False) -> str:
    """Start to serve the page in threads of this process; return its address."""
    gr = require_gradio()
    plain = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    theme = gr.themes.Base(primary_hue="blue", radius_size="lg", font=plain, font_mono=mono)
    try:
        _, here, there = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=log.isEnabledFor(logging.INFO),  # else Gradio prints the address, as in a Space
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=LARGEST,
            theme=theme,
            head=f"<style>{style()}</style>",  # `css` would not reach what is around our own HTML
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--host={host} --port={port}: {reason}") from error
    log.info("demo: %s (Ctrl-C ends it)", there or here)
    return there or here


def free_port(host: str, port: int) -> int:
    """Return a port that can be served at, any for 0; raise UserError where it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
            return tried.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={host} --port={port}: cannot be served at ({reason})") from error


def style() -> str:
    """Return the page's own style sheet."""
    return (importlib.resources.files("deit_jax.demo") / "style.css").read_text("utf-8")
