// Curves. Names that come from data are never given to the charting library: it reads some marks of HTML in them.
(function () {
  const dashes = ["solid", "dash", "dot"];

  function draw(chart) {
    const traces = chart.traces.map((trace) => ({
      type: "scatter",
      mode: trace.x.length < 40 ? "lines+markers" : "lines",
      x: trace.x,
      y: trace.y,
      line: { color: colour(`c${trace.colour % 8}`), width: 2, dash: dashes[Math.floor(trace.colour / 8) % 3] },
      marker: { size: 4 },
      connectgaps: false,
      hovertemplate: "%{y:.4~g}<extra></extra>",
    }));
    const layout = plotLayout({ hovermode: "x unified" });
    layout.xaxis.hoverformat = ",d";
    layout.xaxis.tickformat = "~s";
    layout.xaxis.title = { text: "step", font: { size: 11 }, standoff: 4 };
    layout.yaxis.exponentformat = "e";
    const values = traces.flatMap((trace) => trace.y).filter((value) => value !== null);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) layout.yaxis.range = low ? [Math.min(0, 2 * low), Math.max(0, 2 * low)] : [0, 1]; // a flat line lies in the middle
    Plotly.react(chart.id, traces, layout, plotOptions);
  }

  const all = () => report.charts.forEach(draw);
  all();
  themeListeners.push(all);
})();
