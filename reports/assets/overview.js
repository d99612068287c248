"use strict";
// The legends, which all charts follow, and the charts over the length: scale, unit, baseline.
$$("[data-methods]").forEach((list) => {
  const wanted = JSON.parse(list.dataset.methods);
  const items = $$("#overview .legend li").filter((item) => wanted.includes($(".name", item).textContent)).map((item) => item.cloneNode(true));
  items.forEach((item) => $$("[data-untimed]", item).forEach((chip) => chip.remove()));
  list.append(...items.filter((item) => $(".chip", item)));
});
$("#untimed")?.addEventListener("click", ({ target }) => {
  const all = $("#overview .legend").toggleAttribute("data-all");
  target.setAttribute("aria-pressed", all);
});
const phone = matchMedia("(max-width: 40rem)"), foldLegends = () => $$("details.legends").forEach((legend) => { legend.open = !phone.matches; });
phone.addEventListener("change", foldLegends);
foldLegends();
const preset = JSON.parse($("#views").textContent), chips = $$(".chip");
const methodOf = new Map(chips.map((chip) => [chip.dataset.series, $(".name", chip.closest("li")).textContent]));
if (!("view" in state)) declare("view", "0"); // a single view has no control
let shown = new Set();
const shownMethods = () => new Set([...shown].map((series) => methodOf.get(series)));
const chosen = () => {
  const fits = ({ dataset }) => state.impl === "all" || (state.impl === "fastest" ? preset[state.view].includes(dataset.series) : `=${dataset.impl}` === state.impl);
  return new Set(chips.filter(fits).map((chip) => chip.dataset.series));
};
// In the address: the few that are shown, or what differs from the choice of implementations.
["only", "on", "off"].forEach((name) => declare(name, []));
const noteShown = () => {
  const usual = chosen(), on = [...shown].filter((name) => !usual.has(name)), off = [...usual].filter((name) => !shown.has(name));
  const few = shown.size < 4 && on.length + off.length > shown.size;
  Object.assign(state, few ? { only: [...shown], on: [], off: [] } : { only: [], on, off });
  if (few && !shown.size) state.only = [""];
};
const recall = () => {
  const query = given();
  shown = query.has("only") ? new Set(query.getAll("only").filter((name) => methodOf.has(name))) : chosen();
  query.getAll("on").filter((name) => methodOf.has(name)).forEach((name) => shown.add(name));
  query.getAll("off").forEach((name) => shown.delete(name));
  noteShown();
};

// The strip above a chart: the symbols of the missing points that are shown, a few side by side at every length.
const stacked = (spec, log) => {
  const { abreast, step, lengths } = spec.layout.meta, end = Math.max(...lengths), counts = new Map(), taken = new Map();
  const shownOnes = spec.data.filter(({ meta }) => meta.role === "missing" && shown.has(meta.series));
  shownOnes.forEach(({ x }) => x.forEach((length) => counts.set(length, (counts.get(length) ?? 0) + 1)));
  const place = (length) => {
    const n = taken.get(length) ?? 0, columns = Math.min(abreast, counts.get(length)), shift = (n % columns) - (columns - 1) / 2;
    taken.set(length, n + 1);
    return [log ? length * 2 ** (step * shift) : length + 0.025 * end * shift, Math.floor(n / columns)];
  };
  return { places: new Map(shownOnes.map((trace) => [trace, trace.x.map(place)])), rows: Math.ceil(Math.max(0, ...counts.values()) / abreast) };
};

