// Map of the images: points by class, a thumbnail of the chosen one, a filter by class or words.
(function () {
  const plot = document.getElementById("map-plot");
  if (!plot) return;
  const points = report.map;
  const signs = ["circle", "square", "diamond", "triangle-up", "cross"];
  const thumb = document.getElementById("map-thumb");
  const info = document.getElementById("map-info");
  const select = document.getElementById("map-class");
  const search = document.getElementById("map-search");
  const count = document.getElementById("map-count");
  let shown = points.x.map((_, i) => i);
  let chosen = -1;

  function draw() {
    const inside = new Set(shown);
    const label = points.label.map((value) => Math.max(value, 0));
    const colours = [...Array(8).keys()].map((i) => colour(`c${i}`));
    const size = plot.clientWidth < 500 ? 6 : 8;
    const base = {
      type: "scatter",
      mode: "markers",
      x: points.x,
      y: points.y,
      hoverinfo: "none",
      marker: {
        color: label.map((value) => colours[value % 8]),
        symbol: label.map((value) => signs[Math.floor(value / 8) % 5]),
        size: points.x.map((_, i) => (inside.has(i) ? size : size - 3)),
        opacity: points.x.map((_, i) => (inside.has(i) ? 0.9 : 0.12)),
        line: { width: 0 },
      },
    };
    const ring = {
      type: "scatter",
      mode: "markers",
      x: chosen < 0 ? [] : [points.x[chosen]],
      y: chosen < 0 ? [] : [points.y[chosen]],
      hoverinfo: "skip",
      marker: { color: "rgba(0,0,0,0)", size: 18, line: { color: colour("ink"), width: 2.5 } },
    };
    const hidden = { visible: false, fixedrange: true, range: [-1.06, 1.06] };
    const layout = plotLayout({
      margin: { l: 4, r: 4, t: 4, b: 4 },
      hovermode: "closest",
      hoverdistance: 16,
      xaxis: hidden,
      yaxis: { ...hidden },
    });
    return Plotly.react(plot, [base, ring], layout, plotOptions);
  }

  function choose(i, redraw = true) {
    chosen = i;
    const columns = Math.min(points.columns, points.x.length);
    const rows = Math.ceil(points.x.length / columns);
    const percent = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0);
    thumb.style.backgroundImage = `url("${points.sprite}")`;
    thumb.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
    thumb.style.backgroundPosition = `${percent(i % columns, columns)}% ${percent(Math.floor(i / columns), rows)}%`;
    thumb.setAttribute("aria-label", points.class[i] || points.name[i]);
    const lines = [];
    if (points.class[i]) lines.push(element("p", { class: "strong" }, breakable(points.class[i])));
    lines.push(element("p", {}, breakable(points.name[i])));
    if (points.near[i]) {
      const near = points.near_class[i] ? `${points.near_class[i]} (${points.near[i]})` : points.near[i];
      lines.push(element("p", { class: "small" }, "Nearest training image: ", breakable(near)));
    }
    info.replaceChildren(...lines);
    if (redraw) draw();
  }

  function step(by) {
    if (!shown.length) return;
    const at = shown.indexOf(chosen);
    choose(shown[at < 0 ? (by > 0 ? 0 : shown.length - 1) : (at + by + shown.length) % shown.length]);
  }

  function filter() {
    const words = search.value.trim().toLowerCase();
    const wanted = select ? select.value : "";
    shown = points.x
      .map((_, i) => i)
      .filter((i) => !wanted || points.class[i] === wanted)
      .filter((i) => `${points.class[i]} ${points.name[i]}`.toLowerCase().includes(words));
    count.textContent = words || wanted ? `${shown.length} of ${points.x.length} images` : "";
    draw();
  }

  draw().then(() => {
    plot.on("plotly_hover", (event) => event.points[0].curveNumber === 0 && choose(event.points[0].pointNumber));
    plot.on("plotly_click", (event) => event.points[0].curveNumber === 0 && choose(event.points[0].pointNumber));
  });
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in steps) step(steps[event.key]);
    else if (event.key === "Home" && shown.length) choose(shown[0]);
    else if (event.key === "End" && shown.length) choose(shown[shown.length - 1]);
    else return;
    event.preventDefault();
  });
  document.getElementById("map-previous").addEventListener("click", () => step(-1));
  document.getElementById("map-next").addEventListener("click", () => step(1));
  search.addEventListener("input", filter);
  if (select) select.addEventListener("change", filter);
  if (points.x.length) choose(0);
  themeListeners.push(draw);
})();
