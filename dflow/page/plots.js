"use strict";
// Plots as inline SVG: a sign and a name for each series, one tab stop each, arrow keys from point to point.
const SHAPES = [
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
  "M-4 -4H4V4H-4Z",
  "M0 -5.5L5.2 4H-5.2Z",
  "M0 -5.8L5.8 0L0 5.8L-5.8 0Z",
  "M0 5.5L5.2 -4H-5.2Z",
  "M-5 -1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
];

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Round numbers from low to high, about as many as are wanted. */
function ticks(low, high, number) {
  const raw = (high - low || 1) / number, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + 1e-12; i++) out.push(+(i * step).toPrecision(12));
  return out;
}

/** Ticks of a logarithmic axis: the powers of base, or 1, 2, 5 of powers of ten. */
function logTicks(low, high, base) {
  const out = [];
  if (base === 2) {
    for (let p = Math.floor(Math.log2(low)); 2 ** p <= high * 1.001; p++) if (2 ** p >= low * 0.999) out.push(2 ** p);
  } else {
    for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p++)
      for (const m of [1, 2, 5]) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) out.push(+(m * 10 ** p).toPrecision(6));
  }
  return out;
}

/**
 * A plot in a figure. options: title, unit, x ({label, log: 0, 2 or 10}), y ({label}), series: a list of
 * {name, hero, dash, points: [{x, y, title, lines}]}.
 */
function plot(figure, options) {
  const draw = () => {
    const width = Math.max(260, figure.clientWidth), height = Math.round(Math.min(340, Math.max(230, width * 0.62)));
    const size = { left: 44, right: 14, top: 14, bottom: 42 };
    const all = options.series.flatMap((s) => s.points);
    let [x0, x1] = [Math.min(...all.map((p) => p.x)), Math.max(...all.map((p) => p.x))];
    let [y0, y1] = [Math.min(...all.map((p) => p.y)), Math.max(...all.map((p) => p.y))];
    const pad = (y1 - y0 || 1) * 0.08; y0 -= pad; y1 += pad;
    const log = options.x.log;
    if (log) { x0 /= 1.15; x1 *= 1.15; } else { x0 = Math.min(0, x0); x1 = x1 || 1; }
    const scale = log ? Math.log : (v) => v;
    const px = (v) => size.left + ((scale(v) - scale(x0)) / (scale(x1) - scale(x0))) * (width - size.left - size.right);
    const py = (v) => height - size.bottom - ((v - y0) / (y1 - y0)) * (height - size.top - size.bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${options.title}. Arrow keys go from point to point.` });
    for (const v of ticks(y0, y1, 5)) {
      root.append(svg("line", { class: "grid", x1: size.left, x2: width - size.right, y1: py(v), y2: py(v) }));
      root.append(svg("text", { class: "tick", x: size.left - 8, y: py(v) + 4, "text-anchor": "end" }, `${v}`));
    }
    let last = -Infinity;
    for (const v of log ? logTicks(x0, x1, log) : ticks(x0, x1, width < 420 ? 4 : 7)) {
      if (px(v) - last < 26) continue;
      last = px(v);
      root.append(svg("line", { class: "grid", x1: last, x2: last, y1: height - size.bottom, y2: height - size.bottom + 4 }));
      root.append(svg("text", { class: "tick", x: last, y: height - size.bottom + 18, "text-anchor": "middle" }, v.toLocaleString("en")));
    }
    root.append(svg("text", { class: "tick", x: (size.left + width - size.right) / 2, y: height - 6, "text-anchor": "middle" }, options.x.label));
    const tip = document.createElement("div");
    tip.className = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
    const nodes = [];
    const show = (node, point, on) => {
      node.classList.toggle("on", on); tip.hidden = !on;
      if (!on) return;
      tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: point.title }), ...point.lines.flatMap((l, i) => (i ? [document.createElement("br"), l] : [l])));
      const left = px(point.x), top = root.getBoundingClientRect().top - figure.getBoundingClientRect().top + py(point.y);
      tip.style.left = `${Math.max(0, Math.min(left - tip.offsetWidth / 2, width - tip.offsetWidth))}px`;
      tip.style.top = `${top - tip.offsetHeight - 14}px`;
    };
    options.series.forEach((series, i) => {
      const group = svg("g", { class: series.hero ? "hero" : "other" });
      const path = series.points.map((p, k) => `${k ? "L" : "M"}${px(p.x).toFixed(1)} ${py(p.y).toFixed(1)}`).join("");
      group.append(svg("path", { class: series.dash ? "line dash" : "line", d: path }));
      for (const point of series.points) {
        const node = svg("g", { class: "point", transform: `translate(${px(point.x).toFixed(1)} ${py(point.y).toFixed(1)})`, tabindex: nodes.length ? -1 : 0, role: "img", "aria-label": [point.title, ...point.lines].join(", ") },
          svg("circle", { class: "halo", r: 10 }), svg("path", { d: SHAPES[i % SHAPES.length], ...(series.small ? { transform: "scale(0.6)" } : {}) }));
        node.addEventListener("pointerenter", () => show(node, point, true));
        node.addEventListener("pointerleave", () => show(node, point, false));
        node.addEventListener("focus", () => show(node, point, true));
        node.addEventListener("blur", () => show(node, point, false));
        nodes.push(node); group.append(node);
      }
      root.append(group);
    });
    root.addEventListener("keydown", (event) => {
      const at = nodes.indexOf(event.target), move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? nodes.length - 1 : move === undefined || at < 0 ? -1 : (at + move + nodes.length) % nodes.length;
      if (to < 0) { if (event.key === "Escape") tip.hidden = true; return; }
      event.preventDefault();
      nodes[at].setAttribute("tabindex", -1); nodes[to].setAttribute("tabindex", 0); nodes[to].focus();
    });
    const caption = document.createElement("figcaption");
    const unit = Object.assign(document.createElement("span"), { textContent: ` ${options.unit}` });
    caption.append(options.title, unit);
    const names = document.createElement("div");
    names.className = "names"; names.setAttribute("aria-hidden", "true");
    options.series.forEach((series, i) => {
      const sign = svg("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, class: series.hero ? "hero" : "other" }, svg("path", { class: "sign", d: SHAPES[i % SHAPES.length] }));
      names.append(Object.assign(document.createElement("span"), { className: series.hero ? "hero" : "other" }));
      names.lastChild.append(sign, series.name);
    });
    figure.replaceChildren(caption, names, root, tip);
    drawn = width;
  };
  let drawn = 0;
  figure.redraw?.disconnect();
  figure.redraw = new ResizeObserver(() => { if (Math.abs(figure.clientWidth - drawn) > 1) draw(); });
  draw();
  figure.redraw.observe(figure);
}
