const record = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) key === "class" ? (node.className = value) : node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const fixed = (x, digits) => x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
/** Bits from which on a symbol has the full shade. */
const FULL = 8;
/** A symbol as it can be seen: ends of lines and what has no text of its own get a sign. */
const seen = (piece) => (piece === "" ? "" : piece.replace(/\n/g, "↵").replace(/\t/g, "⇥"));
const named = (piece) => ({ " ": "space", "\n": "line break", "\t": "tab", "": "part of a character" })[piece] ?? piece;

/** Symbols in spans that wrap between words, the same way whether they are drawn yet or not. */
class Symbols {
  constructor(label, describe, readout) {
    this.node = make("div", { class: "text", tabindex: "0", role: "listbox", "aria-label": label });
    [this.describe, this.readout, this.cursor, this.spans] = [describe, readout, -1, []];
    this.id = `symbols-${(Symbols.number = (Symbols.number ?? 0) + 1)}`;
    const over = (event) => this.spans.indexOf(event.target.closest(".s"));
    this.node.addEventListener("pointermove", (event) => { const i = over(event); if (i >= 0) this.point(i); });
    this.node.addEventListener("pointerdown", (event) => { const i = over(event); if (i >= 0) this.point(i); });
    this.node.addEventListener("pointerleave", () => { if (document.activeElement !== this.node) this.point(-1); });
    this.node.addEventListener("focus", () => { if (this.cursor < 0 && this.node.matches(":focus-visible")) this.point(0); });
    this.node.addEventListener("blur", () => this.point(-1));
    this.node.addEventListener("keydown", (event) => this.key(event));
  }

  /** Lay out other pieces of text. */
  fill(pieces) {
    this.point(-1);
    this.spans = pieces.map((_, i) => make("span", { class: "s", role: "option", id: `${this.id}-${i}` }));
    const parts = [];
    let word = null;
    pieces.forEach((piece, i) => {
      if (!word) parts.push((word = make("span", { class: "w", role: "presentation" })));
      word.append(this.spans[i]);
      if (/\s$/.test(piece) || word.childElementCount >= 24) word = null;
      if (piece.endsWith("\n")) parts.push(make("br"));
    });
    this.node.replaceChildren(...parts);
  }

  /** What one symbol shows: text, classes, shade from 0 to 1, and what stood in its place before. */
  set(i, text, classes, shade, was) {
    const span = this.spans[i];
    if (span.textContent !== text) span.textContent = text;
    const name = `s ${classes}${i === this.cursor ? " at" : ""}`;
    if (span.className !== name) span.className = name;
    span.style.setProperty("--b", shade.toFixed(3));
    was === undefined ? span.removeAttribute("data-was") : span.setAttribute("data-was", seen(was));
  }

  /** Put the cursor on a symbol, whose values are then read out; -1 for none. */
  point(i) {
    if (i === this.cursor && i >= 0) return;
    this.spans[this.cursor]?.classList.remove("at");
    this.spans[this.cursor]?.removeAttribute("aria-selected");
    this.cursor = i;
    const span = this.spans[i];
    if (!span) { this.node.removeAttribute("aria-activedescendant"); this.readout.textContent = this.hint ?? ""; return; }
    span.classList.add("at");
    const [piece, values] = this.describe(i);
    span.setAttribute("aria-label", `${named(piece)}, ${values}`);
    span.setAttribute("aria-selected", "true");
    this.node.setAttribute("aria-activedescendant", span.id);
    this.readout.replaceChildren(make("code", {}, seen(piece) === " " ? "␣" : seen(piece) || "·"), ` ${values}`);
  }

