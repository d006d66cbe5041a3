"use strict";
// Text that a model wrote only ever becomes textContent.
const element = (kind, classes, text, ...children) => {
  const made = document.createElement(kind);
  made.className = classes;
  made.textContent = text;
  made.append(...children);
  return made;
};

// ---- the browser of responses

const runs = JSON.parse(document.getElementById("browser").textContent);
const controls = document.getElementById("controls");
const list = document.getElementById("prompts");
const more = document.getElementById("more");
const PAGE = 20;
let found = [];

const margin = (one) => (one.margins.length ? one.margins[one.margins.length - 1][1] : NaN);
const length = (one) => one.answers.filter(([name]) => !name.startsWith("SFT control")).at(-1)?.[1].length ?? 0;
const unknownLast = (a, b) => Number.isNaN(a) - Number.isNaN(b) || a - b;
const orders = {
  worst: (a, b) => unknownLast(margin(a), margin(b)),
  best: (a, b) => unknownLast(-margin(a), -margin(b)),
  longest: (a, b) => length(b) - length(a),
  shortest: (a, b) => length(a) - length(b),
  row: (a, b) => a.row - b.row,
};

function answer(name, text, truncated, kind) {
  const [whose, ...also] = name.split(", ");
  const count = `${text.length.toLocaleString("en")} characters`;
  const told = [...also, count, ...(truncated ? ["truncated"] : [])].join(", ");
  const body = element("div", "", text);
  if (text.length > 600) body.tabIndex = 0; // it scrolls
  return element("div", `answer ${kind}`, "", element("b", "", whose), element("span", "", told), body);
}

function item(one) {
  const head = element("div", "head", "", element("span", "", `row ${one.row}`));
  for (const [t, value] of one.margins) {
    head.append(element("span", value < 0 ? "bad" : "", `margin of iteration ${t}: ${value.toFixed(3)}`));
  }
  const turns = one.prompt.map(([role, content]) => element("div", "turn", "", element("b", "", role), content));
  const answers = one.answers.map(([name, text, truncated]) => answer(name, text, truncated, ""));
  const all = element("div", "answers", "", answer("real", one.real, false, "real"), ...answers);
  return element("li", "", "", head, ...turns, all);
}

function show() {
  const shown = list.children.length;
  list.append(...found.slice(shown, shown + PAGE).map(item));
  more.hidden = list.children.length >= found.length;
}

function search() {
  const run = runs[Number(controls.run.value) || 0];
  const wanted = controls.search.value.toLowerCase();
  const texts = (one) => [String(one.row), one.real, ...one.prompt.map((turn) => turn[1]), ...one.answers.map((a) => a[1])];
  found = run.rows.filter((one) => !wanted || texts(one).some((text) => text.toLowerCase().includes(wanted)));
  found.sort((a, b) => orders[controls.sort.value](a, b) || a.row - b.row);
  const of = run.total > run.rows.length ? `, of ${run.total} in all: worst, best and a sample` : "";
  document.getElementById("found").textContent = run.total
    ? `${found.length} of ${run.rows.length} prompts${of}`
    : "No responses have been kept yet.";
  list.replaceChildren();
  show();
}

runs.forEach((run, i) => controls.run.append(new Option(run.name, i)));
if (!runs.some((run) => run.rows.some((one) => one.margins.length))) {
  controls.sort.querySelectorAll("[value=worst], [value=best]").forEach((option) => option.remove());
}
controls.hidden = !runs.some((run) => run.total);
controls.addEventListener("input", search);
controls.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", show);
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    controls.search.focus();
  }
  if (event.key === "Escape" && document.activeElement === controls.search) controls.search.blur();
});
search();

// ---- values of curves at the cursor

const values = (coordinate, [low, high, start, end]) => low + ((coordinate - start) / (end - start)) * (high - low);

function readable(svg) {
  const paths = [...svg.querySelectorAll("path.mean")].map((path) => ({
    label: path.dataset.label,
    points: [...path.getAttribute("d").matchAll(/([\d.-]+),([\d.-]+)/g)].map((found) => found.slice(1).map(Number)),
  }));
  const xs = [...new Set(paths.flatMap((path) => path.points.map((point) => point[0])))].sort((a, b) => a - b);
  if (!xs.length) return;
  const [across, up] = [svg.dataset.x, svg.dataset.y].map((scale) => scale.split(" ").map(Number));
  const output = svg.closest("figure").querySelector("output");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  let place = -1;

  function at(next) {
    place = Math.max(0, Math.min(xs.length - 1, next));
    const x = xs[place];
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", up[3]], ["y2", up[2]]]) cursor.setAttribute(name, value);
    svg.append(cursor);
    const told = new Map();
    for (const path of paths) {
      const point = path.points.find((one) => one[0] === x);
      if (point) told.set(path.label, Number(values(point[1], up).toPrecision(3)));
    }
    const named = [...told].map(([label, value]) => (told.size > 1 ? `${label} ${value}` : value)).join(", ");
    output.textContent = `${Math.round(values(x, across))}: ${named}`;
  }

  function clear() {
    cursor.remove();
    output.textContent = "";
    place = -1;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    at(xs.reduce((best, one, i) => (Math.abs(one - x) < Math.abs(xs[best] - x) ? i : best), 0));
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      event.preventDefault();
      at(place < 0 && step < 0 ? xs.length - 1 : place + step);
    }
  });
}
document.querySelectorAll("svg").forEach(readable);
