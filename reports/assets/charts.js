"use strict";
// Drawing: axes with the same texts as the static figures, the colours of the theme, each chart when it comes near.
const SCALE = { s: [[1e-9, "ns"], [1e-6, "µs"], [1e-3, "ms"], [1, "s"], [1e3, "ks"]], x: [[1, "×"]],
  B: ["B", "KiB", "MiB", "GiB", "TiB"].map((name, i) => [1024 ** i, name]),
  FLOP: ["", "k", "M", "G", "T", "P", "E"].map((name, i) => [1000 ** i, `${name}FLOP`]) };
const label = (value, unit) => {
  const [factor, name] = SCALE[unit].findLast(([factor]) => Math.abs(value) >= factor * 0.9995) || SCALE[unit][0];
  return value === 0 ? "0" : `${Number((value / factor).toPrecision(3))} ${name}`;
};
const ticks = (low, high, unit, log) => {
  const base = unit === "B" ? 2 : 10, found = [];
  const even = () => {
    const raw = (high - low) / 5, power = base ** Math.floor(Math.log(raw) / Math.log(base));
    const step = (base === 2 ? [1, 2] : [1, 2, 5, 10]).find((m) => m * power >= raw * 0.999) * power;
    return [...Array(Math.floor(high / step) + 1).keys()].map((i) => i * step);
  };
  if (!log) return even();
  const [first, last] = [low, high].map((value) => Math.log(value) / Math.log(base));
  const step = Math.max(1, Math.ceil((last - first) / 7)), steps = base === 10 && last - first < 2 ? [1, 2, 5] : [1];
  for (let i = Math.floor(first / step) * step; i <= last; i += step) steps.forEach((m) => found.push(m * base ** i));
  const inside = (list) => list.filter((tick) => tick >= low && tick <= high);
  return inside(found).length > 2 ? inside(found) : inside(even());
};

let figures = {};
const config = { displayModeBar: false, responsive: true, showTips: false, displaylogo: false };
const keyOf = (plot) => {
  const names = (plot.dataset.follows || "").split(",").filter(Boolean);
  const stem = plot.dataset.figure.replace(new RegExp(`(-\\d+){${names.length}}$`), "");
  return [stem, ...names.map((name) => state[name] ?? "0")].join("-");
};
// Series that the legends show; a chart whose meta says so shows whole methods, and a trace may stay. Notes go with traces.
const linked = (spec) => {
  const byMethod = spec.layout.meta?.link === "method", visible = (series) => (byMethod ? shownMethods() : shown).has(byMethod ? methodOf.get(series) : series);
  const data = spec.data.map((trace) => (trace.meta?.series ? { ...trace, visible: Boolean(trace.meta.stays) || visible(trace.meta.series) } : trace));
  const staying = new Set(data.filter(({ meta }) => meta?.stays).map(({ meta }) => meta.series));
  const annotations = (spec.layout.annotations || []).filter(({ name }) => !methodOf.has(name) || staying.has(name) || visible(name));
  return { data, layout: { ...spec.layout, annotations } };
};
const paint = ({ data, layout }) => {
  const style = getComputedStyle(root), color = (name) => style.getPropertyValue(name).trim();
  const ink = (trace) => (trace.meta?.role === "ink" ? { ...trace, line: { ...trace.line, color: color("--muted") }, marker: { ...trace.marker, color: color("--muted") } } : trace);
  const mark = (trace) => (trace.meta?.role === "mark" ? { ...trace, marker: { ...trace.marker, line: { width: 1.5, color: color("--bg") } } } : trace);
  const axes = Object.fromEntries(Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name)).map(([name, axis]) => [name, { ...axis, gridcolor: color("--grid") }]));
  const hoverlabel = { ...layout.hoverlabel, bgcolor: color("--panel"), bordercolor: color("--line"), font: { ...layout.hoverlabel.font, color: color("--ink") } };
  return [data.map(ink).map(mark), { ...layout, ...axes, hoverlabel, font: { ...layout.font, color: color("--muted") } }];
};
// Ticks of a length that would touch each other: every second one, the longest length always.
const thin = (layout, plot) => {
  const { xaxis } = layout, room = (plot.clientWidth - 70) / (xaxis?.tickvals?.length ?? 1);
  if (!xaxis?.tickvals || !plot.clientWidth || room >= 30) return layout;
  const kept = (_, i, all) => (all.length - 1 - i) % 2 === 0;
  return { ...layout, xaxis: { ...xaxis, tickvals: xaxis.tickvals.filter(kept), ticktext: xaxis.ticktext.filter(kept) } };
};
// A chart with a name a row: on a narrow screen the names stand above their rows instead of beside them.
const rowed = (spec, plot) => {
  const rows = spec.layout.meta?.rows, narrow = plot.clientWidth < 520, { yaxis } = spec.layout;
  if (!rows) return spec;
  plot.style.height = `${5 + (narrow ? 2 : 1.35) * rows}rem`;
  const above = (y, i) => ({ xref: "paper", x: 0, xanchor: "left", y, yanchor: "bottom", yshift: 4, text: yaxis.ticktext[i], showarrow: false, font: { size: 11 } });
  const annotations = narrow ? yaxis.tickvals.map(above) : [];
  return { ...spec, layout: { ...spec.layout, yaxis: { ...yaxis, showticklabels: !narrow }, annotations } };
};
const draw = (plot) => {
  const spec = rowed(figures[keyOf(plot)] || { data: [], layout: {} }, plot);
  const { data, layout } = spec.layout.meta?.unit ? overview(spec, plot) : linked(spec);
  Plotly.react(plot, ...paint({ data, layout: thin(layout, plot) }), config);
  plot.dataset.drawn = "";
};
const repaint = (wanted = () => true) => { if (window.Plotly) $$(".plot[data-drawn]").filter(wanted).forEach(draw); };
addEventListener("repaint", () => repaint());

