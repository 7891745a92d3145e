// One question, the summary, and what the controls do.
let redraws = [];

function showQuestion(index) {
  state.question = index;
  const question = DATA.questions[index], lines = question.q.split("\n");
  showPlace();
  byId("question").textContent = lines[0] || "(no text)";
  byId("prompt").textContent = lines.slice(1).join("\n");
  byId("truth").textContent = question.y === null ? "" : `Truth: ${question.y}`;
  const layers = Math.max(0, ...question.a.map((answer) => (answer && answer.r ? counts(answer.r).length : 0)));
  byId("layer").max = String(layers - 1);
  byId("slider").hidden = !layers;
  redraws = [];
  byId("cards").replaceChildren(...question.a.map((answer, run) => (answer ? card(question, answer, run) : missing(run))));
  showCurve(question);
  setLayer(Math.min(state.layer, layers - 1));
  history.replaceState(null, "", `#${index}`);
}

function showPlace() {
  const question = DATA.questions[state.question], place = state.shown.indexOf(state.question) + 1;
  byId("where").textContent = `${DATA.benchmarks[question.b]} · question ${question.id} · ${place} of ${state.shown.length}`;
}

function heading(run) {
  const line = drawing("svg", { width: 28, height: 10, class: "mark", "aria-hidden": "true" });
  line.append(drawing("line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke: COLORS[run % 8], "stroke-width": 3, "stroke-dasharray": DASHES[run % 8] }));
  line.style.width = "28px";
  return element("h3", {}, line, DATA.runs[run].name);
}

function missing(run) {
  return element("article", { class: "card" }, heading(run), element("p", { class: "small" }, "This run has no answer to the question."));
}

function card(question, answer, run) {
  const [word, kind] = verdict(answer), [box, redraw] = survivors(question, answer);
  redraws.push(redraw);
  return element("article", { class: "card", "data-run": DATA.runs[run].name }, heading(run),
    element("p", { class: "said" }, answer.t || "(empty)"),
    element("p", { class: `verdict ${kind}` }, answer.x ? `failed: ${answer.x}` : word),
    box, facts(answer));
}

function facts(answer) {
  const [visual, nominal, processed] = answer.n, [flops, dense] = answer.f, list = element("dl", {});
  const add = (name, value) => list.append(element("dt", {}, name), element("dd", {}, value));
  if (visual !== null && visual !== undefined) add("visual tokens", String(visual));
  if (nominal !== null && nominal !== undefined) add("per layer, nominal", number(nominal));
  if (processed !== null && processed !== undefined) add("per layer, processed", number(processed));
  if (flops && dense) add("FLOPs, of dense", `${(flops / 1e9).toPrecision(3)} G, ${(100 * flops / dense).toFixed(1)}%`);
  const times = answer.r ? answer.r.t : [null, answer.ms, null, null];
  ["encode", "prefill", "decode", "in all"].forEach((name, i) => {
    if (times[i] !== null && times[i] !== undefined) add(`time: ${name}`, `${times[i].toFixed(1)} ms`);
  });
  if (answer.r && answer.r.mi[1] !== null) add("mutual information", answer.r.mi.map((bits) => number(bits, 3)).join(" and ") + " bits");
  if (answer.r && answer.r.s !== null) add("slope", number(answer.r.s, 4));
  return list;
}

function setLayer(layer) {
  state.layer = Math.max(-1, Math.min(Number(byId("layer").max), layer));
  byId("layer").value = String(state.layer);
  const text = state.layer < 0 ? "before the decoder" : `after layer ${state.layer}`;
  byId("layer-text").textContent = text;
  byId("layer").setAttribute("aria-valuetext", text);
  for (const redraw of redraws) redraw();
  moveCurve();
}

function showSummary() {
  const head = ["run", ...DATA.benchmarks, "retained", "tokens, nominal", "processed", "FLOPs", "prefill"];
  const metrics = DATA.benchmarks.map((_, i) => { const row = DATA.summary.find((r) => r.scores[i]); return row ? row.scores[i].metric : ""; });
  const header = element("tr", {}, ...head.map((name, i) => element("th", { scope: "col" }, name, ...(i >= 1 && i <= metrics.length && metrics[i - 1] ? [element("small", {}, metrics[i - 1])] : []))));
  const rows = DATA.summary.map((row, run) => element("tr", {}, element("th", { scope: "row" }, DATA.runs[run].name),
    ...row.scores.map((score) => element("td", score ? { title: `${score.answers} answers, ${score.graded} with a truth` } : {}, score ? number(score.score) : "–")),
    element("td", {}, number(row.retained, 1, "%")), element("td", {}, number(row.nominal)), element("td", {}, number(row.processed)),
    element("td", {}, row.flops === null ? "–" : number(100 * row.flops, 1, "%")), element("td", {}, number(row.prefill_ms, 1, " ms"))));
  byId("summary").replaceChildren(element("thead", {}, header), element("tbody", {}, ...rows));
}

function showChanges() {
  const kinds = DATA.questions.map(change), tally = (kind) => kinds.filter((own) => own === kind).length;
  const differing = DATA.questions.filter(differs).length;
  byId("change-count").textContent = `${differing} ${differing === 1 ? "answer differs" : "answers differ"}; ${tally("wrong")} became wrong, ${tally("right")} became right`;
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => element("option", { value }, text)));
  select.value = String(chosen);
}

function start() {
  document.title = DATA.title;
  byId("notes").replaceChildren(...DATA.notes.map((note) => element("li", {}, note)));
  const runs = DATA.runs.map((run, index) => [String(index), run.name]);
  options(byId("from"), runs, state.from);
  options(byId("to"), runs, state.to);
  options(byId("benchmark"), [["", "all"], ...DATA.benchmarks.map((name, index) => [String(index), name])], "");
  for (const [id, value] of Object.entries(DATA.preset)) byId(id).value = value;
  const rechosen = () => {
    state.from = Number(byId("from").value);
    state.to = Number(byId("to").value);
    showChanges();
    showCharts();
    filter(true);
  };
  for (const id of ["from", "to"]) byId(id).addEventListener("change", rechosen);
  for (const id of ["benchmark", "change", "sort", "descending"]) byId(id).addEventListener("change", () => filter(false));
  byId("search").addEventListener("input", () => filter(false));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("list").addEventListener("click", (event) => {
    const chosen = event.target.closest(".row");
    if (chosen) select(Number(chosen.dataset.index));
    if (chosen && window.matchMedia("(max-width: 760px)").matches) byId("detail").scrollIntoView();
  });
  document.addEventListener("keydown", keys);
  showSummary();
  const linked = Number(location.hash.slice(1));
  if (location.hash.length > 1 && DATA.questions[linked]) state.question = linked;
  rechosen();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inside = event.target.closest("input, select, textarea");
  if (inside && event.key === "Escape") inside.blur();
  if (inside) return; // the slider moves by itself
  const page = 10, inList = event.target.id === "list";
  const moves = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity } : {}) };
  if (event.key in moves) step(moves[event.key]);
  else if (event.key === "ArrowLeft") setLayer(state.layer - 1);
  else if (event.key === "ArrowRight") setLayer(state.layer + 1);
  else if (event.key === "/") byId("search").focus();
  else return;
  event.preventDefault();
}

start();
