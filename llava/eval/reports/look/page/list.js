// The list of questions: what is shown, in which order, and what is chosen.
function matches(question, wanted) {
  if (wanted.benchmark !== "" && question.b !== Number(wanted.benchmark)) return false;
  if (wanted.change === "changed" && !differs(question)) return false;
  if (wanted.change === "same" && differs(question)) return false;
  if ((wanted.change === "wrong" || wanted.change === "right") && change(question) !== wanted.change) return false;
  if (!wanted.search) return true;
  const texts = [question.id, question.q, question.y || "", ...question.a.map((answer) => (answer ? answer.t : ""))];
  return texts.some((text) => text.toLowerCase().includes(wanted.search));
}

const ORDERS = { mi: information, slope, tokens, time };

// keep: stay at the question that is shown, if it still is among the others.
function filter(keep) {
  const wanted = { benchmark: byId("benchmark").value, change: byId("change").value, search: byId("search").value.trim().toLowerCase() };
  state.shown = DATA.questions.map((_, index) => index).filter((index) => matches(DATA.questions[index], wanted));
  const order = ORDERS[byId("sort").value], sign = byId("descending").checked ? -1 : 1;
  if (order) {
    const keys = new Map(state.shown.map((index) => [index, order(DATA.questions[index])]));
    // Questions without the number come last, whichever way it goes.
    state.shown.sort((one, other) => {
      const a = keys.get(one), b = keys.get(other);
      if (a === null || b === null) return (a === null) - (b === null) || one - other;
      return sign * (a - b) || one - other;
    });
  } else if (sign < 0) state.shown.reverse();
  showList(keep);
}

function showList(keep) {
  const rows = document.createDocumentFragment();
  for (const index of state.shown) rows.append(row(index));
  byId("list").replaceChildren(rows);
  byId("count").textContent = `${state.shown.length} of ${DATA.questions.length} questions`;
  if (state.shown.length) select(keep && state.shown.includes(state.question) ? state.question : state.shown[0]);
}

function row(index) {
  const question = DATA.questions[index], kind = change(question), answer = question.a[state.to];
  const marks = { wrong: "became wrong", right: "became right", changed: "changed" };
  const facts = [DATA.benchmarks[question.b], question.id, ...(answer ? [`“${answer.t.slice(0, 40)}”`] : ["no answer"])];
  return element("div", { role: "option", id: `row-${index}`, class: "row", "aria-selected": "false", "data-index": index },
    element("span", { class: "text" }, question.q.split("\n")[0].slice(0, 160) || "(no text)"),
    element("span", { class: kind }, marks[kind] || (differs(question) ? "changed" : "")),
    element("span", { class: "sub" }, facts.join(" · ")));
}

function select(index) {
  const list = byId("list");
  for (const old of list.querySelectorAll('[aria-selected="true"]')) old.setAttribute("aria-selected", "false");
  const chosen = byId(`row-${index}`);
  if (chosen) {
    chosen.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", chosen.id);
    // Not scrollIntoView: it would move the page as well.
    const above = chosen.offsetTop - list.offsetTop - list.scrollTop, below = above + chosen.offsetHeight - list.clientHeight;
    if (above < 0 || below > 0) list.scrollTop += above < 0 ? above : below;
  }
  if (state.question !== index || !byId("cards").childElementCount) showQuestion(index);
  else showPlace();
}

function step(by) {
  if (!state.shown.length) return;
  const place = state.shown.indexOf(state.question) + by;
  select(state.shown[Math.max(0, Math.min(state.shown.length - 1, place))]);
}
