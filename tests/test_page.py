"""The page: its figures are those of the command line, its traces those of the draws; it requests nothing."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser
from folders import TEXT, make_model, write_model, write_text

from dflow import hf, shipped, zoo
from dflow.cli import main
from dflow.data import Bytes, Characters, Tokenizer
from dflow.generate import generate
from dflow.page import document, pieces_of, role_of, traces

LENGTH, SAMPLES, LIMIT = 24, 2, 4
BUDGETS = {"calls": [1, 4], "num_calls": 2, "block": 2}
OWN = "line 7 of a text: cccc.\nline 8 of a"


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*argv]) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, a text, and the page of them."""
    folder = tmp_path_factory.mktemp("page")
    text = write_text(folder)
    write_model(folder / "groups", "grouped", text, length=LENGTH, context=8, **BUDGETS)
    write_model(folder / "causal", "transformer", text, length=LENGTH, context=8, counts=3)
    write_model(folder / "flow", "bipartite", text, length=LENGTH)
    rows = [
        {"step": i, "seconds": 60.0 * i, "train_loss_bits": 4 / i, "valid_bits": 3 / i} for i in (1, 2, 3)
    ]
    for name in ("groups", "causal"):
        lines = [json.dumps(row | {"unit": "bits a character"}) for row in rows]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "own.txt").write_text(OWN, encoding="utf-8")
    names = [str(folder / name) for name in ("flow", "causal", "groups")]
    words = ["--samples", str(SAMPLES), "--limit", str(LIMIT), "--rounds", "1", "--threads", "1"]
    words += ["--text", str(folder / "own.txt"), "-o", str(folder / "page.html")]
    assert main(["page", *names, *words]) == 0
    return folder


def record_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    record: dict[str, Any] = json.loads(data)
    return record


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return record_of(folder / "page.html")


# -- figures ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_evaluate(
    folder: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    points = {
        (model["name"], point["calls"], point["drafted"]): point
        for model in record["models"]
        for point in model["points"]
    }
    drafted = [key for key in points if key[2]]
    assert [name for name, _, _ in drafted] == ["causal"]
    plain = {"groups": [1, 2, 4], "causal": [LENGTH], "flow": [record["models"][0]["points"][0]["calls"]]}
    assert set(points) - set(drafted) == {(name, n, False) for name, calls in plain.items() for n in calls}
    for (name, calls, _), point in points.items():
        suffix = f"@{calls}" if name == "groups" else ""
        words = ["--model", f"{folder / name}{suffix}", "--limit", str(LIMIT), "--threads", "1", "--json"]
        evaluation = json.loads(run(capsys, "evaluate", *words))
        shown = point["bits"], point["standard_error"], point["round_trip"]
        assert shown == tuple(evaluation[key] for key in ("bpc", "standard_error", "round_trip"))
        assert record["data"]["protocol"] == evaluation["protocol"]
        assert point["milliseconds"] > 0
    assert [model["curve"] and len(model["curve"]["rows"]) for model in record["models"]] == [None, 3, 3]


@torch.no_grad()
def test_samples_are_those_of_generate_and_cost_what_the_model_says(
    folder: Path, record: dict[str, Any]
) -> None:
    assert record["groups"]["calls"] == [1, 2, 4]
    assert (record["groups"]["default"], record["causal"]["calls"]) == (1, [LENGTH])
    for role, name in (("groups", "groups"), ("causal", "causal")):
        model, tokenizer = hf.load(folder / name), Tokenizer.load(folder / name)
        panel = record[role]
        for calls, rows in zip(panel["calls"], panel["samples"], strict=True):
            law = model.at(calls)
            assert len(rows) == SAMPLES
            for trace, ids in zip(rows, generate(law, SAMPLES), strict=True):
                assert "".join(trace["pieces"]) == tokenizer.decode(ids)
                bits = -law.log_prob(ids[None]).item() / math.log(2)
                assert trace["total_bits"] == pytest.approx(bits, rel=1e-6)
                assert sum(trace["bits"]) == pytest.approx(bits, rel=1e-5)
                assert trace["num_characters"] == LENGTH
                assert sorted(set(trace["calls"])) == list(range(1, trace["num_calls"] + 1))
                assert trace["num_calls"] == calls or trace["drafts"]


