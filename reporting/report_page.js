"use strict";
// Draws the charts of a report as SVG from the numbers in the element #data. Nothing is requested.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 58, right: 14, top: 8, bottom: 36 };
const state = { x: "step", log: false, all: false, from: null, to: null };
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
  if (key === "x" && ["step", "tokens", "elapsed"].includes(value)) state.x = value;
  if (key === "log" || key === "all") state[key] = value === "1";
  if ((key === "from" || key === "to") && Number.isFinite(Number(value))) state[key] = Number(value);
}

const hidden = new Set(); // numbers of runs

// Each chart has lines: where their numbers are, and how they look.
const CHARTS = [
  { title: "loss, nats per token", lines: [
      { of: "train", y: "train_loss", name: "train", width: 1, opacity: 0.3 },
      { of: "train", y: "smoothed", name: "train, smoothed", width: 1.6, opacity: 1 },
      { of: "evals", y: "val_loss", name: "validation", width: 1.6, opacity: 1, dots: true, error: "val_loss_se", dash: "5 3" }] },
  { title: "learning rate", zero: true, lines: [{ of: "train", y: "lr", name: "lr", width: 1.6, opacity: 1 }] },
  { title: "gradient norm, before clipping", lines: [{ of: "train", y: "grad_norm", name: "norm", width: 1, opacity: 0.8 }] },
  { title: "tokens per second", zero: true, lines: [{ of: "train", y: "tokens_per_sec", name: "tokens/s", width: 1, opacity: 0.8 }] },
];

const color = (i) => `var(--c${i % 8})`;
const shown = (v) => v === null ? "none" : Number.isInteger(v) ? v.toLocaleString("en-US") : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(Number(v.toPrecision(6)));
const short = (v) => {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return `${Number((v / size).toPrecision(4))}${unit}`;
  return Number(v.toPrecision(4)).toString();
};

function element(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// The marks of an axis between low and high: 1, 2 or 5 times a power of ten apart.
function marks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10].map((k) => k * power).find((d) => d >= rough);
  const found = [];
  for (let k = Math.ceil(low / apart); k * apart <= high * (1 + 1e-12); k++) found.push(k * apart);
  return found;
}
function logMarks(low, high) {
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
    for (const k of [1, 2, 5]) if (k * 10 ** p >= low && k * 10 ** p <= high) found.push(k * 10 ** p);
  return found.length > 1 ? found : marks(low, high, 5);
}

// The points of all lines of a chart, as the buttons say: x from..to, on a log scale only above 0.
function pointsOf(chart) {
  const lines = [];
  data.runs.forEach((run, i) => {
    if (hidden.has(i)) return;
    for (const line of chart.lines) {
      const xs = run[line.of][state.x] || [], ys = run[line.of][line.y] || [], errors = run[line.of][line.error] || [];
      const points = [];
      for (let k = 0; k < ys.length; k++) {
        const x = xs[k], y = ys[k];
        if (x === null || x === undefined || y === null || (state.log && y <= 0)) { points.push(null); continue; }
        points.push([x, y, errors[k] || 0, k]);
      }
      lines.push({ line, run: i, points });
    }
  });
  return lines;
}

// The range of y. Unless all is asked for, losses of the first tenth that would hide the others are left out.
function rangeOf(lines, x0, x1, chart) {
  const inside = [], later = [];
  for (const { points } of lines)
    for (const p of points) if (p && p[0] >= x0 && p[0] <= x1) {
      inside.push(p[1]);
      if (p[0] >= x0 + (x1 - x0) / 10) later.push(p[1]);
    }
  let low = Infinity, high = -Infinity;
  for (const y of inside) { if (y < low) low = y; if (y > high) high = y; }
  if (!state.all && !state.log && !chart.zero && later.length > 2) {
    let least = Infinity, most = -Infinity;
    for (const y of later) { if (y < least) least = y; if (y > most) most = y; }
    if (high - low > 2 * (most - least)) high = most;
  }
  if (low === Infinity) return null;
  if (chart.zero && !state.log) low = Math.min(0, low);
  if (state.log) return [low / 1.03, high * 1.03];
  const room = (high - low) / 20 || Math.abs(high) / 20 || 1;
  return [chart.zero ? low : low - room, high + room];
}

