"use strict";
// Draws what the tables cannot: curves, samples and their slider, bodies in space.

const AXES = {reward_calls: "reward calls", samples: "samples", seconds: "hours of training"};
const DASHES = {tuned: "solid", reference: "dash", training: "dot"};
const DIGITS = 4;

async function inflate(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function make(tag, settings = {}, children = []) {
  const {style = {}, data = {}, ...rest} = settings;
  const node = Object.assign(document.createElement(tag), rest);
  Object.entries(style).forEach(([name, value]) => node.style.setProperty(name, value));
  Object.assign(node.dataset, data);
  node.append(...children);
  return node;
}

function options(select, names) {
  select.replaceChildren(...names.map((name) => make("option", {value: name, textContent: name})));
}

const number = (x) => (x === null || x === undefined ? "–" : Number(x.toPrecision(DIGITS)).toString());

// ---------------------------------------------------------------- curves

function along(series, axis) {
  const x = series[axis];
  return axis === "seconds" ? x.map((s) => (s === null ? null : s / 3600)) : x;
}

function layout(extra) {
  return {
    margin: {l: 56, r: 12, t: 34, b: 42}, font: {size: 11}, hovermode: "closest",
    showlegend: false, ...extra,
  };
}

const CONFIG = {responsive: true, displaylogo: false, displayModeBar: false};

function drawChart(node, chart, axis, runs) {
  const traces = chart.series.map((one) => ({
    x: along(one, axis), y: one.y, name: `${runs[one.run].name}, ${one.arm}`,
    mode: one.y.length > 40 ? "lines" : "lines+markers", type: "scatter",
    line: {color: runs[one.run].color, dash: DASHES[one.arm], width: 1.7}, marker: {size: 5},
  }));
  const extra = {title: {text: chart.title, font: {size: 13}, x: 0.02, xanchor: "left"}, xaxis: {title: {text: AXES[axis]}}};
  Plotly.react(node, traces, layout(extra), CONFIG);
}

function curves(data) {
  const select = document.getElementById("axis");
  if (!select) return;
  const drawn = new Set();
  select.replaceChildren(...data.axes.map((axis) => make("option", {value: axis, textContent: AXES[axis]})));
  const draw = (node) => {
    drawn.add(node);
    drawChart(node, data.charts[Number(node.dataset.chart)], select.value, data.runs);
  };
  data.charts.forEach((chart, i) => {
    const place = document.getElementById(chart.main ? "charts" : "further-charts");
    place.append(make("div", {className: "chart", data: {chart: i}}));
  });
  document.querySelectorAll("#charts .chart").forEach(draw);
  const further = document.getElementById("further");
  further.addEventListener("toggle", () => {
    if (further.open) document.querySelectorAll("#further-charts .chart").forEach(draw);
  });
  select.addEventListener("change", () => drawn.forEach(draw));
}

// ---------------------------------------------------------------- samples

const source = (sample) =>
  sample.image || `data:image/svg+xml;charset=utf-8,${encodeURIComponent(sample.svg)}`;

function picture(sample, caption, open) {
  const image = make("img", {src: source(sample), alt: caption, loading: "lazy"});
  image.addEventListener("load", () => {
    image.classList.toggle("small", Boolean(sample.image) && image.naturalWidth < 128);
  });
  image.addEventListener("click", open);
  return make("figure", {}, [image, make("figcaption", {textContent: caption})]);
}

function tile(entry, arms, extra) {
  // arms: [{name, sample, rewards, before}]; `rewards` are those whose values are told, `before` is
  // the reference's sample from the same noise, and the reference itself has none.
  const open = () => enlarge(entry, arms);
  const named = new Set(arms.flatMap(({rewards}) => rewards)).size > 1;
  const figures = arms.map(({name, sample, rewards, before}) => {
    const told = rewards.map((key) => `${named ? `${key} ` : ""}${number(sample.values[key])}`);
    const figure = picture(sample, `${name}: ${told.join(", ")}`, open);
    if (before) {
      const [old, value] = [before, sample].map(({values}) => values[rewards[0]] ?? null);
      if (value !== null && old !== null && value !== old)
        figure.lastChild.className = value > old ? "up" : "down";
    }
    return figure;
  });
  const label = make("div", {className: "label", textContent: entry.label || `row ${entry.row}`, title: entry.label});
  return make("div", {className: "tile", data: {key: `${entry.row}/${entry.sample}`}, ...extra},
    [label, make("div", {className: "arms"}, figures)]);
}

function enlarge(entry, arms) {
  const dialog = document.getElementById("large");
  const columns = arms.map(({name, sample}) => make("div", {}, [
    make("h3", {textContent: name}), make("img", {src: source(sample), alt: name}),
    ...(sample.body ? [make("div", {className: "space"})] : []),
    make("table", {}, Object.entries(sample.values).map(([key, value]) =>
      make("tr", {}, [make("td", {textContent: key}), make("td", {textContent: number(value)})]))),
  ]));
  const close = make("button", {textContent: "close"});
  close.addEventListener("click", () => dialog.close());
  dialog.replaceChildren(close, make("h2", {textContent: entry.label || `row ${entry.row}`}),
    make("div", {className: "arms"}, columns));
  dialog.showModal();
  const spaces = dialog.querySelectorAll(".space");
  arms.filter(({sample}) => sample.body).forEach(({sample}, i) => drawBody(spaces[i], sample.body));
  dialog.onclose = () => {
    spaces.forEach((node) => Plotly.purge(node));
    dialog.replaceChildren();
  };
}

function drawBody(node, body) {
  const column = (i) => body.points.map((point) => point[i]);
  const ends = (i) => body.sticks.flatMap(([a, b]) => [body.points[a][i], body.points[b][i], null]);
  const hidden = {visible: false, showspikes: false};
  const sticks = {
    type: "scatter3d", mode: "lines", x: ends(0), y: ends(1), z: ends(2), hoverinfo: "skip",
    line: {color: "#8a8f98", width: 7},
  };
  const balls = {
    type: "scatter3d", mode: "markers", x: column(0), y: column(1), z: column(2), text: body.names,
    hovertemplate: "%{text}<extra></extra>",
    marker: {
      color: body.colors, size: body.radii.map((r) => 64 * r), opacity: 1,
      line: {color: "#404040", width: 1},
    },
  };
  const scene = {aspectmode: "data", xaxis: hidden, yaxis: hidden, zaxis: hidden};
  Plotly.newPlot(node, [sticks, balls], {
    margin: {l: 0, r: 0, t: 0, b: 0}, showlegend: false, scene,
  }, {displayModeBar: false, responsive: true});
}

function slider(data) {
  const input = document.getElementById("slider");
  if (!input) return;
  const {places, keys, runs} = data.checkpoints;
  const tiles = document.getElementById("samples");
  tiles.style.setProperty("--tile", `${8 + 8 * runs.length}rem`);
  input.max = places.length - 1;
  const show = () => {
    const place = places[Number(input.value)];
    const current = runs.map((run) => run.records.filter((record) => record.at <= place).at(-1));
    document.getElementById("place").textContent = runs.map((run, i) => {
      const at = current[i];
      const name = data.runs.length > 1 ? `${data.runs[run.run].name}: ` : "";
      const calls = at && at.reward_calls ? `${at.reward_calls.toLocaleString("en")} reward calls, ` : "";
      return at ? `${name}after ${at.updates} updates, ${calls}` +
        `${data.runs[run.run].reward} ${number(at.mean)}` : `${name}before training`;
    }).join(" · ");
    tiles.replaceChildren(...keys.map((key, i) => {
      // The reference's sample is the same for all runs, but each measured its own reward of it.
      const values = Object.assign({}, ...runs.map((run) => run.reference[i].values).reverse());
      const rewards = [...new Set(runs.map((run) => data.runs[run.run].reward))];
      const arms = [{name: "reference", sample: {...runs[0].reference[i], values}, rewards}];
      runs.forEach((run, r) => {
        const {name, reward} = data.runs[run.run];
        const own = current[r] ? current[r].tuned[i] : run.reference[i];
        arms.push({
          name: runs.length > 1 ? name : "tuned", sample: own, rewards: [reward],
          before: run.reference[i],
        });
      });
      return tile(key, arms);
    }));
  };
  input.addEventListener("input", show);
  input.value = places.length - 1;
  show();
}

function extremes(data) {
  const select = document.getElementById("kind");
  if (!select) return;
  const names = {best: "highest reward", worst: "lowest reward", changed: "most changed"};
  select.replaceChildren(...Object.entries(names).map(([value, text]) => make("option", {value, textContent: text})));
  const place = document.getElementById("extremes");
  const show = () => {
    place.replaceChildren(...data.extremes.flatMap((run) => {
      const own = run.entries.filter((entry) => entry.kind === select.value);
      const text = `${data.runs[run.run].name}, by ${data.runs[run.run].reward}`;
      const head = data.runs.length > 1 ? [make("h3", {textContent: text})] : [];
      const rewards = [data.runs[run.run].reward];
      const tiles = own.map((entry) => tile(entry, [
        {name: "reference", sample: entry.reference, rewards},
        {name: "tuned", sample: entry.tuned, rewards, before: entry.reference},
      ]));
      return [...head, make("div", {className: "tiles", style: {"--tile": "16rem"}}, tiles)];
    }));
  };
  select.addEventListener("change", show);
  show();
}

// ---------------------------------------------------------------- exploitation

function hacking(data) {
  const select = document.getElementById("guard");
  if (!select) return;
  options(select, Object.keys(data.hacking));
  const node = document.getElementById("pareto");
  const errors = (sems) => ({type: "data", array: sems.map((s) => 2 * (s || 0)), thickness: 1, width: 2});
  const show = () => {
    const {name, reward, worse, series} = data.hacking[select.value];
    const traces = series.flatMap((one) => {
      const color = data.runs[one.run].color;
      const front = one.x.map((_, i) => i).filter((i) => one.front[i]).sort((a, b) => one.x[a] - one.x[b]);
      return [
        {
          x: one.x, y: one.y, text: one.updates.map((u) => `after ${u} updates`), mode: "lines+markers",
          type: "scatter", name: data.runs[one.run].name, line: {color, width: 1, dash: "dot"},
          error_x: errors(one.x_sem), error_y: errors(one.y_sem),
          marker: {color: one.front.map((on) => (on ? color : "#ffffff")), size: 9, line: {color, width: 1.5}},
        },
        {
          x: front.map((i) => one.x[i]), y: front.map((i) => one.y[i]), mode: "lines", type: "scatter",
          hoverinfo: "skip", line: {color, width: 2.5}, showlegend: false,
        },
      ];
    });
    const better = {lower: "higher is better", higher: "lower is better", either: "near 0 is better"}[worse];
    Plotly.react(node, traces, layout({
      xaxis: {title: {text: `gain of ${reward} (trained)`}, zeroline: true},
      yaxis: {title: {text: `gain of ${name} (${better})`}, zeroline: true},
      margin: {l: 72, r: 12, t: 12, b: 46}, showlegend: data.runs.length > 1,
      legend: {x: 0.01, y: 0.99, bgcolor: "rgba(255,255,255,0.7)"},
    }), CONFIG);
  };
  select.addEventListener("change", show);
  show();
}

async function start() {
  const wait = document.getElementById("wait");
  if (!("DecompressionStream" in window)) {
    wait.textContent = "Curves and samples need a newer browser; the tables below are complete.";
    return;
  }
  document.head.append(make("script", {textContent: await inflate("library")}));
  const data = JSON.parse(await inflate("data"));
  curves(data);
  slider(data);
  hacking(data);
  extremes(data);
  wait.remove();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  const wait = document.getElementById("wait");
  if (wait) wait.textContent = `Curves and samples cannot be drawn (${error.message}).`;
  console.error(error);
});