def test_drafts_replay_the_text(record: dict[str, Any]) -> None:
    for trace in record["causal"]["samples"][0]:
        assert trace["equal"] is True
        assert trace["num_calls"] == len(trace["drafts"]) <= LENGTH
        place = 0
        for number, draft in enumerate(trace["drafts"], 1):
            assert draft["begin"] == place
            text = trace["pieces"][place : place + len(draft["drafted"])]
            k = draft["accepted"]
            assert draft["drafted"][:k] == text[:k]
            assert draft["drafted"][k : k + 1] != text[k : k + 1] or not draft["drafted"][k:]
            assert draft["settled"] in (k, k + 1)
            assert trace["calls"][place : place + draft["settled"]] == [number] * draft["settled"]
            place += draft["settled"]
        assert place == LENGTH
    drafted = [draft for trace in record["causal"]["samples"][0] for draft in trace["drafts"]]
    assert any(draft["drafted"] for draft in drafted)


def test_a_text_has_the_bits_of_score(
    folder: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert record["text"]["name"] == "own.txt"
    assert [shade["model"] for shade in record["text"]["shades"]] == ["causal", "groups"]
    for shade in record["text"]["shades"]:
        words = ["--model", str(folder / shade["model"]), "--format", "jsonl", "--each", "symbol"]
        *parts, whole = map(json.loads, run(capsys, "score", str(folder / "own.txt"), *words).splitlines())
        assert shade["total_bits"] == whole["bits"]
        assert (shade["num_symbols"], shade["num_characters"]) == (len(OWN), len(OWN))
        assert shade["bits"] == [round(part["bits"], 5) for part in parts]
        assert "".join(shade["pieces"]) == OWN


def test_symbols_of_several_bytes_spell_their_text() -> None:
    ids = [*"aé€ \n".encode(), 0xFF, 0x62]
    assert pieces_of(Bytes(), torch.tensor(ids)) == ["a", "", "é", "", "", "€", " ", "\n", "", "\ufffdb"]
    assert pieces_of(Bytes(), torch.tensor([0x61, 0xC3])) == ["a", "\ufffd"]


@pytest.mark.parametrize("ended", [False, True], ids=["streams", "lines"])
@pytest.mark.parametrize("family", zoo.names("text"))
@torch.no_grad()
def test_every_family_has_a_trace_or_none(family: str, ended: bool) -> None:
    tokenizer = Characters(list("abcde"))
    model = make_model(family, tokenizer.size, explicit_length=ended)
    if role_of(model) is None:
        assert family in ("bipartite", "autoregressive", "multiscale")
        return
    for trace, ids in zip(traces(model, tokenizer, 3, seed=1), generate(model, 3, seed=1), strict=True):
        text, n = tokenizer.decode(ids), int((ids >= 0).sum())
        assert "".join(trace.pieces) == text
        assert (len(trace.calls), len(trace.bits), trace.num_characters) == (n, n, n + ended)
        lengths = torch.tensor([n]) if ended else None
        bits = -model.log_prob(tokenizer.encode(text)[None], lengths).item() / math.log(2)
        assert trace.total_bits == pytest.approx(bits, rel=1e-5)
        assert 1 <= min(trace.calls) <= max(trace.calls) == trace.num_calls <= model.num_calls
        if role_of(model) == "causal":
            assert trace.calls == list(range(1, n + 1))


# -- the models that come with dflow ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tolstoy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, since the book that the models have read comes without them, and the page of both on it."""
    folder = tmp_path_factory.mktemp("tolstoy")
    line = "Prince Andrew looked at Natasha, who was smiling, and did not know what to say.\n"
    (folder / "text.txt").write_text(line * 10, encoding="utf-8")
    words = ["page", *shipped.names(), "--data", str(folder / "text.txt"), "--split", "all", "--limit", "2"]
    words += ["--samples", "1", "--rounds", "1", "--threads", "1", "-o", str(folder / "page.html")]
    assert main(words) == 0
    return folder


@pytest.mark.slow
def test_figures_of_the_models_that_ship_are_those_of_evaluate(
    tolstoy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(tolstoy / "page.html")
    points = {
        (model["name"], point["calls"]): point
        for model in record["models"]
        for point in model["points"]
        if not point["drafted"]
    }
    assert list(points) == [*(("tolstoy", calls) for calls in (1, 2, 4, 8, 16, 32)), ("tolstoy-causal", 256)]
    for name, calls in (("tolstoy", 4), ("tolstoy", 32), ("tolstoy-causal", 256)):
        model = f"{name}@{calls}" if name == "tolstoy" else name
        words = ["--model", model, "--data", str(tolstoy / "text.txt"), "--split", "all", "--limit", "2"]
        evaluation = json.loads(run(capsys, "evaluate", *words, "--threads", "1", "--json"))
        point = points[name, calls]
        assert (point["bits"], point["standard_error"]) == (evaluation["bpc"], evaluation["standard_error"])
        assert (point["round_trip"], evaluation["round_trip"]) == (True, True)
        assert record["data"]["protocol"] == evaluation["protocol"]


@pytest.mark.slow
def test_the_page_of_the_models_that_ship_slides_and_names_what_is_pointed_at(
    tolstoy: Path, chrome: Any
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = tolstoy / "page.html"
    assert page.stat().st_size < 4e6
    panel = record_of(page)["groups"]
    with watched(chrome, page):
        assert "tolstoy trained on war-and-peace" in by(chrome, "#panels").text
        slider = by(chrome, "#calls")
        slider.send_keys(Keys.HOME)
        for calls, [trace] in zip(panel["calls"], panel["samples"], strict=True):
            assert by(chrome, "h1").text == f"256 characters in {calls} network call{'s' * (calls > 1)}"
            assert f"{trace['total_bits']:,.3f} bits" in by(chrome, ".panel .total").text
            span = chrome.find_elements("css selector", ".panel:first-child .s")[2]
            ActionChains(chrome).move_to_element(span).perform()
            price = f"position 3, drawn in call {trace['calls'][2]} of {calls}, {trace['bits'][2]:.2f} bits"
            assert price in by(chrome, ".panel .readout").text
            slider.send_keys(Keys.ARROW_RIGHT)


# -- the file --------------------------------------------------------------------------------------------


def test_the_file_is_small_and_names_no_address(folder: Path) -> None:
    page = folder / "page.html"
    assert page.stat().st_size < 200_000
    text = page.read_text(encoding="utf-8")
    addresses = set(re.findall(r"""https?://[^\s"'<>]+|\b(?:src|href)="[^"]*"|url\([^)]*\)""", text))
    assert addresses == {"http://www.w3.org/2000/svg", 'href="data:,"'}
    assert "default-src 'none'" in text
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|sendBeacon|import)\b\s*\(", text)


def test_no_text_ends_the_data_or_the_page() -> None:
    hostile = {"text": "</script><b>{{script}}", "more": "<!--"}
    page = document("a < b", hostile).decode()
    assert "<title>a &lt; b</title>" in page
    assert page.count("</script>") == 2
    assert page.rstrip().endswith("</html>")
    [data] = re.findall(r'id="data">(.*?)</script>', page, re.S)
    assert json.loads(data) == hostile


def test_without_data_the_page_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    model = str(write_model(tmp_path / "lstm", "lstm", text, counts=3))
    text.unlink()
    words = ["page", model, "--rounds", "1", "--samples", "1", "--threads", "1"]
    assert main([*words, "-o", str(tmp_path / "page.html")]) == 0
    assert "note: no bits are measured, since the data are not at hand" in capsys.readouterr().err
    page = record_of(tmp_path / "page.html")
    assert page["data"] is None
    assert str(text) in page["note"]
    [point] = page["models"][0]["points"]
    assert (point["bits"], point["calls"]) == (None, 8)
    assert page["groups"] is None
    assert page["causal"]["samples"][0][0]["drafts"] == []
    assert "neither a data set nor" in run(
        capsys, *words, "--data", "nowhere.txt", "-o", str(tmp_path / "b.html"), code=2
    )
    assert not (tmp_path / "b.html").exists()


def test_what_cannot_be_shown_is_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "page.html")]
    groups, flow = str(folder / "groups"), str(folder / "flow")
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("Ω", encoding="utf-8")
    for words, message in [
        ([groups, "-o", str(folder / "page.html")], "page.html: exists"),
        ([groups, groups, *out], "a model is named twice"),
        ([flow, *out], "of family bipartite, whose samples appear as a whole; name a model that is drawn"),
        ([groups, "--samples", "0", *out], "--samples 0 must be at least 1"),
        ([groups, "--text", str(foreign), *out], f"--text {foreign}, model {groups}: "),
        ([str(folder / "causal"), "--draft", flow, *out], f"--draft {flow}: "),
    ]:
        assert message in run(capsys, "page", *words, code=2)
    assert not (tmp_path / "page.html").exists()


# -- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chrome(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def opened(folder: Path, chrome: Any) -> Iterator[Any]:
    with watched(chrome, folder / "page.html"):
        yield chrome


@contextmanager
def watched(chrome: Any, page: Path) -> Iterator[None]:
    """The page at the width of a desk; afterwards, nothing may have been complained about or requested."""
    for kind in ("browser", "performance"):
        chrome.get_log(kind)
    emulate(chrome, 1280)
    chrome.get(page.as_uri())
    yield
    assert chrome.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Not those of the tab that the browser begins with.
    requests = [p["request"]["url"] for p in sent if p["documentURL"].startswith("file:")]
    assert requests
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}


