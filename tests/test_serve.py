"""`dflow serve`: its draws are those of the command line, and its page draws in a browser."""

from __future__ import annotations

import importlib.util
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from folders import LENGTH, write_model, write_text

from dflow import hf
from dflow.cli import main
from dflow.config import InputError
from dflow.data import Tokenizer
from dflow.distributions import LawDrafter
from dflow.fill import fill, gapped
from dflow.generate import generate
from dflow.ops.noise import Controls
from dflow.serve import GAP, reply

Loaded = tuple[hf.DflowModel, Tokenizer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    text = write_text(folder)
    write_model(folder / "groups", "grouped", text, context=8, calls=[1, 4])
    write_model(folder / "causal", "transformer", text, context=8, counts=3)
    return folder


def loaded(folder: Path) -> Loaded:
    return hf.load(folder), Tokenizer.load(folder)


def test_a_continuation_is_that_of_generate(folder: Path) -> None:
    model, tokenizer = loaded(folder / "groups")
    for calls, temperature in ((None, 1.0), (4, 1.0), (1, 0.5)):
        law = model if calls is None else model.at(calls)
        controls = Controls(temperature)
        drawn = reply(model, tokenizer, "line", size=5, calls=calls, temperature=temperature, seed=3)
        [ids] = generate(law, 1, length=9, seed=3, prompt=tokenizer.encode("line"), controls=controls)
        assert drawn.text == tokenizer.decode(ids)
        assert drawn.text.startswith("line")
        assert (drawn.calls, drawn.exact) == (calls or 2, temperature == 1)
        assert drawn.milliseconds > 0
        words = f"{drawn.calls} network call{'s' * (drawn.calls != 1)}"
        law_said = "an exact draw" if drawn.exact else "not exact: temperature changes the law"
        assert drawn.report == f"{drawn.milliseconds:,.1f} ms, {words}, {law_said}"
    [ids] = generate(model, 1, length=2 * LENGTH)
    assert reply(model, tokenizer, "", size=2 * LENGTH).text == tokenizer.decode(ids)


def test_gaps_are_those_of_fill_and_say_their_bits(folder: Path) -> None:
    model, tokenizer = loaded(folder / "groups")
    text = f"li{GAP} a {GAP}."
    symbols, hidden = gapped(tokenizer, text, GAP, [2])
    [filled] = fill(model, symbols, hidden, seed=1)
    drawn = reply(model, tokenizer, text, size=2, seed=1)
    assert drawn.text == tokenizer.decode(filled.ids)
    assert drawn.bits == pytest.approx(-filled.log_prob / math.log(2))
    assert f"{drawn.bits:.2f} bits in the gaps, exact, an exact draw" in drawn.report
    causal, vocabulary = loaded(folder / "causal")
    with pytest.raises(InputError, match="behind"):
        reply(causal, vocabulary, text, size=2)


def test_drafts_change_the_calls_alone(folder: Path) -> None:
    model, tokenizer = loaded(folder / "causal")
    drafted = model.drafted(LawDrafter(model.law))
    plain = reply(model, tokenizer, "li", size=6)
    fewer = reply(model, tokenizer, "li", size=6, drafted=drafted)
    assert fewer.text == plain.text
    assert plain.calls is not None
    assert fewer.calls is not None
    assert fewer.calls < plain.calls
    assert f"{fewer.drafts} drafted symbols accepted" in fewer.report


def test_what_is_missing_or_mistaken_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for words, message in [
        (
            [],
            "`dflow serve` needs gradio, which is not installed; install it with pip install 'dflow[serve]'",
        ),
        (["--port", "0"], "--port 0 must be from 1 to 65535"),
        (["--draft", "counts"], "--draft counts: this model has no counts"),
    ]:
        assert main(["serve", "--model", str(folder / "groups"), *words]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """That of the page, served by the command until it gets the signal of Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (the extra serve)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(folder / "groups"), "--port", str(port), "--threads", "1"]
    server = subprocess.Popen([sys.executable, "-m", "dflow", *words])
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        assert server.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.mark.slow
def test_the_page_draws_in_a_browser(address: str, folder: Path, tmp_path: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    model, tokenizer = loaded(folder / "groups")
    with browser(tmp_path / "profile") as chrome:
        chrome.get(address)
        wait = WebDriverWait(chrome, 20)
        box = wait.until(lambda c: c.find_element("css selector", "#prompt textarea"))
        box.send_keys("line")
        chrome.find_element("css selector", "#draw").click()

        def drawn(c: Any) -> str:
            return str(c.find_element("css selector", "#drawn textarea").get_attribute("value"))

        wait.until(drawn)
        [ids] = generate(model, 1, length=4 + LENGTH, prompt=tokenizer.encode("line"))
        assert drawn(chrome) == tokenizer.decode(ids)
        report = chrome.find_element("css selector", "#report").text
        assert report.endswith("ms, 2 network calls, an exact draw")
        box.send_keys("\N{SNOWMAN}")
        chrome.find_element("css selector", "#draw").click()
        toast = wait.until(lambda c: c.find_element("css selector", ".toast-body"))
        assert "\N{SNOWMAN}" in str(toast.get_attribute("textContent"))
