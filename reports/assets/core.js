"use strict";
// Helpers, the theme, the keyboard, and the state of all controls, which lives in the address.
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
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%.()*+-;,=>?@^_`{|}~";
const unpack = (id) => { // base 85: five digits make four bytes
  const text = $(id).textContent, value = new Uint8Array(128), rest = (5 - (text.length % 5)) % 5;
  [...DIGITS].forEach((digit, i) => { value[digit.charCodeAt(0)] = i; });
  const words = new DataView(new ArrayBuffer(((text.length + rest) / 5) * 4));
  for (let i = 0, at = 0; i < text.length; at += 4) {
    let word = 0;
    for (let j = 0; j < 5; j += 1, i += 1) word = word * 85 + (i < text.length ? value[text.charCodeAt(i)] : 84);
    words.setUint32(at, word);
  }
  const bytes = words.buffer.slice(0, words.byteLength - rest);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
// Markup that waits as text in a noscript element: in its place now.
const unfold = (waiting) => waiting.forEach((node) => {
  const made = create("template");
  made.innerHTML = node.textContent;
  node.replaceWith(made.content);
});
document.addEventListener("toggle", ({ target }) => unfold($$("noscript.later", target)), true);
const save = (blob, name) => {
  const link = create("a", "", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

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

// Keyboard: / filters, t changes the theme, the arrows walk from section to section.
const typing = ({ target, ctrlKey, metaKey, altKey }) => /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName) || ctrlKey || metaKey || altKey;
const sections = $$("main > section");
const walk = (step) => {
  const line = innerHeight / 3, here = sections.findLastIndex((section) => section.getBoundingClientRect().top <= line);
  const next = sections[Math.min(sections.length - 1, Math.max(0, here + step))], heading = $("h2", next);
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
  next.scrollIntoView();
  place = next.id;
  commit();
};
document.addEventListener("keydown", (event) => {
  if (typing(event)) return;
  if (event.key === "/") { event.preventDefault(); $("#filter").focus(); $("#filter").scrollIntoView({ block: "center" }); }
  if (event.key === "t") nextTheme();
  if (/^Arrow(Left|Right)$/.test(event.key) && !event.target.closest(".scroll, .command, summary")) { event.preventDefault(); walk(event.key === "ArrowRight" ? 1 : -1); }
});

// State: the address is #section?name=value&..., and names only what differs from the page as it was written.
const state = {}, defaults = {};
let place = "";
const declare = (name, value) => { defaults[name] = value; state[name] = value; };
const given = () => {
  const [first, second] = location.hash.slice(1).split("?");
  return new URLSearchParams(second ?? (first.includes("=") ? first : ""));
};
const commit = () => {
  const changed = new URLSearchParams();
  Object.entries(state).forEach(([name, value]) => {
    if (String(value) !== String(defaults[name])) [value].flat().forEach((part) => changed.append(name, part));
    if (Array.isArray(value) && !value.length && defaults[name].length) changed.append(name, "");
  });
  const query = changed.toString();
  history.replaceState(null, "", place || query ? `#${place}${place && query ? "?" : ""}${query}` : location.pathname);
};
addEventListener("hashchange", () => {
  if (location.hash.includes("=")) return location.reload();
  const section = location.hash.slice(1).split("?")[0];
  if (document.getElementById(section)) { place = section; commit(); }
});
$$(".tools:not(#table-tools) [name]").forEach((control) => {
  const values = control.dataset.values ? JSON.parse(control.dataset.values) : null;
  const read = () => (values ? String(values[control.value]) : control.value);
  const show = () => {
    if (control.type !== "range") return;
    const text = JSON.parse(control.dataset.texts)[control.value];
    control.setAttribute("aria-valuetext", text);
    control.nextElementSibling.value = text;
  };
  declare(control.name, read());
  const wanted = given().get(control.name);
  const at = values ? values.findIndex((value) => String(value) === wanted) : wanted;
  const fits = control.type === "range" ? at !== null && at !== "" && +at >= 0 && +at <= +control.max : [...(control.options || [])].some((option) => option.value === wanted);
  if (wanted !== null && fits) { control.value = at; state[control.name] = read(); }
  show();
  control.addEventListener("input", () => { state[control.name] = read(); show(); commit(); dispatchEvent(new CustomEvent("chosen", { detail: control.name })); });
});
$$(".tools").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
const [landing] = location.hash.slice(1).split("?");
if (landing && !landing.includes("=") && document.getElementById(landing)) place = landing;
setTheme(theme);
