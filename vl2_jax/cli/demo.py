"""`vl2 demo`: a web page to ask a model about pictures, on this machine alone."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from vl2_jax.cli.flags import NO_MODEL, OptionalModel
from vl2_jax.cli.serve import LimitFlags, check_port, limits_of, loading, log_to_standard_error
from vl2_jax.cli.terminal import messages, tell
from vl2_jax.errors import RequestError, VL2Error
from vl2_jax.installation import install_line
from vl2_jax.progress import Display
from vl2_jax.sharding.devices import Devices

_DRAIN_SECONDS = 5.0  # that an answer has to end after Ctrl-C
_LIMITS = LimitFlags()
# Read by Gradio where it is imported: it asks nobody for its newest version and counts nothing.
_GRADIO = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def demo(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "",
    model: OptionalModel = NO_MODEL,
    flags: tyro.conf.OmitArgPrefixes[LimitFlags] = _LIMITS,
    port: int = 7860,
    mesh: str | None = None,
) -> None:
    """Open a web page on this machine to ask a model about pictures.

    Example: vl2 demo vl2-nano

    Args:
        name: As --model; by default vl2-nano.
        port: Of 127.0.0.1, where the page is; 0 is any that is free.
        mesh: Spread the model over this machine's devices: auto, expert, or sizes such as expert=4,tensor=2.
    """
    from vl2_jax.api import SHIPPED

    if name and model.model:
        raise RequestError("demo needs a model, once: vl2 demo MODEL, or --model MODEL.")
    model = dataclasses.replace(model, model=name or model.model or SHIPPED)
    check_port(port)
    options, limits = model.options(Devices(mesh)), limits_of(model, flags, mesh)
    with (
        tempfile.TemporaryDirectory(prefix="vl2-demo-", ignore_cleanup_errors=True) as folder,
        Display(messages) as display,
    ):
        os.environ.update(_GRADIO, GRADIO_TEMP_DIR=str(Path(folder, "sent")))  # and so what was sent goes with the page
        try:
            from vl2_jax.serving.http import server
            from vl2_jax.serving.http.door import LOOPBACK
            from vl2_jax.serving.http.service import Service, Settings
            from vl2_jax.serving.page.app import make_app
            from vl2_jax.serving.page.gallery import Gallery
        except ModuleNotFoundError as error:
            raise VL2Error(f"the page needs {error.name!r}: {install_line('demo')}") from None
        # Without a flag for another host: from elsewhere, ssh -L 7860:127.0.0.1:7860 HOST.
        listener = server.bind(LOOPBACK, port)
        log_to_standard_error()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # that tabs are open at the end is no error
        address = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        tell(f"open {address} in a browser; {model.model} is loading")

        def when_ready() -> None:
            display.close()
            tell(f"{model.model} is ready at {address}; Ctrl-C ends")

        service = Service(Settings(names=(model.model,), limits=limits))
        app = make_app(service, Gallery(Path(folder, "shown")))
        server.run(service, listener, loading(model.model, options, limits), _DRAIN_SECONDS, display, when_ready, app)
