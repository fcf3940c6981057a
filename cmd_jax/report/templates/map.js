// Map of the images: a thumbnail and words about the chosen point, a filter by class or words.
(function () {
  const plot = document.getElementById("map-plot");
  if (!plot) return;
  const { figure, points, sprite, columns } = report.map;
  const [thumb, info, select, search, count] = ["thumb", "info", "class", "search", "count"].map((name) => document.getElementById(`map-${name}`));
  const { x, y } = figure.data[0];
  let shown = x.map((_, i) => i);
  let chosen = -1;

  function choose(i) {
    chosen = i;
    const across = Math.min(columns, x.length);
    const down = Math.ceil(x.length / across);
    const percent = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0);
    thumb.style.backgroundImage = `url("${sprite}")`;
    thumb.style.backgroundSize = `${100 * across}% ${100 * down}%`;
    thumb.style.backgroundPosition = `${percent(i % across, across)}% ${percent(Math.floor(i / across), down)}%`;
    thumb.setAttribute("aria-label", points.class[i] || points.name[i]);
    const near = points.near_class[i] ? `${points.near_class[i]} (${points.near[i]})` : points.near[i];
    info.replaceChildren(
      element("p", { class: "strong" }, breakable(points.class[i])),
      element("p", {}, breakable(points.name[i])),
      element("p", { class: "small" }, near ? "Nearest training image: " : "", breakable(near)),
    );
    Plotly.restyle(plot, { x: [[x[i]]], y: [[y[i]]] }, [1]); // the ring
  }

  function step(by) {
    if (!shown.length) return;
    const at = shown.indexOf(chosen);
    choose(shown[at < 0 ? (by > 0 ? 0 : shown.length - 1) : (at + by + shown.length) % shown.length]);
  }

  function filter() {
    const words = search.value.trim().toLowerCase();
    const wanted = select ? select.value : "";
    const fits = x.map((_, i) => (!wanted || points.class[i] === wanted) && `${points.class[i]} ${points.name[i]}`.toLowerCase().includes(words));
    shown = x.map((_, i) => i).filter((i) => fits[i]);
    count.textContent = words || wanted ? `${shown.length} of ${x.length} images` : "";
    Plotly.restyle(plot, { "marker.opacity": [fits.map((inside) => (inside ? 0.9 : 0.12))] }, [0]);
  }

  Plotly.newPlot(plot, figure.data, figure.layout, plotOptions).then(() => {
    const point = (event) => event.points[0].curveNumber === 0 && choose(event.points[0].pointNumber);
    plot.on("plotly_hover", point);
    plot.on("plotly_click", point);
    if (x.length) choose(0);
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
})();