// One chart over the length in the present state: which series, which unit, which scale.
// On a phone the strip of missing points makes the chart taller instead of its curves lower.
const overview = (spec, plot) => {
  const { unit, lengths } = spec.layout.meta, relative = state.value.startsWith("/"), log = state.scale === "log";
  const base = relative ? spec.data.find((t) => t.meta.series === state.value.slice(1) && t.meta.role === "measured") : null;
  const factor = (x) => (!relative ? (state.value === "token" ? 1 / x : 1) : 1 / (base?.y[base.x.indexOf(x)] ?? NaN));
  const scaled = (values, xs) => values.map((value, i) => (value === null || Number.isNaN(factor(xs[i])) ? null : value * factor(xs[i])));
  const used = relative ? "x" : unit, seen = [], { places, rows } = stacked(spec, log);
  let lost = 0;
  const data = spec.data.map((trace) => {
    const copy = { ...trace, visible: shown.has(trace.meta.series) };
    if (trace.meta.role === "missing") return { ...copy, x: (places.get(trace) ?? []).map(([x]) => x), y: (places.get(trace) ?? []).map(([, y]) => y) };
    copy.y = scaled(trace.y, trace.x);
    if (copy.visible) { seen.push(...copy.y.filter((y) => y > 0)); lost += trace.y.filter((y, i) => y !== null && copy.y[i] === null).length; }
    if (trace.error_y && copy.visible) seen.push(...copy.y.flatMap((y, i) => (y === null ? [] : [y + factor(trace.x[i]) * trace.error_y.array[i], y - factor(trace.x[i]) * trace.error_y.arrayminus[i]])).filter((y) => y > 0));
    if (trace.error_y) copy.error_y = { ...trace.error_y, array: scaled(trace.error_y.array, trace.x), arrayminus: scaled(trace.error_y.arrayminus, trace.x) };
    copy.hovertemplate = state.value === "absolute" ? trace.hovertemplate : `%{text}<br>${relative ? "%{y:.3g} times the baseline" : "%{customdata} per token"}<extra></extra>`;
    if (state.value === "token") copy.customdata = copy.y.map((y) => (y === null ? "" : label(y, unit)));
    return copy;
  });
  const [low, high] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [1, 10], room = (high / low) ** 0.06 * 1.15;
  const span = log ? [low / room, high * room] : [0, high * 1.06], strip = phone.matches ? (9 * rows + 8) / (9 * rows + 242) : 0.03 * rows + 0.02, top = rows ? 1 - strip : 1;
  if (plot) plot.style.height = phone.matches && rows ? `calc(18rem + ${9 * rows}px)` : "";
  const values = ticks(...span, used, log), xs = spec.layout.xaxis.tickvals, end = Math.max(...lengths);
  const far = xs.filter((x) => log || x >= end / 9);
  const layout = { ...spec.layout,
    xaxis: { ...spec.layout.xaxis, type: state.scale, range: log ? spec.layout.xaxis.range : [-0.03 * end, 1.05 * end], tickvals: far, ticktext: far.map((x) => spec.layout.xaxis.ticktext[xs.indexOf(x)]) },
    yaxis: { ...spec.layout.yaxis, type: state.scale, range: log ? span.map(Math.log10) : span, domain: [0, top], tickvals: values, ticktext: values.map((value) => label(value, used)) },
    yaxis2: { ...spec.layout.yaxis2, domain: [Math.min(top + 0.02, 0.99), 1], range: [rows - 0.5, -0.5] } };
  return { data, layout, lost };
};

const update = () => {
  chips.forEach((chip) => chip.setAttribute("aria-pressed", shown.has(chip.dataset.series)));
  const specs = $$("#overview .plot").map((plot) => figures[keyOf(plot)]).filter((spec) => spec?.layout.meta);
  const lost = state.value.startsWith("/") ? specs.reduce((sum, spec) => sum + overview(spec).lost, 0) : 0;
  $("#overview-note").textContent = lost ? `${lost} points are not drawn: ${state.value.slice(1)} was not measured at their length.` : "";
  $$("#overview .note[data-note]").forEach((note) => {
    note.textContent = state.value.startsWith("/") ? `relative to ${state.value.slice(1)}` : note.dataset.note + (state.value === "token" ? ", per token" : "");
  });
  noteShown();
  commit();
  repaint();
};
const alone = (name) => { shown = shown.size === 1 && shown.has(name) ? chosen() : new Set([name]); update(); };
chips.forEach((chip) => {
  const name = chip.dataset.series;
  chip.addEventListener("click", (event) => { if (event.shiftKey) return alone(name); if (!shown.delete(name)) shown.add(name); update(); });
  chip.addEventListener("dblclick", () => alone(name));
});
