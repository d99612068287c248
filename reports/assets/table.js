"use strict";
// The table of cells: sort, filter, copy, details. It is made after the first charts, or when a reader reaches for it.
const asked = given(); // before another control writes the address
let started = false;
const startTable = () => {
  if (started) return;
  started = true;
  unfold($$("#table noscript.later"));
  const table = $("#cells"), body = table.tBodies[0], rows = [...body.rows], filter = $("#filter");
  const records = unpack("#rows-data").then((text) => ({ text, rows: text.trim().split("\n").map((line) => JSON.parse(line)) }));
  const heads = $$("th", table), names = heads.map((head) => head.dataset.name), titles = heads.map((head) => head.textContent);
  const key = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  const close = () => $$(".detail", body).forEach((row) => { $("button", row.previousElementSibling).setAttribute("aria-expanded", "false"); row.remove(); });
  declare("q", ""); declare("sort", ""); declare("columns", heads.filter((head) => !("optional" in head.dataset)).map((head) => head.dataset.name));

  const sort = () => {
    const i = names.indexOf(state.sort.replace(/^-/, "")), up = !state.sort.startsWith("-");
    heads.forEach((head, j) => {
      head.removeAttribute("aria-sort");
      if (j === i) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      $("button", head).textContent = titles[j] + (j === i ? (up ? " ▲" : " ▼") : "");
    });
    if (i < 0) return;
    const number = heads[i].classList.contains("n"), sign = up ? 1 : -1;
    const order = (a, b) => (a === "" || b === "" ? (a === "") - (b === "") : sign * (number ? a - b : a.localeCompare(b)));
    close();
    body.append(...rows.sort((a, b) => order(key(a, i), key(b, i))));
  };
  heads.forEach((head, i) => {
    const button = create("button", titles[i], { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => { state.sort = state.sort === names[i] ? `-${names[i]}` : names[i]; sort(); commit(); });
  });

  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const narrow = () => {
    close();
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => { row.hidden = !words.every((word) => texts.get(row).includes(word)); });
    $("#matches").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} cells`;
  };
  filter.addEventListener("input", () => { state.q = filter.value; narrow(); commit(); });

  // Which columns are shown: a style sheet hides the others, in the details' rows too nothing moves.
  const apply = () => { $("#columns").textContent = names.map((name, i) => (state.columns.includes(name) ? "" : `#cells tr:not(.detail) > :nth-child(${i + 1}) { display: none; }`)).join(" "); };
  const picker = $("#picker");
  names.forEach((name, i) => {
    const box = create("input", "", { type: "checkbox", value: name }), line = create("label");
    line.append(box, titles[i]);
    picker.append(line);
    if (!i) box.disabled = true;
    box.addEventListener("change", () => { state.columns = names.filter((other) => $(`input[value="${other}"]`, picker).checked); apply(); commit(); });
  });
  state.q = filter.value ||= asked.get("q") ?? "";
  if (names.includes((asked.get("sort") ?? "").replace(/^-/, ""))) state.sort = asked.get("sort");
  if (asked.has("columns")) state.columns = names.filter((name, i) => !i || asked.getAll("columns").includes(name));
  $$("input", picker).forEach((box) => { box.checked = state.columns.includes(box.value); });
  document.addEventListener("click", ({ target }) => { if (!target.closest(".menu")) $(".menu").open = false; });
  document.addEventListener("keydown", ({ key: pressed }) => { if (pressed === "Escape") $(".menu").open = false; });
  sort(); apply(); narrow();

  const ESCAPES = {
    markdown: (text) => text.replace(/[\\`*_{}[\]<>|#]/g, "\\$&"),
    latex: (text) => text.replace(/[\\&%$#_{}~^]/g, (c) => ({ "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" })[c] || `\\${c}`).replace(/±/g, "$\\pm$").replace(/µ/g, "$\\mu$"),
    csv: (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text) };
  $$("[data-table]").forEach((button) => button.addEventListener("click", () => {
    const kind = button.dataset.table, seen = names.map((name) => state.columns.includes(name)), wanted = (list) => list.filter((_, i) => seen[i]);
    const lines = [wanted(titles), ...rows.filter((row) => !row.hidden).sort((a, b) => a.rowIndex - b.rowIndex).map((row) => wanted([...row.cells]).map((cell) => cell.lastChild?.textContent.trim() ?? ""))].map((line) => line.map(ESCAPES[kind]));
    const sides = wanted(heads).map((head) => head.classList.contains("n"));
    const rule = `| ${sides.map((right) => (right ? "---:" : "---")).join(" | ")} |`;
    copy({ csv: () => lines.map((line) => line.join(",")).join("\n"),
      markdown: () => lines.map((line) => `| ${line.join(" | ")} |`).toSpliced(1, 0, rule).join("\n"),
      latex: () => `\\begin{tabular}{${sides.map((right) => (right ? "r" : "l")).join("")}}\n${lines.map((line) => `${line.join(" & ")} \\\\`).toSpliced(1, 0, "\\hline").join("\n")}\n\\end{tabular}` }[kind]());
  }));
  const strip = (samples) => {
    const all = samples.flat(), low = Math.min(...all), span = Math.max(...all) - low || 1, ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    Object.entries({ class: "strip", role: "img", viewBox: `0 0 400 ${14 * samples.length + 4}`, "aria-label": "All samples, one line a process" }).forEach((pair) => svg.setAttribute(...pair));
    samples.forEach((process, i) => process.forEach((value) => {
      const dot = document.createElementNS(ns, "circle");
      Object.entries({ cx: 6 + (388 * (value - low)) / span, cy: 9 + 14 * i, r: 3 }).forEach((pair) => dot.setAttribute(...pair));
      svg.append(dot);
    }));
    return [svg, create("span", `${label(low, "s")} to ${label(low + span, "s")}, a line for each process`, { class: "note" })];
  };
  const details = (row) => {
    const list = create("dl"), plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));
    const parts = (value) => Object.entries(value).filter(([, part]) => part !== null && part !== "" && plain(part) !== "{}").map(([name, part]) => `${name} ${plain(part)}`).join(" · ");
    const add = (name, ...nodes) => { const value = create("dd", "", { dir: "auto" }); value.append(...nodes); list.append(create("dt", name), value); };
    if (row.reason) add("reason", row.reason);
    if (row.latency_s) { add("samples", ...strip(row.latency_s.samples)); add("stopped because", row.latency_s.stop.join("; ") || "not recorded"); }
    row.warnings.forEach((warning) => add("warning", warning));
    ["gate", "forecast", "flops", "peak_bytes", "state_bytes", "num_parameters", "params", "env_delta"].forEach((name) => { if (row[name] && parts(row[name])) add(name, create("code", parts(row[name]))); });
    if (row.detail) add("detail", create("pre", row.detail, { tabindex: 0 }));
    add("cell", create("code", row.cell));
    return list;
  };
  rows.forEach((row) => {
    const button = create("button", "▸", { type: "button", "aria-expanded": "false", "aria-label": `Details of ${[...row.cells].slice(0, 3).map((cell) => cell.textContent).join(" ")}` });
    row.cells[0].prepend(button);
    const toggle = async () => {
      if (button.getAttribute("aria-expanded") === "true") { row.nextElementSibling.remove(); return button.setAttribute("aria-expanded", "false"); }
      button.setAttribute("aria-expanded", "true");
      const detail = create("tr", "", { class: "detail" }), cell = create("td", "", { colspan: row.cells.length }), inner = create("div");
      inner.append(details((await records).rows[row.dataset.row]));
      cell.append(inner); detail.append(cell); row.after(detail);
    };
    row.addEventListener("click", () => { if (!getSelection().toString()) toggle(); });
  });
  $("#download").addEventListener("click", async () => save(new Blob([(await records).text]), "rows.jsonl"));
  commit();
  table.dataset.ready = "";
};
