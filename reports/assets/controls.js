"use strict";
// Sliders and choices: charts that follow one take its figure, and their captions its words.
const wordsOf = (name) => {
  const control = $(`.tools [name="${name}"]`);
  if (!control) return "";
  return control.type === "range" ? control.nextElementSibling.value : control.selectedOptions[0].textContent;
};
const caption = (plot) => {
  const note = $(".note", plot.closest("figure")), names = plot.dataset.follows.split(",");
  if (note.dataset.note.includes(" at ") || note.dataset.note.startsWith("at ")) {
    const slider = names.find((name) => $(`.tools [name="${name}"]`)?.type === "range");
    if (slider) note.textContent = note.dataset.note.replace(/at \S+ tokens/, `at ${wordsOf(slider)} tokens`);
  }
  if (note.dataset.texts) note.textContent = `against ${JSON.parse(note.dataset.texts)[state[names[0]]]}`;
};
addEventListener("chosen", ({ detail: name }) => {
  if (/^(view|impl)$/.test(name)) shown = chosen();
  if (/^(view|impl|value|scale)$/.test(name)) return update();
  const following = (plot) => (plot.dataset.follows || "").split(",").includes(name);
  $$(".plot").filter(following).forEach(caption);
  repaint(following);
});
$$(".plot[data-follows]").forEach((plot) => { if (plot.dataset.follows !== "view") caption(plot); });
recall();
update();
drawCharts().then(() => { if (place) { startTable(); document.getElementById(place).scrollIntoView({ behavior: "instant" }); } });
