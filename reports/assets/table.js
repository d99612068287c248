"use strict";
// The table of cells: sort, filter, copy, details.
{
  const table = $("#cells"), body = table.tBodies[0], rows = [...body.rows], filter = $("#filter");
  const records = unpack("#rows-data").then((text) => ({ text, rows: text.trim().split("\n").map((line) => JSON.parse(line)) }));
  const key = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  const close = () => $$(".detail", body).forEach((row) => { $("button", row.previousElementSibling).setAttribute("aria-expanded", "false"); row.remove(); });
  $$("th", table).forEach((head, i) => {
    const button = create("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1, number = head.classList.contains("n");
      $$("th", table).forEach((other) => { other.removeAttribute("aria-sort"); $("button", other).textContent = $("button", other).textContent.replace(/ [▲▼]$/, ""); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      button.textContent += up ? " ▲" : " ▼";
      close();
      const order = (a, b) => (a === "" || b === "" ? (a === "") - (b === "") : sign * (number ? a - b : a.localeCompare(b)));
      body.append(...rows.sort((a, b) => order(key(a, i), key(b, i))));
    });
  });
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const narrow = () => {
    close();
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => { row.hidden = !words.every((word) => texts.get(row).includes(word)); });
    $("#matches").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} cells`;
  };
  filter.addEventListener("input", narrow);
  const ESCAPES = {
    markdown: (text) => text.replace(/[\\`*_{}[\]<>|#]/g, "\\$&"),
    latex: (text) => text.replace(/[\\&%$#_{}~^]/g, (c) => ({ "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" })[c] || `\\${c}`).replace(/±/g, "$\\pm$").replace(/µ/g, "$\\mu$"),
    csv: (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text) };
  $$("[data-table]").forEach((button) => button.addEventListener("click", () => {
    const kind = button.dataset.table, heads = $$("th", table).map((head) => head.textContent.replace(/ [▲▼]$/, ""));
    const lines = [heads, ...rows.filter((row) => !row.hidden).sort((a, b) => a.rowIndex - b.rowIndex).map((row) => [...row.cells].map((cell) => cell.lastElementChild?.tagName === "BDI" ? cell.lastElementChild.textContent : cell.textContent.trim()))].map((line) => line.map(ESCAPES[kind]));
    const rule = `| ${heads.map((_, i) => (table.rows[0].cells[i].classList.contains("n") ? "---:" : "---")).join(" | ")} |`;
    copy({ csv: () => lines.map((line) => line.join(",")).join("\n"),
      markdown: () => lines.map((line) => `| ${line.join(" | ")} |`).toSpliced(1, 0, rule).join("\n"),
      latex: () => `\\begin{tabular}{${heads.map((_, i) => (table.rows[0].cells[i].classList.contains("n") ? "r" : "l")).join("")}}\n${lines.map((line) => `${line.join(" & ")} \\\\`).toSpliced(1, 0, "\\hline").join("\n")}\n\\end{tabular}` }[kind]());
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
  narrow();
  $("#download").addEventListener("click", async () => {
    const link = create("a", "", { download: "rows.jsonl", href: URL.createObjectURL(new Blob([(await records).text])) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
