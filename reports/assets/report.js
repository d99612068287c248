"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const create = (tag, text = "", attributes = {}) => {
  const node = document.createElement(tag);
  node.textContent = text;
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  return node;
};
const say = (text) => { $("#status").textContent = text; setTimeout(() => { $("#status").textContent = ""; }, 2500); };
const copy = (text) => navigator.clipboard.writeText(text).then(() => say("Copied"), () => say("The browser refused to copy"));
const unpack = (id) => {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
const typing = (event) => /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey;

// Theme: the system's, until the reader chooses; remembered where the browser allows it.
const root = document.documentElement, themes = ["system", "light", "dark"];
const remember = (value) => { try { return value ? localStorage.setItem("ctxbench-theme", value) : localStorage.getItem("ctxbench-theme"); } catch { return null; } };
let theme = themes.includes(remember()) ? remember() : "system";
const setTheme = (next) => {
  theme = next;
  if (theme === "system") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
  $("#theme").textContent = `Theme: ${theme}`;
  remember(theme);
  dispatchEvent(new Event("repaint"));
};
const nextTheme = () => setTheme(themes[(themes.indexOf(theme) + 1) % 3]);
$("#theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("repaint")));
$$("[hidden]").forEach((node) => { node.hidden = false; });
$$("[data-copy]").forEach((button) => button.addEventListener("click", () => copy($(`#${button.dataset.copy}`).textContent)));
document.addEventListener("keydown", (event) => {
  if (typing(event)) return;
  if (event.key === "/") { event.preventDefault(); $("#filter").focus(); $("#filter").scrollIntoView({ block: "center" }); }
  if (event.key === "t") nextTheme();
});

setTheme(theme);

// Axes: the same texts as the static figures.
const UNITS = { s: [[1e-9, "ns"], [1e-6, "µs"], [1e-3, "ms"], [1, "s"], [1e3, "ks"]], x: [[1, "×"]],
  B: ["B", "KiB", "MiB", "GiB", "TiB"].map((name, i) => [1024 ** i, name]),
  FLOP: ["", "k", "M", "G", "T", "P", "E"].map((name, i) => [1000 ** i, `${name}FLOP`]) };
const label = (value, unit) => {
  const [factor, name] = UNITS[unit].findLast(([factor]) => Math.abs(value) >= factor * 0.9995) || UNITS[unit][0];
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


async function drawCharts() {
  const figures = JSON.parse(await unpack("#figures-data"));
  const defaults = JSON.parse($("#views").textContent);
  const state = { view: "0", impl: "fastest", value: "absolute", scale: "log" };
  const chips = $$(".chip"), tools = $("#overview-tools");
  let shown = new Set();
  const choose = () => {
    const fits = (chip) => state.impl === "all" || (state.impl === "fastest" ? defaults[state.view].includes(chip.dataset.series) : `=${chip.dataset.impl}` === state.impl);
    shown = new Set(chips.filter(fits).map((chip) => chip.dataset.series));
  };

  // One overview chart in the present state: which series, which unit, which scale.
  const overview = (spec) => {
    const { unit, lengths } = spec.layout.meta, relative = state.value.startsWith("/"), log = state.scale === "log";
    const base = relative ? spec.data.find((t) => t.meta.series === state.value.slice(1) && t.meta.role === "measured") : null;
    const factor = (x) => (!relative ? (state.value === "token" ? 1 / x : 1) : 1 / (base?.y[base.x.indexOf(x)] ?? NaN));
    const scaled = (values, xs) => values.map((value, i) => (value === null || Number.isNaN(factor(xs[i])) ? null : value * factor(xs[i])));
    const used = relative ? "x" : unit, seen = [];
    let lane = 0, lost = 0;
    const data = spec.data.map((trace) => {
      const copy = { ...trace, visible: shown.has(trace.meta.series) };
      if (trace.meta.role === "missing") return { ...copy, y: trace.y.map(() => (copy.visible ? lane : 0)), lanes: copy.visible ? (lane += 1) : 0 };
      copy.y = scaled(trace.y, trace.x);
      if (copy.visible) { seen.push(...copy.y.filter((y) => y > 0)); lost += trace.y.filter((y, i) => y !== null && copy.y[i] === null).length; }
      if (trace.error_y && copy.visible) seen.push(...copy.y.flatMap((y, i) => (y === null ? [] : [y + factor(trace.x[i]) * trace.error_y.array[i], y - factor(trace.x[i]) * trace.error_y.arrayminus[i]])).filter((y) => y > 0));
      if (trace.error_y) copy.error_y = { ...trace.error_y, array: scaled(trace.error_y.array, trace.x), arrayminus: scaled(trace.error_y.arrayminus, trace.x) };
      copy.hovertemplate = state.value === "absolute" ? trace.hovertemplate : `%{text}<br>${relative ? "%{y:.3g} times the baseline" : "%{y:.3s} per token"}<extra></extra>`;
      return copy;
    });
    const [low, high] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [1, 10], room = (high / low) ** 0.06 * 1.15;
    const span = log ? [low / room, high * room] : [0, high * 1.06], top = lane ? 1 - Math.min(0.4, 0.032 * lane + 0.02) : 1;
    const values = ticks(...span, used, log), xs = spec.layout.xaxis.tickvals;
    const far = xs.filter((x) => log || x >= Math.max(...lengths) / 9);
    const end = Math.max(...lengths);
    const layout = { ...spec.layout,
      xaxis: { ...spec.layout.xaxis, type: state.scale, range: log ? spec.layout.xaxis.range : [-0.03 * end, 1.05 * end], tickvals: far, ticktext: far.map((x) => spec.layout.xaxis.ticktext[xs.indexOf(x)]) },
      yaxis: { ...spec.layout.yaxis, type: state.scale, range: log ? span.map(Math.log10) : span, domain: [0, top], tickvals: values, ticktext: values.map((value) => label(value, used)) },
      yaxis2: { ...spec.layout.yaxis2, domain: [Math.min(top + 0.02, 0.99), 1], range: [lane - 0.5, -0.5] } };
    return { data, layout, lost };
  };

  const paint = ({ data, layout }) => {
    const style = getComputedStyle(root), color = (name) => style.getPropertyValue(name).trim();
    const ink = (trace) => (trace.meta?.role === "ink" ? { ...trace, line: { ...trace.line, color: color("--muted") }, marker: { ...trace.marker, color: color("--muted") } } : trace);
    const axes = Object.fromEntries(Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name)).map(([name, axis]) => [name, { ...axis, gridcolor: color("--grid") }]));
    const hoverlabel = { ...layout.hoverlabel, bgcolor: color("--panel"), bordercolor: color("--line"), font: { ...layout.hoverlabel.font, color: color("--ink") } };
    return [data.map(ink), { ...layout, ...axes, hoverlabel, font: { ...layout.font, color: color("--muted") } }];
  };
  const config = { displayModeBar: false, responsive: true, showTips: false, displaylogo: false };
  const draw = (plot) => {
    const spec = figures[plot.dataset.figure];
    Plotly.react(plot, ...paint(spec.layout.meta ? overview(spec) : spec), config);
    plot.dataset.drawn = "";
  };
  const repaint = () => { if (window.Plotly) $$(".plot[data-drawn]").forEach(draw); };
  addEventListener("repaint", repaint);
  const update = () => {
    chips.forEach((chip) => chip.setAttribute("aria-pressed", shown.has(chip.dataset.series)));
    let lost = 0;
    $$("#overview .plot").forEach((plot) => {
      const [, metric] = plot.dataset.figure.split("-");
      plot.dataset.figure = `overview-${metric}-${state.view}`;
      const spec = figures[plot.dataset.figure];
      if (spec.layout.meta) lost += overview(spec).lost;
      if ("drawn" in plot.dataset) draw(plot);
      const note = $(".note", plot.closest("figure"));
      note.textContent = state.value.startsWith("/") ? `relative to ${state.value.slice(1)}` : note.dataset.note + (state.value === "token" ? ", per token" : "");
    });
    $("#overview-note").textContent = lost ? `${lost} points are not drawn: ${state.value.slice(1)} was not measured at their length.` : "";
    const changed = Object.entries(state).filter(([name, value]) => value !== ({ view: "0", impl: "fastest", value: "absolute", scale: "log" })[name]);
    history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname + (location.hash.includes("=") ? "" : location.hash));
  };

  // Controls
  new URLSearchParams(location.hash.slice(1)).forEach((value, name) => {
    const select = tools.elements[name];
    if (select && [...select.options].some((option) => option.value === value)) state[name] = select.value = value;
  });
  choose();
  tools.addEventListener("change", ({ target }) => { state[target.name] = target.value; if (/view|impl/.test(target.name)) choose(); update(); });
  const alone = (name) => { if (shown.size === 1 && shown.has(name)) choose(); else shown = new Set([name]); update(); };
  chips.forEach((chip) => {
    const name = chip.dataset.series;
    chip.addEventListener("click", (event) => { if (event.shiftKey) return alone(name); if (!shown.delete(name)) shown.add(name); update(); });
    chip.addEventListener("dblclick", () => alone(name));
  });

  // The chart library, and each chart when it comes near; where it fails, the static figure.
  update();
  try {
    document.head.append(create("script", await unpack("#plotly-data")));
    const near = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => { near.unobserve(target); draw(target); }), { rootMargin: "400px" });
    $$(".plot").forEach((plot) => near.observe(plot));
    addEventListener("beforeprint", () => { root.dataset.theme = "light"; $$(".plot").forEach(draw); });
    addEventListener("afterprint", () => setTheme(theme));
    $$("[data-save]").forEach((button) => button.addEventListener("click", () => { const plot = $(".plot", button.closest("figure")); Plotly.downloadImage(plot, { format: "svg", filename: plot.dataset.figure }); }));
  } catch (problem) {
    $$("figure noscript").forEach((fallback) => { fallback.previousElementSibling.innerHTML = fallback.textContent; });
  }
}
drawCharts();