def emulate(chrome: Any, width: int, **features: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def by(chrome: Any, css: str) -> Any:
    return chrome.find_element("css selector", css)


def text_of(chrome: Any, panel: int) -> str:
    script = "return [...document.querySelectorAll('.panel .text')][arguments[0]].innerText"
    return str(chrome.execute_script(script, panel)).replace("\n", "")


def test_the_slider_shows_the_samples_of_each_number_of_calls(opened: Any, record: dict[str, Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    slider, panel = by(opened, "#calls"), record["groups"]
    assert slider.get_attribute("aria-valuetext") == "2 network calls"
    assert by(opened, "label[for=calls]").text.startswith("Network calls")
    for key, i in ((Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, 2)):
        slider.send_keys(key)
        calls = ("1 network call", "2 network calls", "4 network calls")[i]
        assert by(opened, "h1").text == f"{LENGTH} characters in {calls}"
        trace = panel["samples"][i][0]
        spelled = [piece.replace("\n", "↵") for piece in trace["pieces"]]
        shown = [
            span.get_attribute("textContent")
            for span in opened.find_elements("css selector", ".panel:first-child .s")
        ]
        assert shown == spelled
        assert f"{trace['total_bits']:,.3f} bits" in by(opened, ".panel .total").text
    opened.execute_script("document.getElementById('sample').value = 1; choose()")
    assert by(opened, ".panel .total").text.startswith(f"{panel['samples'][2][1]['total_bits']:,.3f} bits")
    assert "equals that of the plain loop" in by(opened, ".proof:not([hidden])").text


def test_steps_and_playing_show_one_call_after_another(opened: Any, record: dict[str, Any]) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    calls = record["groups"]["samples"][1][0]["calls"]
    by(opened, "#restart").send_keys(Keys.ENTER)
    assert set(text_of(opened, 0)) == {"·"}
    assert not by(opened, "#back").is_enabled()
    for call in (1, 2):
        by(opened, "#forward").send_keys(Keys.SPACE)
        spans = opened.find_elements("css selector", ".panel:first-child .s")
        marked = ["now" in span.get_attribute("class") for span in spans]
        assert marked == [number == call for number in calls]
        assert ["open" in span.get_attribute("class") for span in spans] == [n > call for n in calls]
        assert f"call {call} of 2" in by(opened, ".panel .progress").text
    # The other model: drafted first, then verified.
    first = record["causal"]["samples"][0][0]["drafts"][0]
    opened.execute_script("panels[1].go(1)")
    drafted = opened.find_elements("css selector", ".panel:last-child .s.draft")
    assert [span.text for span in drafted if span.text] == [p for p in first["drafted"] if p.strip()]
    opened.execute_script("panels[1].go(2)")
    assert len(opened.find_elements("css selector", ".panel:last-child .s.right")) == first["accepted"]
    by(opened, "#restart").click()
    by(opened, "#play").click()
    assert by(opened, "#play").text == "Pause"
    by(opened, "#play").click()
    assert by(opened, "#play").text == "Play"
    opened.execute_script("panels.forEach((panel) => (panel.milliseconds = 1)); slowness = () => 1; play()")
    finished = "return panels.every((panel) => panel.step > panel.steps)"
    WebDriverWait(opened, 5).until(lambda chrome: chrome.execute_script(finished))
    assert by(opened, "#status").get_attribute("textContent") == "The samples are drawn."


def test_pointer_and_keys_show_what_a_symbol_costs(opened: Any, record: dict[str, Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    trace = record["groups"]["samples"][1][0]
    spans = opened.find_elements("css selector", ".panel:first-child .s")
    ActionChains(opened).move_to_element(spans[3]).perform()
    price = f"position 4, drawn in call {trace['calls'][3]} of 2, {trace['bits'][3]:.2f} bits"
    assert price in by(opened, ".panel .readout").text
    block = by(opened, ".panel .text")
    assert (block.get_attribute("tabindex"), block.get_attribute("role")) == ("0", "listbox")
    block.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert f"position 2, drawn in call {trace['calls'][1]}" in by(opened, ".panel .readout").text
    active = opened.find_element("id", block.get_attribute("aria-activedescendant"))
    assert "position 2" in active.get_attribute("aria-label")
    by(opened, ".panel summary").click()
    cells = opened.find_elements("css selector", ".panel:first-child tbody tr:nth-child(2) td")
    assert cells[3].text == f"{trace['bits'][1]:.3f}"
    # Without colours nothing has a shade, and the values are as before.
    opened.execute_script("shading.value = 'none'; shading.dispatchEvent(new Event('change'))")
    shades = "return [...document.querySelectorAll('#panels .s')].map((s) => s.style.getPropertyValue('--b'))"
    assert set(opened.execute_script(shades)) == {"0.000"}
    assert f"{sum(record['text']['shades'][0]['bits']):.1f}"[:-2] in by(opened, "#own-panel .total").text


def test_points_of_plots_are_named_by_pointer_and_keys(opened: Any, record: dict[str, Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    points = opened.find_elements("css selector", "#plot-calls .point")
    every = [point for model in record["models"] for point in model["points"]]
    assert len(points) == len(every)
    opened.execute_script("document.getElementById('plot-calls').scrollIntoView({block: 'center'})")
    ActionChains(opened).move_to_element(points[0]).perform()
    tip = by(opened, "#plot-calls .tip")
    assert tip.is_displayed()
    assert f"{every[0]['bits']:.4f}" in tip.text
    opened.execute_script("document.querySelector('#plot-time .point').focus()")
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    focused = opened.switch_to.active_element
    assert focused.get_attribute("aria-label").startswith("causal")
    assert by(opened, "#plot-time .tip").is_displayed()
    outline = "return getComputedStyle(arguments[0].querySelector('.halo')).stroke"
    assert opened.execute_script(outline, focused) != "rgba(0, 0, 0, 0)"
    assert len(opened.find_elements("css selector", "#plot-learning .point")) == 6
    cells = [row.text.split() for row in opened.find_elements("css selector", "#cost-table tr:has(td)")]
    assert [row[0] for row in cells] == [f"{point['calls']}" for point in every]
    assert [row[1] for row in cells] == [f"{point['bits']:.4f}" for point in every]


def test_it_fits_a_phone_keeps_to_the_scheme_and_to_reduced_motion(opened: Any, folder: Path) -> None:
    emulate(opened, 375, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    opened.get((folder / "page.html").as_uri())
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 375
    paper = "return getComputedStyle(document.body).backgroundColor"
    dark = opened.execute_script(paper)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 200
    motion = "return getComputedStyle(document.querySelector('.s')).transitionDuration"
    assert opened.execute_script(motion) == "0s"
    picture = base64.b64decode(opened.get_screenshot_as_base64())
    assert picture[:4] == b"\x89PNG"
    emulate(opened, 375, prefers_color_scheme="light")
    assert opened.execute_script(paper) != dark


def test_every_control_has_a_name_and_shows_its_focus(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(40):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        focused = opened.switch_to.active_element
        if focused.tag_name == "body":
            break
        reached.append(focused.get_attribute("id"))
        assert focused.accessible_name, focused.get_attribute("outerHTML")[:200]
        style = "const s = getComputedStyle(arguments[0]); return s.outlineStyle + s.outlineWidth"
        if "point" not in focused.get_attribute("class").split():
            assert opened.execute_script(style, focused) == "solid2px"
    assert {"play", "calls", "sample", "shading", "own-model", "axis"} <= set(reached)


def test_the_text_of_the_stand_ins_is_in_their_vocabulary() -> None:
    assert set(OWN) <= set(TEXT)
