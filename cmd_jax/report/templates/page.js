"use strict";
// Data and helpers for all scripts of the page, the switch of light and dark, and the charts, whose text the style sheet colours.
const report = JSON.parse(document.getElementById("data").textContent);
const plotOptions = { displayModeBar: false, responsive: true, showTips: false };

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A name that may go on in the next line after an underscore, a slash or a dot.
function breakable(name) {
  const made = document.createDocumentFragment();
  for (const part of name.split(/(?<=[_/.])/)) made.append(part, document.createElement("wbr"));
  return made;
}

document.getElementById("theme").addEventListener("click", (event) => {
  const order = ["system", "light", "dark"];
  const next = order[(order.indexOf(document.documentElement.dataset.theme || "system") + 1) % order.length];
  document.documentElement.dataset.theme = next;
  event.target.textContent = `Theme: ${next}`;
});

for (const { id, figure } of report.charts) Plotly.newPlot(id, figure.data, figure.layout, plotOptions);
