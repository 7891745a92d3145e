// Small charts, drawn as SVG with a sentence for those who cannot see them.
const WIDTH = 340, HEIGHT = 150, LEFT = 38, BOTTOM = 26, TOP = 8, RIGHT = 8;

function frame(caption, sentence, height = HEIGHT) {
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": sentence });
  svg.append(drawing("path", { class: "axis", d: `M${LEFT},${TOP}V${height - BOTTOM}H${WIDTH - RIGHT}` }));
  return [element("figure", {}, element("figcaption", {}, caption), svg), svg];
}

function scale(low, high, start, end) {
  return (value) => start + (high === low ? 0.5 : (value - low) / (high - low)) * (end - start);
}

function label(svg, x, y, text, anchor = "middle") {
  svg.append(drawing("text", { x, y, "text-anchor": anchor }, text));
}

function ends(svg, low, high, digits, unit) {
  label(svg, LEFT, HEIGHT - 12, low.toFixed(digits), "start");
  label(svg, WIDTH - RIGHT, HEIGHT - 12, high.toFixed(digits), "end");
  label(svg, (WIDTH + LEFT) / 2, HEIGHT - 12, unit);
}

function histogram(caption, values, digits, unit) {
  const low = Math.min(...values), high = Math.max(...values), bins = Math.min(24, Math.max(4, Math.ceil(Math.sqrt(values.length))));
  const heights = new Array(bins).fill(0);
  for (const value of values) heights[Math.min(bins - 1, high === low ? 0 : Math.floor((value - low) / (high - low) * bins))]++;
  const most = Math.max(...heights);
  const [figure, svg] = frame(caption, `${caption}: ${values.length} questions from ${low.toFixed(digits)} to ${high.toFixed(digits)} ${unit}, mean ${mean(values).toFixed(digits)}`);
  const step = (WIDTH - LEFT - RIGHT) / bins, y = scale(0, most, HEIGHT - BOTTOM, TOP);
  heights.forEach((count, i) => {
    const bar = drawing("rect", { class: "bar", x: LEFT + i * step + 0.5, width: Math.max(step - 1, 1), y: y(count), height: HEIGHT - BOTTOM - y(count) });
    bar.append(drawing("title", {}, `${count} questions`));
    svg.append(bar);
  });
  label(svg, LEFT - 4, TOP + 8, String(most), "end");
  label(svg, LEFT - 4, HEIGHT - BOTTOM, "0", "end");
  ends(svg, low, high, digits, unit);
  return figure;
}

function accuracyOverSlope() {
  const known = DATA.questions.filter((q) => slope(q) !== null && q.a[state.to] && q.a[state.to].c !== null);
  if (known.length < 2) return null;
  known.sort((a, b) => slope(a) - slope(b));
  const bins = Math.min(8, Math.max(2, Math.floor(known.length / 10))), points = [];
  for (let i = 0; i < bins; i++) {
    const part = known.slice(Math.floor(i * known.length / bins), Math.floor((i + 1) * known.length / bins));
    if (part.length) points.push(part);
  }
  const name = DATA.runs[state.to].name, middle = (part) => mean(part.map(slope));
  const credit = (run) => points.map((part) => {
    const own = part.filter((q) => q.a[run] && q.a[run].c !== null).map((q) => q.a[run].c);
    return own.length ? 100 * mean(own) : null;
  });
  const low = middle(points[0]), high = middle(points[points.length - 1]);
  const sentence = "Right answers over slope: " + points.map((part, i) => `slope ${middle(part).toFixed(2)}: ${number(credit(state.to)[i], 0, "%")}`).join(", ");
  const [figure, svg] = frame(`Right answers (%) over slope, ${points.length} groups of equal size`, sentence);
  const shown = [state.from, state.to].flatMap(credit).filter((value) => value !== null);
  const floor = Math.max(0, Math.floor(Math.min(...shown) / 10 - 0.5) * 10); // from the ten below, as the axis says
  const x = scale(low, high, LEFT + 8, WIDTH - RIGHT - 8), y = scale(floor, 100, HEIGHT - BOTTOM, TOP);
  for (const tick of [floor, (floor + 100) / 2, 100]) label(svg, LEFT - 4, y(tick) + 4, String(tick), "end");
  for (const run of new Set([state.from, state.to])) {
    const values = credit(run), path = values.map((v, i) => v === null ? "" : `${x(middle(points[i]))},${y(v)}`).filter(Boolean);
    svg.append(drawing("polyline", { points: path.join(" "), fill: "none", stroke: COLORS[run % 8], "stroke-width": 2, "stroke-dasharray": DASHES[run % 8] }));
    values.forEach((value, i) => {
      if (value === null) return;
      const dot = drawing("circle", { cx: x(middle(points[i])), cy: y(value), r: 3.5, fill: COLORS[run % 8] });
      dot.append(drawing("title", {}, `${DATA.runs[run].name}: ${value.toFixed(1)}% of ${points[i].length} questions`));
      svg.append(dot);
    });
  }
  ends(svg, low, high, 2, `slope of ${name}`);
  return figure;
}

