"use strict";
// Light, dark, or what the system says. Charts ask for colours by name and are told of changes.
const report = JSON.parse(document.getElementById("data").textContent);
const themeListeners = [];

function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

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

function plotLayout(more) {
  const ink = colour("soft");
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, fixedrange: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    margin: { l: 44, r: 12, t: 8, b: 34 },
    showlegend: false,
    dragmode: false,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, nticks: 6 },
    yaxis: { ...axis, nticks: 5 },
    ...more,
  };
}

const plotOptions = { displayModeBar: false, responsive: true, showTips: false };

(function () {
  const order = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  let chosen = 0;
  button.addEventListener("click", () => {
    chosen = (chosen + 1) % order.length;
    if (chosen) document.documentElement.dataset.theme = order[chosen];
    else delete document.documentElement.dataset.theme;
    button.textContent = `Theme: ${order[chosen]}`;
    themeListeners.forEach((listener) => listener());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => themeListeners.forEach((listener) => listener()));
})();
