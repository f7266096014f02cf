"""``dflow serve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dflow.cli.drafts import drafted
from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Machine, load_model
from dflow.config import InputError


@dataclass(kw_only=True)
class Serve(Machine):
    """Serve a web page with a box for a prompt.

    It continues a text, or fills its gaps, while one waits, in the number of network calls and at the
    temperature that one chooses, and says how long that took. It needs the extra serve (gradio). Ctrl-C ends
    it.
    """

    model: str = flag("folder of the model")
    draft: str = flag(
        "what proposes symbols ahead, for models of family transformer: counts, the folder of a faster "
        "model, or none",
        "none",
    )
    host: str = flag("address to serve at; 0.0.0.0 serves the network", "127.0.0.1")
    port: int = flag("port to serve at", 7860)


def serve(flags: Serve) -> int:
    """`dflow serve`."""
    from dflow.models import model_type
    from dflow.serve import app, launch

    if model_type(flags.model) != "dflow":
        raise InputError(f"{flags.model}: is no model of text; dflow serve draws texts")
    if not 0 < flags.port < 1 << 16:
        raise InputError(f"--port {flags.port} must be from 1 to {(1 << 16) - 1}")
    model, tokenizer = load_model(flags.model, flags.settle())
    other = drafted(model, tokenizer, flags.draft)
    page = app(Path(flags.model).name, model, tokenizer, None if other is model else other)
    try:
        launch(page, flags.host, flags.port)
    except OSError as error:
        raise InputError(f"--host {flags.host} --port {flags.port}: {error}") from None
    return 0


VERBS: Verbs = (("serve", Serve, serve, "dflow serve --model runs/grouped"),)