const fallBack = () => $$("figure noscript").forEach((fallback) => { fallback.previousElementSibling.innerHTML = fallback.textContent; });
async function drawCharts() {
  try {
    [figures] = await Promise.all([unpack("#figures-data").then(JSON.parse), unpack("#plotly-data").then((text) => document.head.append(create("script", text)))]);
    if (!window.Plotly) throw new Error("the chart library did not load");
  } catch { fallBack(); return startTable(); }
  update();
  // One chart a task, so that the first answers while the next is drawn; the table when the first screen is there.
  const waiting = [], next = () => { draw(waiting.shift()); if (waiting.length) setTimeout(next); else startTable(); };
  const near = new IntersectionObserver((entries) => {
    const idle = !waiting.length;
    entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => { near.unobserve(target); waiting.push(target); });
    if (!waiting.length) startTable(); else if (idle) next();
  }, { rootMargin: "400px" });
  $$(".plot").forEach((plot) => near.observe(plot));
  const anew = (plot) => { Plotly.purge(plot); draw(plot); }; // in the size that its place has now
  addEventListener("beforeprint", () => { startTable(); $$("details.folded, details.legends").forEach((node) => { node.dataset.was = node.open; node.open = true; }); Object.assign(root.dataset, { theme: "light", printing: "" }); $$(".plot").forEach(anew); });
  addEventListener("afterprint", () => { delete root.dataset.printing; $$("details.folded, details.legends").forEach((node) => { node.open = node.dataset.was === "true"; }); setTheme(theme); $$(".plot[data-drawn]").filter((plot) => plot.clientWidth).forEach(anew); });
  $$("[data-save]").forEach((button) => button.addEventListener("click", () => {
    const plot = $(".plot", button.closest("figure"));
    Plotly.downloadImage(plot, { format: button.dataset.save, filename: keyOf(plot), scale: button.dataset.save === "png" ? 2 : 1 });
  }));
}