  key(event) {
    const last = this.spans.length - 1, step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? last : step === undefined ? -1 : Math.max(0, Math.min(last, this.cursor + step));
    if (to < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.point(to);
    this.spans[to]?.scrollIntoView({ block: "nearest" });
  }
}

const probability = (bits) => { const p = 2 ** -bits; return p >= 0.001 ? fixed(100 * p, p < 0.1 ? 1 : 0) + " %" : `1 in ${Math.round(1 / p).toLocaleString("en")}`; };
const price = (bits) => `${fixed(bits, 2)} bits (probability ${probability(bits)})`;

/** One model: its sample, call by call. A step of a model with drafts is half a call: to draft, and to verify. */
class Panel {
  constructor(kind, source) {
    [this.kind, this.source] = [kind, source];
    this.model = record.models.find((model) => model.name === source.model);
    this.readout = make("p", { class: "readout" });
    this.symbols = new Symbols(`Sample of ${source.model}; arrow keys go over its symbols`, (i) => this.describe(i), this.readout);
    this.symbols.hint = "Point at a symbol, or go over the text with the arrow keys, to see what it costs.";
    [this.about, this.where, this.share, this.total, this.proof, this.bar] = ["p", "span", "span", "p", "p", "i"].map((tag) => make(tag));
    this.about.className = "kind"; this.total.className = "total"; this.proof.className = "proof";
    this.rows = make("tbody");
    const heads = ["symbol", "position", "call", "bits"].map((name) => make("th", { scope: "col" }, name));
    this.details = make("details", {}, make("summary", {}, "All symbols as a table"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Symbols of ${source.model}` }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), this.rows)));
    this.details.addEventListener("toggle", () => this.tabulate());
    this.node = make("article", { class: "panel", "aria-label": source.model }, make("h3", {}, source.model, make("small", {}, source.trained_on ? ` trained on ${source.trained_on}` : "")), this.about,
      make("div", { class: "progress" }, this.where, this.share), make("div", { class: "meter", "aria-hidden": "true" }, this.bar),
      this.symbols.node, this.readout, this.total, this.proof, this.details);
  }

  /** Show another sample or number of calls, drawn to its end. */
  choose(budget, sample) {
    const source = this.source;
    this.calls = source.calls[budget];
    this.trace = source.samples[budget][sample];
    const drafts = this.trace.drafts;
    this.half = drafts.length > 0;
    this.steps = this.half ? 2 * drafts.length : this.trace.num_calls;
    this.point = this.model.points.find((point) => point.drafted === this.half && (this.half || point.calls === this.calls)) ?? this.model.points[0];
    this.milliseconds = (this.point.milliseconds / this.point.calls) * this.trace.num_calls;
    this.symbols.fill(this.trace.pieces);
    const drawn = `${count(this.trace.pieces.length, "symbol")} in ${count(this.trace.num_calls, "network call")}`;
    this.about.textContent = this.kind === "groups" ? `${this.model.family}, ${drawn}`
      : `${this.model.family}, left to right, ${this.half ? `${drawn} by drafts` : "one symbol a network call"}`;
    const each = this.trace.total_bits / this.trace.num_characters;
    this.total.replaceChildren(make("strong", {}, `${fixed(this.trace.total_bits, 3)} bits`), ` for the whole text, exact: ${fixed(each, 3)} bits a character`);
    this.prove();
    this.go(this.steps + 1);
    this.tabulate();
  }

  prove() {
    const { drafts, equal, num_calls: calls, pieces } = this.trace;
    this.proof.hidden = !drafts.length;
    if (!drafts.length) return;
    const drafted = drafts.reduce((sum, draft) => sum + draft.drafted.length, 0), accepted = drafts.reduce((sum, draft) => sum + draft.accepted, 0);
    this.proof.textContent = `${accepted.toLocaleString("en")} of ${drafted.toLocaleString("en")} drafted symbols were accepted. ` + (equal
      ? `The text equals that of the plain loop, which takes ${count(pieces.length, "call")}, in every symbol: both were drawn by the same seed and compared when this page was made.`
      : "Drawn by the plain loop with the same seed, the text differs: two symbols were as good as tied, and the network rounds differently when it reads several at a time.");
  }

  describe(i) {
    const { pieces, calls, bits } = this.trace;
    return [pieces[i], `position ${i + 1}, drawn in call ${calls[i]} of ${this.trace.num_calls}, ${price(bits[i])}`];
  }

  /** Show the sample after a step; one step past the last the marks are gone. */
  go(step) {
    this.step = Math.max(0, Math.min(this.steps + 1, step));
    const { pieces, calls, bits, drafts } = this.trace, done = this.step > this.steps;
    const call = this.half ? Math.ceil(Math.min(this.step, this.steps) / 2) : Math.min(this.step, this.steps);
    const drafting = this.half && !done && this.step % 2 === 1;
    const drawn = drafting ? call - 1 : call, now = done || drafting ? -1 : call;
    let settled = 0;
    pieces.forEach((piece, i) => {
      if (calls[i] > drawn) { this.symbols.set(i, "·".repeat(Math.max(1, [...piece].length)), "open", 0); return; }
      settled++;
      this.symbols.set(i, seen(piece), calls[i] === now && !this.half ? "now" : "", this.shade(i));
    });
    const draft = this.half && !done && call > 0 ? drafts[call - 1] : null;
    draft?.drafted.forEach((piece, k) => {
      const i = draft.begin + k;
      if (i >= pieces.length) return;
      if (drafting) this.symbols.set(i, seen(piece), "draft", 0);
      else if (k < draft.accepted) this.symbols.set(i, seen(pieces[i]), "right", 0);
      else if (k > draft.accepted) this.symbols.set(i, seen(piece), "wrong", 0);
    });
    const own = draft && !drafting ? draft.begin + draft.accepted : -1;
    if (own >= 0 && draft.settled > draft.accepted) this.symbols.set(own, seen(pieces[own]), "now own", 0, draft.drafted[draft.accepted]);
    this.where.replaceChildren(make("b", {}, done ? "finished" : `call ${call}`), done ? ` after ${count(this.trace.num_calls, "call")}` : ` of ${this.trace.num_calls}${this.half && call ? (drafting ? ", drafted" : ", verified") : ""}`);
    this.share.textContent = `${settled.toLocaleString("en")} of ${count(pieces.length, "symbol")}`;
    this.bar.style.width = `${(100 * settled) / pieces.length}%`;
  }

  shade(i) {
    const by = $("shading").value;
    if (by === "none") return 0;
    if (by === "calls") return 0.08 + 0.5 * ((this.trace.calls[i] - 1) / Math.max(1, this.trace.num_calls - 1));
    return shadeOf(this.trace.bits[i]);
  }

  tabulate() {
    if (!this.details.open) { this.rows.replaceChildren(); return; }
    this.rows.replaceChildren(...this.trace.pieces.map((piece, i) => make("tr", {}, make("td", { class: "m" }, seen(piece) === " " ? "␣" : seen(piece)),
      ...[`${i + 1}`, `${this.trace.calls[i]}`, fixed(this.trace.bits[i], 3)].map((value) => make("td", {}, value)))));
  }
}

const shadeOf = (bits) => 0.62 * Math.min(1, bits / FULL);

// -- samples ---------------------------------------------------------------------------------------------
const panels = ["groups", "causal"].filter((kind) => record[kind]).map((kind) => new Panel(kind, record[kind]));
const groups = panels.find((panel) => panel.kind === "groups");
let playing = null;

function choose() {
  stop();
  const budget = +$("calls").value, sample = +$("sample").value;
  for (const panel of panels) panel.choose(panel === groups ? budget : 0, sample);
  const hero = panels[0], symbols = hero.trace.pieces.length, calls = hero.trace.num_calls;
  const unit = hero.trace.num_characters === symbols ? "character" : "symbol";
  $("lead").replaceChildren(`${count(symbols, unit)} in `, make("em", {}, calls.toLocaleString("en")), ` network call${calls === 1 ? "" : "s"}`);
  $("explain").replaceChildren(...explain(hero, unit, symbols, calls));
  if (groups) {
    $("calls-shown").textContent = groups.calls;
    $("calls").setAttribute("aria-valuetext", count(groups.calls, "network call"));
    [...$("stops").children].forEach((stop, i) => stop.classList.toggle("on", i === budget));
  }
  const slow = slowness();
  const times = panels.map((panel) => `${fixed(panel.milliseconds, panel.milliseconds < 10 ? 1 : 0)} ms`).join(" and ");
  $("pace").textContent = `Played ${slow.toLocaleString("en")} times slower than measured (${times}).${panels.length > 1 ? " Both use the same noise, so that they agree until their laws differ." : ""}`;
  buttons();
}

function explain(hero, unit, symbols, calls) {
  const shade = make("strong", {}, "The shade of a symbol is its surprisal in bits");
  if (hero !== groups) return ["A model drew this text from left to right. ", shade, ": how little the model expected it. The bits add up to the exact probability of the text."];
  const each = Math.round(symbols / calls);
  return [`Most language models take one network call for every ${unit}. This one drew ${each > 1 ? `about ${each} at a time, spread over the whole text` : "as many"}, and it still knows the exact probability of what it drew. `,
    shade, ": how little the model expected it, given all that was drawn in the calls before."];
}

/** How many times slower than measured the samples are played: the slower one takes some seven seconds. */
function slowness() {
  const longest = Math.max(...panels.map((panel) => panel.milliseconds)), raw = 7000 / longest, unit = 10 ** Math.floor(Math.log10(raw));
  return [5, 2, 1].map((m) => m * unit).find((s) => s <= raw * 1.0001);
}

function buttons() {
  const begun = panels.some((panel) => panel.step > 0), open = panels.some((panel) => panel.step <= panel.steps);
  $("restart").disabled = $("back").disabled = !begun;
  $("forward").disabled = !open;
  $("play").lastElementChild.textContent = playing ? "Pause" : "Play";
  $("play").querySelector("path").setAttribute("d", playing ? "M3.5 2.5h3v11h-3zM9.5 2.5h3v11h-3z" : "M4 2.5v11L13.5 8z");
}

function stop() { if (playing) cancelAnimationFrame(playing.frame); playing = null; buttons(); }

function all(step) { for (const panel of panels) panel.go(step(panel)); buttons(); }

function play() {
  if (panels.every((panel) => panel.step > panel.steps)) all(() => 0);
  const slow = slowness(), begin = performance.now(), starts = panels.map((panel) => panel.step);
  const tick = (time) => {
    panels.forEach((panel, i) => {
      const step = starts[i] + Math.floor((Math.max(0, time - begin) * panel.steps) / (panel.milliseconds * slow));
      if (step !== panel.step && panel.step <= panel.steps) panel.go(step);
    });
    if (panels.every((panel) => panel.step > panel.steps)) { stop(); $("status").textContent = "The samples are drawn."; return; }
    playing.frame = requestAnimationFrame(tick);
  };
  playing = { frame: requestAnimationFrame(tick) };
  buttons();
}

$("play").addEventListener("click", () => (playing ? stop() : play()));
$("restart").addEventListener("click", () => { stop(); all(() => 0); });
$("back").addEventListener("click", () => { stop(); all((panel) => panel.step - 1); });
$("forward").addEventListener("click", () => { stop(); all((panel) => panel.step + 1); });
$("calls").addEventListener("input", () => {
  choose();
  $("status").textContent = `${count(groups.calls, "network call")}: ${fixed(groups.trace.total_bits / groups.trace.num_characters, 2)} bits a character`;
});
$("sample").addEventListener("change", choose);
$("shading").addEventListener("change", () => { all((panel) => panel.step); legend(); own?.paint(); });

// -- legend ----------------------------------------------------------------------------------------------
function legend() {
  const by = $("shading").value, ramp = make("span", { class: "ramp" });
  for (const bits of [0, 1, 2, 4, FULL]) {
    const cell = make("i", {}, bits === FULL ? `${bits}+` : `${bits}`);
    cell.style.setProperty("--b", shadeOf(bits));
    ramp.append(cell);
  }
  const sign = (classes, text, about, was) => make("span", {}, make("span", was ? { class: `s ${classes}`, "data-was": was } : { class: `s ${classes}` }, text), about);
  $("legend").replaceChildren(...[
    by === "bits" && make("span", {}, "surprisal in bits", ramp), by === "calls" && make("span", {}, "the darker, the later the call"),
    sign("open", "·", "not drawn yet"), sign("now", "a", "drawn in this call"),
    panels.some((panel) => panel.half) && sign("draft", "a", "drafted"), panels.some((panel) => panel.half) && sign("right", "a", "draft accepted"),
    panels.some((panel) => panel.half) && sign("wrong", "a", "draft rejected"),
  ].filter(Boolean));
}

// -- a text of the user's own ----------------------------------------------------------------------------
let own = null;
function scoredText() {
  const source = record.text;
  if (!source) return;
  $("own").hidden = false;
  const readout = make("p", { class: "readout" }), total = make("p", { class: "total" });
  let shade = source.shades[0];
  const symbols = new Symbols(`The text ${source.name}; arrow keys go over its symbols`, (i) => [shade.pieces[i], `position ${i + 1}, ${price(shade.bits[i])}`], readout);
  symbols.hint = "Point at a symbol, or go over the text with the arrow keys, to see what it costs.";
  const paint = () => shade.pieces.forEach((piece, i) => symbols.set(i, seen(piece), "", $("shading").value === "none" ? 0 : shadeOf(shade.bits[i])));
  const fill = () => {
    shade = source.shades[+$("own-model").value];
    symbols.fill(shade.pieces);
    paint();
    const part = shade.pieces.length < shade.num_symbols ? ` Shown are the first ${count(shade.pieces.length, "symbol")}.` : "";
    const how = { document: "as one document", chunks: "in chunks, each on its own", lines: "line by line" }[shade.protocol];
    total.replaceChildren(make("strong", {}, `${fixed(shade.total_bits, 3)} bits`), ` for ${count(shade.num_characters, "character")}, exact, ${how}: ${fixed(shade.total_bits / shade.num_characters, 3)} bits a character. A lossless coder that knows the model needs about ${count(Math.ceil(shade.total_bits / 8), "byte")}.${part}`);
  };
  source.shades.forEach((each, i) => $("own-model").append(make("option", { value: i }, each.model)));
  $("own-choice").hidden = source.shades.length < 2;
  $("own-model").addEventListener("change", fill);
  $("own-about").textContent = `The text of ${source.name}, with the surprisal of each of its symbols given the symbols that the model draws before it.`;
  $("own-panel").append(total, symbols.node, readout);
  fill();
  own = { paint };
}

// -- figures ---------------------------------------------------------------------------------------------
const hasBits = record.models.some((model) => model.points.some((point) => point.bits !== null));
const pointName = (model, point) => `${model.name}${point.drafted ? ", drafted" : ""}`;

function figuresOf(model, drafted) { return model.points.filter((point) => point.drafted === drafted); }

function cost() {
  const about = $("cost-about"), data = record.data;
  const words = [`Each point is a model in one number of network calls; the lines join the same weights. Times are those of one sample, from the call to its symbols: the median of ${count(record.rounds, "round")} after a warm-up.`];
  words.push(data ? ` Bits are exact, measured on the ${data.split} part of ${data.name} by the code of dflow evaluate (${data.protocol}).` : ` ${record.note}`);
  about.textContent = words.join("");
  if (hasBits) {
    const series = record.models.flatMap((model) => [false, true].map((drafted) => ({ model, drafted, points: figuresOf(model, drafted) }))).filter((each) => each.points.length);
    const lines = (point) => [`${fixed(point.bits, 4)}${point.standard_error === null ? "" : ` ± ${fixed(point.standard_error, 4)}`} bits a character`, `${count(point.calls, "network call")}, ${fixed(point.milliseconds, 1)} ms`];
    const plotBy = (figure, title, label, key) => plot(figure, {
      title, unit: "bits a character, exact; lower is better", x: { label, log: key === "calls" ? 2 : 10 },
      series: series.map(({ model, drafted, points }) => ({ name: drafted ? `${model.name}, drafted` : model.name, hero: model.name === panels[0].source.model, dash: drafted,
        points: points.map((point) => ({ x: point[key], y: point.bits, title: pointName(model, point), lines: lines(point) })).sort((a, b) => a.x - b.x) })),
    });
    plotBy($("plot-calls"), "Bits against network calls", "network calls for a sample (logarithmic)", "calls");
    plotBy($("plot-time"), "Bits against time", "milliseconds for a sample (logarithmic)", "milliseconds");
  } else {
    $("plot-calls").hidden = $("plot-time").hidden = true;
  }
  const heads = ["network calls", ...(hasBits ? ["bits a character", "standard error"] : []), "ms", "threads"];
  const cells = (point) => [point.calls.toLocaleString("en"), ...(hasBits ? [fixed(point.bits, 4), point.standard_error === null ? "" : fixed(point.standard_error, 4)] : []), fixed(point.milliseconds, 1), `${point.threads}`];
  const groups = record.models.flatMap((model) => [false, true].map((drafted) => [model, figuresOf(model, drafted)])).filter(([, points]) => points.length);
  const bodies = groups.map(([model, points]) => make("tbody", {}, make("tr", {}, make("th", { scope: "rowgroup", colspan: heads.length }, pointName(model, points[0]))),
    ...points.map((point) => make("tr", {}, ...cells(point).map((value) => make("td", {}, value))))));
  $("cost-table").append(make("caption", { class: "hidden" }, "Bits, network calls and times"), make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), ...bodies);
}

function learning() {
  const models = record.models.filter((model) => model.curve);
  if (!models.length) return;
  $("learning").hidden = false;
  const unit = models[0].curve.unit;
  $("learning-about").textContent = `The cost of validation text during training, ${unit}, as each training noted it.`;
  const draw = () => {
    const steps = $("axis").value === "steps";
    plot($("plot-learning"), {
      title: "Validation text", unit: `${unit}; lower is better`, x: { label: steps ? "steps" : "minutes of training", log: 0 },
      series: models.map((model) => ({ name: model.name, hero: model.name === panels[0].source.model, small: model.curve.rows.length > 12,
        points: model.curve.rows.map((row) => ({ x: steps ? row.step : row.seconds / 60, y: row.valid_bits, title: model.name, lines: [`${fixed(row.valid_bits, 4)} ${model.curve.unit}`, `step ${row.step.toLocaleString("en")}, ${fixed(row.seconds / 60, 1)} minutes`] })) })),
    });
  };
  $("axis").addEventListener("change", draw);
  draw();
}

function notes() {
  const { environment: e } = record, items = [
    `Samples are those of dflow generate with seed ${record.seed}, numbers 1 to ${panels[0].source.samples[0].length}; a seed fixes the randomness of every place of the text, whatever the number of calls.`,
    "Bits are -log2 of probabilities of the model, exact: neither bounds nor estimates. Those of single symbols are rounded; totals are not made of rounded ones.",
    `Times: ${e.device}, torch ${e.torch}, Python ${e.python}, one sample at a time, at the better of one and ${e.threads} threads.`,
    `Models: ${record.models.map((model) => `${model.name} (${model.family}, ${model.parameters.toLocaleString("en")} parameters)`).join("; ")}.`,
    "This file holds everything it shows. It loads nothing and sends nothing.",
  ];
  const shown = panels.map((panel) => panel.source.model), hidden = record.models.filter((model) => !shown.includes(model.name));
  if (hidden.length) items.splice(1, 0, `Samples are shown of ${shown.join(" and ")}; ${hidden.map((model) => model.name).join(", ")} ${hidden.length > 1 ? "have" : "has"} figures alone.`);
  $("notes-list").append(...items.map((item) => make("li", {}, item)));
}

// -- start -----------------------------------------------------------------------------------------------
$("panels").append(...panels.map((panel) => panel.node));
panels[0].source.samples[0].forEach((_, i) => $("sample").append(make("option", { value: i }, `${i + 1}`)));
$("sample").parentElement.hidden = panels[0].source.samples[0].length < 2;
$("dial").hidden = !groups || groups.source.calls.length < 2;
if (groups) {
  const { calls, default: first } = groups.source;
  Object.assign($("calls"), { max: calls.length - 1, value: first });
  calls.forEach((number, i) => { const stop = make("span", {}, `${number}`); stop.style.left = `${calls.length > 1 ? (100 * i) / (calls.length - 1) : 0}%`; $("stops").append(stop); });
}
choose();
legend();
scoredText();
cost();
learning();
notes();