function draw(figure, chart) {
  const svg = figure.querySelector("svg"), width = Math.max(figure.clientWidth - 12, 200);
  const height = Math.round(Math.min(figure === figure.parentNode.firstElementChild ? 440 : 260, Math.max(200, width * 0.6)));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  const lines = pointsOf(chart);
  let x0 = Infinity, x1 = -Infinity;
  for (const { points } of lines) for (const p of points) if (p) { x0 = Math.min(x0, p[0]); x1 = Math.max(x1, p[0]); }
  figure.view = null;
  if (x0 === Infinity) { element(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show yet"); return; }
  if (state.from !== null && state.to !== null) { x0 = state.from; x1 = state.to; }
  if (x1 <= x0) { x0 -= 0.5; x1 = x0 + 1; }
  const range = rangeOf(lines, x0, x1, chart);
  if (!range) { element(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing here: reset the zoom"); return; }
  const [y0, y1] = range, f = state.log ? Math.log : (v) => v;
  const X = (x) => MARGIN.left + (x - x0) / (x1 - x0) * (width - MARGIN.left - MARGIN.right);
  const Y = (y) => height - MARGIN.bottom - (f(y) - f(y0)) / (f(y1) - f(y0)) * (height - MARGIN.top - MARGIN.bottom);
  for (const y of state.log ? logMarks(y0, y1) : marks(y0, y1, 6)) {
    element(svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: Y(y), y2: Y(y) });
    element(svg, "text", { x: MARGIN.left - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y));
  }
  for (const x of marks(x0, x1, Math.max(2, Math.floor(width / 110)))) {
    element(svg, "line", { class: "grid", x1: X(x), x2: X(x), y1: MARGIN.top, y2: height - MARGIN.bottom });
    element(svg, "text", { x: X(x), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, short(x));
  }
  element(svg, "text", { x: width - MARGIN.right, y: height - 4, "text-anchor": "end" }, { step: "steps", tokens: "tokens", elapsed: "seconds" }[state.x]);
  const clip = `clip${CHARTS.indexOf(chart)}`;
  element(element(svg, "clipPath", { id: clip }), "rect", { x: MARGIN.left, y: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom });
  const inside = element(svg, "g", { "clip-path": `url(#${clip})` });
  for (const { line, run, points } of lines) drawLine(inside, line, color(run), points, X, Y);
  const cross = element(svg, "line", { class: "grid", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
  const chosen = element(svg, "rect", { y: MARGIN.top, height: height - MARGIN.top - MARGIN.bottom, fill: "var(--c0)", opacity: 0.15, visibility: "hidden" });
  figure.view = { width, x0, x1, X, lines, cross, chosen };
}

function drawLine(parent, line, ink, points, X, Y) {
  let path = "", pen = false;
  for (const p of points) {
    if (!p) { pen = false; continue; }
    path += `${pen ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`;
    pen = true;
  }
  const look = { d: path, fill: "none", stroke: ink, "stroke-width": line.width, opacity: line.opacity, "stroke-linejoin": "round" };
  if (line.dash && data.runs.length === 1) look.stroke = "var(--c1)";
  else if (line.dash) look["stroke-dasharray"] = line.dash;
  element(parent, "path", look);
  if (!line.dots || points.length > 300) return;
  for (const p of points) if (p) {
    if (p[2] > 0 && p[1] - p[2] > 0)
      element(parent, "line", { x1: X(p[0]), x2: X(p[0]), y1: Y(p[1] - p[2]), y2: Y(p[1] + p[2]), stroke: look.stroke, "stroke-width": 1.5 });
    element(parent, "circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.5, fill: look.stroke });
  }
}

// The point of a line whose x is nearest.
function nearest(points, x) {
  let best = null;
  for (const p of points) if (p && (!best || Math.abs(p[0] - x) < Math.abs(best[0] - x))) best = p;
  return best;
}

function showTip(figure, event) {
  const view = figure.view, tip = figure.querySelector(".tip");
  if (!view) return;
  const box = figure.querySelector("svg").getBoundingClientRect(), px = event.clientX - box.left;
  const x = view.x0 + (px - MARGIN.left) / (view.width - MARGIN.left - MARGIN.right) * (view.x1 - view.x0);
  tip.replaceChildren();
  let at = null;
  for (const { line, run, points } of view.lines) {
    const p = nearest(points, x);
    if (!p) continue;
    at = at === null || Math.abs(p[0] - x) < Math.abs(at - x) ? p[0] : at;
    const row = document.createElement("div"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = line.dots && data.runs.length === 1 ? "var(--c1)" : color(run);
    const name = data.runs.length > 1 ? `${data.runs[run].name}, ${line.name}` : line.name;
    row.append(swatch, `${name} ${shown(p[1])}${p[2] ? ` \u00b1 ${shown(p[2])}` : ""} at ${shown(p[0])}`);
    tip.append(row);
  }
  if (at === null) return;
  view.cross.setAttribute("x1", view.X(at));
  view.cross.setAttribute("x2", view.X(at));
  view.cross.setAttribute("visibility", "visible");
  tip.style.display = "block";
  const left = px + 16 + tip.offsetWidth > box.width ? Math.max(0, px - tip.offsetWidth - 4) : px + 16;
  tip.style.left = `${left}px`;
  tip.style.top = `${event.clientY - box.top + 24}px`;
}

function hideTip(figure) {
  figure.querySelector(".tip").style.display = "none";
  if (figure.view) figure.view.cross.setAttribute("visibility", "hidden");
}

// Dragging over a chart chooses the range of x of all charts.
function listen(figure) {
  const svg = figure.querySelector("svg");
  let start = null;
  const xOf = (event) => {
    const v = figure.view, px = event.clientX - svg.getBoundingClientRect().left;
    const part = (px - MARGIN.left) / (v.width - MARGIN.left - MARGIN.right);
    return v.x0 + Math.min(1, Math.max(0, part)) * (v.x1 - v.x0);
  };
  svg.addEventListener("pointerdown", (event) => { if (figure.view && event.button === 0) start = xOf(event); });
  svg.addEventListener("pointermove", (event) => {
    showTip(figure, event);
    if (start === null || !figure.view) return;
    const a = figure.view.X(start), b = figure.view.X(xOf(event));
    figure.view.chosen.setAttribute("x", Math.min(a, b));
    figure.view.chosen.setAttribute("width", Math.abs(a - b));
    figure.view.chosen.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerup", (event) => {
    if (start === null || !figure.view) return;
    const end = xOf(event), few = Math.abs(figure.view.X(start) - figure.view.X(end)) < 6;
    if (!few) { state.from = Math.min(start, end); state.to = Math.max(start, end); }
    start = null;
    drawAll();
  });
  svg.addEventListener("pointerleave", () => { start = null; hideTip(figure); });
  svg.addEventListener("dblclick", resetZoom);
}

function resetZoom() { state.from = state.to = null; drawAll(); }

// What the colors mean, or with several runs the strokes.
function legend(chart) {
  const list = document.createElement("span"), one = data.runs.length === 1;
  list.className = "legend";
  if (!one && chart.lines.length > 1) list.append("(pale: train, line: smoothed, dashed: validation)");
  const names = one ? chart.lines.map((line) => [line.dots ? 1 : 0, line.name, line.opacity]) : data.runs.map((run, i) => [i, run.name, 1]);
  for (const [i, name, opacity] of names) {
    const swatch = document.createElement("span"), entry = document.createElement(one ? "span" : "button");
    swatch.className = "swatch";
    swatch.style.background = color(i);
    swatch.style.opacity = opacity;
    entry.append(swatch, `${name} `);
    if (!one) {
      entry.title = "show or hide this run";
      entry.dataset.run = i;
      entry.addEventListener("click", () => { hidden.delete(i) || hidden.add(i); drawAll(); });
    }
    list.append(entry);
  }
  return list;
}

const figures = CHARTS.map((chart) => {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption"), tip = document.createElement("div");
  figure.className = "chart";
  caption.textContent = chart.title;
  if (chart.lines.length > 1 || data.runs.length > 1) caption.append(legend(chart));
  tip.className = "tip";
  figure.append(caption, document.createElementNS(SVG, "svg"), tip);
  document.getElementById("charts").append(figure);
  listen(figure);
  return figure;
});

function drawAll() {
  const hash = new URLSearchParams();
  for (const key of ["x", "log", "all", "from", "to"]) {
    const v = state[key];
    if (v !== null && v !== false && !(key === "x" && v === "step")) hash.set(key, v === true ? "1" : v);
  }
  if (location.hash.slice(1) !== hash.toString()) history.replaceState(null, "", `#${hash}`);
  document.getElementById("x").value = state.x;
  document.getElementById("log").checked = state.log;
  document.getElementById("all").checked = state.all;
  document.getElementById("reset").disabled = state.from === null;
  for (const entry of document.querySelectorAll("[data-run]"))
    entry.setAttribute("aria-pressed", !hidden.has(Number(entry.dataset.run)));
  CHARTS.forEach((chart, i) => draw(figures[i], chart));
}

document.getElementById("x").addEventListener("change", (e) => { state.x = e.target.value; resetZoom(); });
for (const key of ["log", "all"])
  document.getElementById(key).addEventListener("change", (e) => { state[key] = e.target.checked; drawAll(); });
document.getElementById("reset").addEventListener("click", resetZoom);
let width = 0; // drawn anew only where it changes, and not while the browser lays out the page
new ResizeObserver(([entry]) => {
  if (Math.abs(entry.contentRect.width - width) < 1) return;
  width = entry.contentRect.width;
  requestAnimationFrame(drawAll);
}).observe(document.getElementById("charts"));
window.addEventListener("beforeprint", drawAll);
drawAll();
document.body.dataset.drawn = "yes";
if (data.reload_seconds) setTimeout(() => location.reload(), 1000 * data.reload_seconds);
