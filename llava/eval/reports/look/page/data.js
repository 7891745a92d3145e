"use strict";
// What the file holds, as the other parts use it. Field names are those of joined.py and traces.py.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#3b6fd4", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0c8599", "#c2255c", "#6b7280"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 4", "6 2 1 2"];
const state = { from: 0, to: Math.min(1, DATA.runs.length - 1), shown: [], question: -1, layer: -1 };

const byId = (id) => document.getElementById(id);

// Everything that comes from runs goes through here, as text.
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawing(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function bytes(text) {
  const raw = atob(text), values = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) values[i] = raw.charCodeAt(i);
  return values;
}

function counts(trace) { // tokens leaving each layer
  const layers = [];
  for (let i = 0; i < trace.o.length; i += 2) for (let n = 0; n < trace.o[i + 1]; n++) layers.push(trace.o[i]);
  return layers;
}

function depths(trace) { // of each visual token, after how many layers it is still there
  if (typeof trace.k === "string") return bytes(trace.k);
  return new Uint8Array(trace.v).fill(trace.k);
}

function members(group) { // [first layer, last layer, patches]
  return new Uint16Array(bytes(group[2]).buffer);
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function number(value, digits = 1, unit = "") {
  return value === null || value === undefined ? "–" : value.toFixed(digits) + unit;
}

// How the answer changed between the two chosen runs: "", "changed", "wrong" or "right".
function change(question) {
  const one = question.a[state.from], other = question.a[state.to];
  if (!one || !other) return "";
  if (one.c !== null && other.c !== null && one.c !== other.c) return other.c < one.c ? "wrong" : "right";
  return one.t === other.t ? "" : "changed";
}

function differs(question) {
  const one = question.a[state.from], other = question.a[state.to];
  return Boolean(one && other && (one.t !== other.t || change(question)));
}

// The trace that the numbers of a question are taken from: of the run that is looked at, else of any that has one.
function traceOf(question, has) {
  const order = [question.a[state.to], question.a[state.from], ...question.a];
  const found = order.find((answer) => answer && answer.r && has(answer.r));
  return found ? found.r : null;
}

const information = (question) => { const r = traceOf(question, (t) => t.mi[1] !== null); return r ? r.mi[1] : null; };
const slope = (question) => { const r = traceOf(question, (t) => t.s !== null); return r ? r.s : null; };
const tokens = (question) => { const a = question.a[state.to]; return a ? a.n[1] : null; };
function time(question) {
  const answer = question.a[state.to];
  if (!answer) return null;
  return answer.r && answer.r.t[3] !== null ? answer.r.t[3] : answer.ms;
}

function verdict(answer) { // words, not only a color
  if (answer.x) return ["failed", "wrong"];
  if (answer.c === null) return ["no truth", ""];
  if (answer.c >= 1) return ["right", "right"];
  return answer.c <= 0 ? ["wrong", "wrong"] : ["credit " + answer.c.toFixed(2), ""];
}
