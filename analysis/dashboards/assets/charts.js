"use strict";
// Small charts as SVG: bars of a histogram, lines of a log.

const CHART = { width: 320, height: 90 };

// Bars of equal width; `label(i)` says what bar i is of.
function bars(values, label, name) {
  const most = Math.max(...values, 1e-12), { width, height } = CHART, step = width / values.length;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": name, class: "bars" },
    values.map((value, i) => {
      const size = value > 0 ? Math.max(1.5, (value / most) * height) : 0;
      return svg("g", { "data-tip": label(i) },
        svg("rect", { x: i * step, y: 0, width: step, height, class: "hit" }),
        svg("rect", { x: i * step + step * 0.08, y: height - size, width: step * 0.84, height: size }));
    }));
}

const ends = (...labels) => h("div", { class: "ends" }, labels.map(label => h("span", null, label)));

function histogramOf({ from, to, counts }) {
  const edge = i => figure(from + ((to - from) * i) / counts.length);
  return h("figure", null, h("figcaption", null, "act, where it is open"),
    bars(counts, i => `${edge(i)} to ${edge(i + 1)}: ${count(counts[i])} tokens`, "histogram of acts"),
    ends(figure(from), figure(to)));
}

function positionsOf(shares, nCtx) {
  const edge = i => Math.round((nCtx * i) / shares.length);
  return h("figure", null, h("figcaption", null, "share of tokens, by position in the window"),
    bars(shares, i => `positions ${edge(i)} to ${edge(i + 1) - 1}: ${percent(shares[i])}`, "frequency by position"),
    ends("0", count(nCtx - 1)));
}

function linesOf({ title, x, y, curves }) {
  const width = 640, height = 240, points = curves.flatMap(curve => curve.points);
  const [x0, x1] = rangeOf(points.map(point => point[0])), [y0, y1] = rangeOf(points.map(point => point[1]));
  const place = ([px, py]) => `${((px - x0) / (x1 - x0)) * width},${height - ((py - y0) / (y1 - y0)) * height}`;
  return h("figure", { class: "lines" },
    h("figcaption", null, title, curves.map((curve, i) => h("span", { class: `key c${i}` }, curve.name))),
    h("div", { class: "plane" },
      h("div", { class: "side" }, h("span", null, figure(y1)), h("span", null, y), h("span", null, figure(y0))),
      h("div", null, svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${y} by ${x}` },
        curves.map((curve, i) => svg("polyline", { class: `c${i}`, points: curve.points.map(place).join(" ") }))),
        ends(count(x0), x, count(x1)))));
}

function rangeOf(values) {
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}