function showCharts() {
  const bits = DATA.questions.map(information).filter((v) => v !== null), slopes = DATA.questions.map(slope).filter((v) => v !== null);
  const charts = [
    bits.length ? histogram("Mutual information in layer 1", bits, 2, "bits") : null,
    slopes.length ? histogram("Slope of the retention curve", slopes, 2, "per layer") : null,
    accuracyOverSlope(),
  ];
  byId("charts").replaceChildren(...charts.filter(Boolean));
}

// The retention curves of one question, one line a run, with the budgets.
function showCurve(question) {
  const place = byId("curve");
  const traced = question.a.map((answer, run) => [run, answer && answer.r]).filter(([, trace]) => trace && trace.o.length);
  place.replaceChildren();
  if (!traced.length) return;
  const layers = Math.max(...traced.map(([, trace]) => counts(trace).length)), most = Math.max(...traced.map(([, trace]) => trace.v), 1);
  const lowest = Math.max(1, Math.min(...traced.map(([, trace]) => Math.min(...counts(trace)))));
  const height = 230, y0 = scale(Math.log(lowest * 0.8), Math.log(most), height - BOTTOM, TOP), y = (v) => y0(Math.log(Math.max(v, lowest * 0.8)));
  const x = scale(-1, layers - 1, LEFT, WIDTH - RIGHT);
  const words = traced.map(([run, trace]) => curveWords(run, trace));
  const [figure, svg] = frame("Visual tokens leaving each layer (logarithmic)", words.join(" "), height);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
  const ticks = [lowest, ...[5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].filter((t) => t > lowest * 1.4 && t < most / 1.4), most];
  for (const tick of ticks) label(svg, LEFT - 4, y(tick) + 4, String(tick), "end");
  for (let layer = -1; layer < layers; layer += Math.ceil(layers / 12)) label(svg, x(layer), height - 12, layer < 0 ? "in" : String(layer));
  for (const budget of new Set(traced.map(([, trace]) => trace.g).filter((g) => g !== null))) {
    svg.append(drawing("line", { class: "budget", x1: LEFT, x2: WIDTH - RIGHT, y1: y(budget), y2: y(budget) }));
    label(svg, WIDTH - RIGHT, y(budget) - 4, `budget ${Math.round(budget)}`, "end");
  }
  for (const [run, trace] of traced) {
    const points = [trace.v, ...counts(trace)].map((value, i) => `${x(i - 1)},${y(value)}`);
    svg.append(drawing("polyline", { points: points.join(" "), fill: "none", stroke: COLORS[run % 8], "stroke-width": 2, "stroke-dasharray": DASHES[run % 8] }));
  }
  svg.append(drawing("line", { class: "now", id: "now", y1: TOP, y2: height - BOTTOM }));
  place.append(figure, element("ul", { class: "small" }, ...words.map((text) => element("li", {}, text))));
  place.position = x;
  moveCurve();
}

function curveWords(run, trace) {
  const parts = [`${DATA.runs[run].name}: ${number(mean(counts(trace)))} tokens per layer of ${trace.v}`];
  if (trace.g !== null) parts.push(`budget ${number(trace.g, 0)}`);
  if (trace.mi[1] !== null) parts.push(`mutual information ${trace.mi[1].toFixed(2)} bits`);
  if (trace.s !== null) parts.push(`slope ${trace.s.toFixed(3)}`);
  return parts.join(", ") + ".";
}

function moveCurve() {
  const line = byId("now"), x = byId("curve").position;
  if (line) for (const end of ["x1", "x2"]) line.setAttribute(end, x(state.layer));
}
