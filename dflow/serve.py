"""A web page with a box for a prompt, in front of a model of text; needs the extra ``serve``."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from dflow.config import InputError
from dflow.core import Context
from dflow.data import Tokenizer
from dflow.fill import fill, gapped
from dflow.generate import generate
from dflow.models import TextModel, prompted
from dflow.ops.noise import Controls
from dflow.page.figures import budgets_of

#: The mark that stands for a gap in a text.
GAP = "____"


@dataclass(frozen=True)
class Reply:
    """What a model has drawn.

    Attributes:
        text: the text, what was given and what was drawn.
        milliseconds: from the call to the symbols.
        calls: network calls that it took; None where gaps were filled, which may take several windows.
        drafts: how many of these symbols were drafted and accepted; None without drafts.
        bits: -log2 of the probability of what was drawn into gaps, exact; None for a continuation.
        exact: whether the draw follows the law of the model, without temperature.
    """

    text: str
    milliseconds: float
    calls: int | None
    drafts: int | None
    bits: float | None
    exact: bool

    @property
    def report(self) -> str:
        """The same in words, without the text."""
        parts = [f"{self.milliseconds:,.1f} ms"]
        if self.calls is not None:
            parts.append(f"{self.calls:,} network call{'s' * (self.calls != 1)}")
        if self.drafts is not None:
            parts.append(f"{self.drafts:,} drafted symbols accepted")
        if self.bits is not None:
            parts.append(f"{self.bits:,.2f} bits in the gaps, exact")
        law = "an exact draw" if self.exact else "not exact: temperature changes the law"
        return ", ".join([*parts, law])


def reply(
    model: TextModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    size: int,
    calls: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    drafted: TextModel | None = None,
) -> Reply:
    """Continue a text, or fill its gaps: the draws of ``dflow generate`` and of ``dflow fill``.

    Args:
        model: the model.
        tokenizer: that of the model.
        text: what the draw begins with; or a text with gaps, each marked by `GAP`.
        size: symbols that are drawn behind the text, or into each gap.
        calls: network calls of a chunk; None for the model's own number.
        temperature: divides the logits; the draw is exact at 1.
        seed: of the draw.
        drafted: the same model with drafts, by which continuations are drawn.

    Raises:
        InputError: what the model cannot draw, or a symbol that it does not know.
    """
    controls = Controls(temperature)
    model = model if calls is None else model.at(calls)
    if GAP in text:
        symbols, hidden = gapped(tokenizer, text, GAP, [size])
        begin = time.perf_counter()
        [filled] = fill(model, symbols, hidden, seed=seed, controls=controls)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        bits = -filled.log_prob / math.log(2)
        return Reply(tokenizer.decode(filled.ids), milliseconds, None, None, bits, controls.exact)
    prompt = tokenizer.encode(text) if text else None
    length = size + (0 if prompt is None else len(prompt))
    drawn_by = model if drafted is None else drafted
    if drawn_by.tally is not None:
        drawn_by.tally.clear()
    begin = time.perf_counter()
    [ids] = generate(drawn_by, 1, length=length, seed=seed, prompt=prompt, controls=controls)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    tally = drawn_by.tally
    needed = _needed(model, length, prompt) if tally is None else sum(tally.calls.values())
    accepted = None if tally is None else tally.accepted
    return Reply(tokenizer.decode(ids), milliseconds, needed, accepted, None, controls.exact)


def _needed(model: TextModel, length: int, prompt: torch.Tensor | None) -> int:
    """Network calls of a sample, at most."""
    if model.documents is None:
        return model.law.needed(length)
    known = None if prompt is None else prompted(prompt.to(model.device), 1)
    return model.documents.needed(length, Context(known=known))


def app(name: str, model: TextModel, tokenizer: Tokenizer, drafted: TextModel | None = None) -> Any:
    """The page, as `gradio.Blocks`; ``launch`` serves it.

    Raises:
        InputError: gradio is not installed.
    """
    gradio = _gradio()
    budgets, length = budgets_of(model), model.config.length

    def draw(text: str, size: float, temperature: float, seed: float, calls: int | None = None) -> Any:
        try:
            result = reply(
                model,
                tokenizer,
                text,
                size=int(size),
                calls=calls,
                temperature=temperature,
                seed=int(seed),
                drafted=drafted,
            )
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return result.text, result.report

    with gradio.Blocks(title=f"dflow: {name}", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# {name}\nA `{model.config.family}` model. It continues a text, or fills its gaps, each marked "
            f"by `{GAP}`. Times are those of this machine."
        )
        text = gradio.Textbox("", label="Text", lines=3, elem_id="prompt")
        with gradio.Row():
            size = gradio.Slider(1, length, min(64, length), step=1, label="Symbols to draw, or of each gap")
            temperature = gradio.Slider(0.1, 2, 1, step=0.05, label="Temperature (exact at 1)")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
        inputs = [text, size, temperature, seed]
        if len(budgets) > 1:
            inputs.append(gradio.Radio(budgets, value=model.num_calls, label="Network calls of a chunk"))
        button = gradio.Button("Draw", variant="primary", elem_id="draw")
        drawn = gradio.Textbox(label="Drawn", lines=6, interactive=False, elem_id="drawn")
        report = gradio.Markdown(elem_id="report")
        gradio.on([button.click, text.submit], draw, inputs, [drawn, report])
    return page


def launch(page: Any, host: str, port: int) -> None:
    """Serve a page of `app` until Ctrl-C, with fonts of the system and without servers of others.

    Raises:
        OSError: the port is in use, or the address is none of this machine.
    """
    theme = _gradio().themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(server_name=host, server_port=port, share=False, theme=theme)


def _gradio() -> ModuleType:
    # It is imported where it is needed: it takes seconds, and no other part of dflow uses it.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise InputError(
            "`dflow serve` needs gradio, which is not installed; install it with pip install 'dflow[serve]'"
        ) from None
    module: ModuleType = gradio
    return module
