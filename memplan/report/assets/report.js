"use strict";
// Draws the charts of a memplan report from the JSON in #data with Plotly. Nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  // Named buttons only: plotly's own set has one that would send the chart to a server.
  const withButtons = (...names) => ({ responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover", modeBarButtons: [names] });
  const config = withButtons("toImage", "zoom2d", "pan2d", "resetScale2d");
  const byId = (id) => document.getElementById(id);
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ``up``: never less than n, so that it will do as a budget.
  function bytes(n, up = false) {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (Math.abs(n) < 1024) return unit === "B" ? `${n} B` : `${(up ? Math.ceil(10 * n) / 10 : n).toFixed(1)} ${unit}`;
      n /= 1024;
    }
    return `${(up ? Math.ceil(100 * n) / 100 : n).toFixed(2)} TiB`;
  }

  function signed(share) {
    const text = share.toFixed(2);
    return Number(text) > 0 ? `+${text}` : text.replace("-0.00", "0.00");
  }

  // Round byte ticks: multiples of a power of two that give about five of them.
  function byteAxis(min, max) {
    let step = 1;
    while ((max - min) / step > 6) step *= 2;
    const ticks = [];
    for (let v = Math.ceil(min / step) * step; v <= max; v += step) ticks.push(v);
    return { tickvals: ticks, ticktext: ticks.map((v) => bytes(v)), range: [min, max], gridcolor: ink("--line"), zeroline: false, fixedrange: true };
  }

  // ``named``: entries of the legend, which stands below the chart, two a line on a phone.
  function layout(named, more) {
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink("--ink"), family: "system-ui, sans-serif", size: narrow.matches ? 11 : 13 },
      margin: { l: narrow.matches ? 62 : 78, r: 12, t: 28, b: narrow.matches ? 62 + 20 * Math.ceil(named / 2) : 76 },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 12 }, ...(narrow.matches && { entrywidth: 0.5, entrywidthmode: "fraction" }) },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("--soft"), activecolor: ink("--accent") },
      hoverlabel: { bgcolor: ink("--raised"), bordercolor: ink("--line"), font: { color: ink("--ink") }, align: "left" },
      dragmode: narrow.matches ? false : "zoom",
    }, more);
  }

  // Memory over the step

  const steps = data.steps;
  let axis = "step";
  let cursor = steps.total.length ? steps.total.indexOf(Math.max(...steps.total)) : -1;
  const peakAt = cursor;
  const xs = (of) => (axis === "step" ? of.index : of.start);

  // Each point holds until the next one; the last is drawn to the end of the step.
  const drawn = (values, last) => (values.length ? [...values, last] : []);
  const endOf = (of) => (axis === "step" ? of.steps : of.time);

  function phaseBands() {
    const shapes = [], annotations = [], x = xs(steps);
    for (let i = 0; i < steps.phase.length;) {
      let j = i;
      while (j < steps.phase.length && steps.phase[j] === steps.phase[i]) j++;
      const from = x[i], to = j < x.length ? x[j] : endOf(steps);
      if (shapes.length % 2) shapes.push({ type: "rect", xref: "x", yref: "paper", x0: from, x1: to, y0: 0, y1: 1, fillcolor: ink("--soft"), opacity: 0.09, line: { width: 0 }, layer: "below" });
      else shapes.push({ type: "line", xref: "x", yref: "paper", x0: to, x1: to, y0: 0, y1: 1, line: { color: ink("--soft"), width: 1, dash: "dot" } });
      annotations.push({ x: (from + to) / 2, y: 1, yref: "paper", yanchor: "bottom", text: steps.phase[i], showarrow: false, font: { color: ink("--soft") } });
      i = j;
    }
    return { shapes, annotations };
  }

  function drawTimeline() {
    const x = drawn(xs(steps), endOf(steps));
    const label = drawn(steps.label, steps.label[steps.label.length - 1]);
    const traces = data.categories.filter((c) => steps.bytes[c.name]).map((c) => {
      const y = steps.bytes[c.name];
      return { type: "scatter", mode: "lines", name: c.name, stackgroup: "held", x, y: drawn(y, y[y.length - 1]), customdata: drawn(y.map((v) => bytes(v)), bytes(y[y.length - 1])),
        line: { width: 0.5, color: c.color, shape: "hv" }, fillcolor: c.color, hovertemplate: "%{customdata}" };
    });
    const total = steps.total;
    traces.push({ type: "scatter", mode: "lines", name: "total", x, y: drawn(total, total[total.length - 1]), text: label, customdata: drawn(total.map((v) => bytes(v)), bytes(total[total.length - 1] || 0)),
      line: { width: 1, color: ink("--ink"), shape: "hv" }, showlegend: false, hovertemplate: "<b>%{customdata}</b><br>%{text}" });
    if (data.unplanned) {
      const other = data.unplanned;
      traces.push({ type: "scatter", mode: "lines", name: "without a plan", x: drawn(xs(other), endOf(other)), y: drawn(other.total, other.total[other.total.length - 1]),
        customdata: drawn(other.total.map((v) => bytes(v)), ""), line: { width: 2, color: ink("--ink"), dash: "dash", shape: "hv" }, hovertemplate: "%{customdata}" });
    }
    const { shapes, annotations } = phaseBands();
    if (data.budget) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.budget, y1: data.budget, line: { color: ink("--bad"), width: 2, dash: "dashdot" } });
      annotations.push({ xref: "paper", x: 0, xanchor: "left", y: data.budget, yanchor: "bottom", text: `budget ${bytes(data.budget)}`, showarrow: false, font: { color: ink("--bad") } });
    }
    if (cursor >= 0) shapes.push(cursorLine());
    const highest = Math.max(...total, ...(data.unplanned ? data.unplanned.total : [0]), data.budget || 0);
    Plotly.react("timeline", traces, layout(traces.length - 1, {
      hovermode: "x unified", shapes, annotations, yaxis: byteAxis(0, 1.06 * highest),
      xaxis: { title: { text: axis === "step" ? "step" : "predicted time, µs" }, gridcolor: ink("--line"), zeroline: false, unifiedhovertitle: { text: "%{x}" } },
    }), config);
  }

  const cursorLine = () => ({ type: "line", name: "cursor", xref: "x", yref: "paper", x0: xs(steps)[cursor], x1: xs(steps)[cursor], y0: 0, y1: 1, line: { color: ink("--accent"), width: 2 } });

  function moveCursor(to) {
    if (!steps.total.length) return;
    cursor = Math.max(0, Math.min(steps.total.length - 1, to));
    const shapes = (byId("timeline").layout.shapes || []).filter((s) => s.name !== "cursor");
    Plotly.relayout("timeline", { shapes: [...shapes, cursorLine()] });
    showStep(cursor);
  }

  function cell(row, text, className) {
    const td = row.insertCell();
    td.textContent = text;
    if (className) td.className = className;
    return td;
  }

  // What is held at a point of the timeline: the largest buffers, with module and source line.
  function showStep(point) {
    const panel = byId("at-step");
    panel.textContent = "";
    if (point < 0) return;
    const at = steps.index[point];
    const held = data.lives.filter(([, from, to]) => from <= at && at < to).map(([s]) => data.storages[s]).sort((a, b) => b[1] - a[1]);
    const title = document.createElement("h3");
    title.textContent = `${steps.label[point].replace(/<br>/g, " · ")}: ${bytes(steps.total[point])}${point === peakAt ? " (the peak)" : ""}`;
    const table = document.createElement("table");
    for (const [name, size, category, module, source] of held.slice(0, 6)) {
      const row = table.insertRow();
      cell(row, bytes(size), "n");
      const named = cell(row, "");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = color(data.categories[category].name);
      named.append(swatch, name);
      cell(row, data.categories[category].name, "wide");
      cell(row, module, "wide");
      cell(row, source);
    }
    const more = document.createElement("p");
    more.className = "hint";
    more.textContent = `${held.length} buffers held`;
    panel.append(title, table, more);
  }

  const color = (name) => data.categories.find((c) => c.name === name).color;

  // The map of buffers: a rectangle each, at the address that a first-fit layout gives it

  function drawMap() {
    const outline = data.map.length > 200 ? 0 : 0.5; // outlines would cover thin rectangles
    const traces = data.categories.map((c, k) => {
      const mine = data.map.filter(([life]) => data.storages[data.lives[life][0]][2] === k);
      const life = mine.map(([l]) => data.lives[l]);
      const storage = life.map(([s]) => data.storages[s]);
      return { type: "bar", name: c.name, x: life.map(([, from, to]) => (from + to) / 2), width: life.map(([, from, to]) => to - from), base: mine.map(([, offset]) => offset), y: storage.map((s) => s[1]),
        marker: { color: c.color, line: { width: outline, color: ink("--ground") } },
        customdata: storage.map((s, i) => [s[0], bytes(s[1]), s[3] || "no module", s[4] || "no source line", life[i][1], life[i][2]]),
        hovertemplate: "<b>%{customdata[0]}</b> %{customdata[1]}<br>%{customdata[2]}<br>%{customdata[3]}<br>steps %{customdata[4]} to %{customdata[5]}<extra>" + c.name + "</extra>" };
    }).filter((t) => t.x.length);
    const highest = Math.max(1, ...data.map.map(([l, offset]) => offset + data.storages[data.lives[l][0]][1]));
    Plotly.react("map", traces, layout(traces.length, { barmode: "overlay", hovermode: "closest", yaxis: byteAxis(0, 1.03 * highest),
      xaxis: { title: { text: "step" }, gridcolor: ink("--line"), zeroline: false, range: [0, steps.steps] } }), config);
  }

  function drawModules() {
    const m = data.modules;
    Plotly.react("modules", [{ type: "icicle", ids: m.path, labels: m.name, parents: m.parent, values: m.total, branchvalues: "total", customdata: m.total.map((v) => bytes(v)), tiling: { orientation: narrow.matches ? "v" : "h" },
      texttemplate: "%{label} %{customdata}", hovertemplate: "<b>%{id}</b><br>%{customdata}, %{percentRoot} of the peak<extra></extra>", sort: false, maxdepth: narrow.matches ? 3 : 5, textfont: { color: ink("--ink") },
      marker: { colorscale: dark.matches ? [[0, "#1d3550"], [1, "#2f6ca8"]] : [[0, "#dbe9f7"], [1, "#6ba3d6"]], colors: m.total, line: { color: ink("--ground"), width: 1 } } }],
      layout(0, { margin: { l: 4, r: 4, t: 4, b: 4 }, uniformtext: { minsize: 11, mode: "hide" } }), withButtons("toImage"));
  }

  // Peak against time, and the slider over its budgets

  function drawFrontier() {
    if (!byId("frontier")) return;
    const f = data.frontier, chosen = Number(byId("budget").value), lowest = f.peak.indexOf(Math.min(...f.peak));
    const more = f.time.map((t) => (data.base_time ? 100 * (t / data.base_time - 1) : 0));
    const hover = f.peak.map((p, i) => `budget ${bytes(f.budget[i], true)}<br>peak ${bytes(p, true)}<br>${signed(more[i])} % time<br>${f.status[i]}`);
    const marked = { type: "scatter", mode: "markers", hoverinfo: "skip" };
    Plotly.react("frontier", [
      { type: "scatter", mode: "lines+markers", name: "plans", x: f.peak, y: more, text: hover, hovertemplate: "%{text}<extra></extra>", line: { color: ink("--accent"), width: 2 }, marker: { size: 8 } },
      { ...marked, name: "smallest feasible", x: [f.peak[lowest]], y: [more[lowest]], marker: { size: 16, symbol: "diamond-open", color: ink("--bad"), line: { width: 3 } } },
      { ...marked, name: "chosen", x: [f.peak[chosen]], y: [more[chosen]], marker: { size: 15, symbol: "circle-open", color: ink("--ink"), line: { width: 2 } } },
    ], layout(3, {
      xaxis: Object.assign(byteAxis(0.9 * f.peak[lowest], 1.05 * Math.max(...f.peak)), { title: { text: "peak" } }),
      yaxis: { title: { text: "more time, %" }, gridcolor: ink("--line"), zeroline: true, rangemode: "tozero" },
    }), config);
    byId("budget-says").textContent = hover[chosen].replace(/<br>/g, ", ");
    byId("budget").setAttribute("aria-valuetext", byId("budget-says").textContent);
    byId("budget-does").replaceChildren(...f.does[chosen].map((sentence) => {
      const item = document.createElement("li");
      item.textContent = sentence;
      return item;
    }));
  }

  function filterPeak() {
    const wanted = byId("filter").value.toLowerCase();
    let shown = 0;
    for (const row of document.querySelectorAll("#peak-table tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += row.hidden ? 0 : 1;
    }
    byId("filter-count").textContent = wanted ? `${shown} buffers` : "";
  }

  function draw() {
    drawTimeline();
    drawMap();
    drawModules();
    drawFrontier();
  }

  draw();
  showStep(cursor);
  byId("timeline").on("plotly_hover", (event) => {
    const point = event.points.find((p) => p.data.name !== "without a plan");
    if (point) showStep(Math.min(point.pointNumber, steps.total.length - 1));
  });
  byId("timeline").addEventListener("keydown", (event) => {
    const to = { ArrowLeft: cursor - 1, ArrowRight: cursor + 1, PageUp: cursor - 20, PageDown: cursor + 20, Home: peakAt, End: steps.total.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    moveCursor(to);
  });
  for (const radio of document.querySelectorAll("input[name=axis]")) {
    radio.addEventListener("change", () => { axis = radio.value; drawTimeline(); });
  }
  byId("filter").addEventListener("input", filterPeak);
  if (byId("budget")) byId("budget").addEventListener("input", drawFrontier);
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  document.documentElement.dataset.ready = "true";
})();
