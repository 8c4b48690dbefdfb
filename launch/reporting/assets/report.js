"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { run: 0, step: null, group: 0, colour: "entropy", theme: "system", paper: false, ...remembered() };
const ABSENT = "-";

function remembered() {
  try { return JSON.parse(sessionStorage.getItem("horizon-report")) || {}; } catch { return {}; }
}
function remember() {
  try { sessionStorage.setItem("horizon-report", JSON.stringify(state)); } catch { /* a browser may forbid it */ }
}

// An element of `tag` with attributes and children; text is always text, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const shown = (value, digits = 2) => (value == null ? ABSENT : value.toFixed(digits));

// --- selection ------------------------------------------------------------------------------------------------------
// Steps with samples; for a run without samples, every step that has times.
function stepsOf(run) {
  const sampled = [...new Set(run.groups.map((group) => group[0].step))];
  return sampled.length ? sampled : run.steps;
}
const groupsAt = (run, step) => run.groups.filter((group) => group[0].step === step);

function settle() {
  state.run = Math.min(Math.max(state.run, 0), runs.length - 1);
  const steps = stepsOf(runs[state.run]);
  if (!steps.includes(state.step)) state.step = steps.find((step) => step >= state.step) ?? steps.at(-1) ?? null;
  const count = groupsAt(runs[state.run], state.step).length;
  state.group = Math.min(Math.max(state.group, 0), Math.max(count - 1, 0));
}

function choose(change) {
  Object.assign(state, change);
  settle();
  remember();
  draw();
}

function move(what, by) {
  if (what === "step") {
    const steps = stepsOf(runs[state.run]);
    const index = Math.min(Math.max(steps.indexOf(state.step) + by, 0), steps.length - 1);
    choose({ step: steps[index] ?? null, group: 0 });
  } else {
    choose({ [what]: state[what] + by });
  }
}

// --- samples --------------------------------------------------------------------------------------------------------
function largest(group, key) {
  return group.reduce((max, rollout) => rollout[key].reduce((m, x) => Math.max(m, x ?? 0), max), 0);
}

function drawScale(group) {
  const scale = byId("scale");
  scale.replaceChildren();
  const ramp = (from, to) => make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${from}, ${to})` });
  if (state.colour === "entropy") {
    scale.append("0", ramp("transparent", "var(--entropy)"), `${shown(largest(group, "entropies"))} nats of entropy`);
  } else if (state.colour === "weight") {
    const max = Math.max(1, largest(group, "weights"));
    scale.append("0", ramp("transparent", "var(--weight)"), `${shown(max)} token weight before normalising`);
  } else {
    scale.append("negative", ramp("var(--negative)", "transparent"), "0", ramp("transparent", "var(--positive)"), "positive advantage of the rollout");
  }
}

function tokenSpans(rollout, group) {
  const max = { entropy: largest(group, "entropies") || 1, weight: Math.max(1, largest(group, "weights")) };
  const widest = Math.max(...group.map((each) => Math.abs(each.advantage ?? 0))) || 1;
  const closes = closing(rollout);
  const tokens = rollout.tokens.length ? rollout.tokens : [rollout.text];
  return tokens.flatMap((token, index) => {
    const entropy = rollout.entropies[index], weight = rollout.weights[index];
    const share = { entropy: entropy / max.entropy, weight: weight / max.weight, advantage: Math.abs(rollout.advantage) / widest };
    const title = `entropy ${shown(entropy, 3)} nats, weight ${shown(weight, 3)}, advantage ${shown(rollout.advantage)}`;
    const span = make("span", { title }, token);
    span.style.setProperty("--share", Number.isFinite(share[state.colour]) ? share[state.colour].toFixed(3) : 0);
    if (token.includes("\n")) span.className = "newline";
    const mark = make("span", { class: "closes", title: "from here on a token counts less than half" }, "horizon closes: w < ½");
    return index === closes ? [mark, span] : [span];
  });
}

// Whether the run's method lets the horizon of a rollout close.
const hasHorizon = (rollout) => runs[state.run].horizon && rollout.advantage < 0;

// The first token of a negative rollout that counts less than half; -1 if there is none.
function closing(rollout) {
  return hasHorizon(rollout) ? rollout.weights.findIndex((weight) => weight != null && weight < 0.5) : -1;
}

function horizonWords(rollout) {
  if (!hasHorizon(rollout) || !rollout.weights.length) return "";
  const closes = closing(rollout), count = rollout.weights.length;
  const last = `the last token weighs ${shown(rollout.weights.at(-1))}`;
  return closes < 0 ? `The horizon stays open: ${last}.` : `The horizon closes at token ${closes + 1} of ${count}; ${last}.`;
}

function partsList(parts) {
  const max = Math.max(1, ...Object.values(parts).map((value) => Math.abs(value ?? 0)));
  const rows = Object.entries(parts).flatMap(([name, value]) => {
    const bar = make("i", { style: `width: ${(100 * Math.abs(value ?? 0)) / max}%${value < 0 ? "; background: var(--fails)" : ""}` });
    return [make("dt", {}, name), make("dd", { class: "bar", "aria-hidden": "true" }, bar), make("dd", {}, shown(value))];
  });
  return make("dl", { class: "parts", "aria-label": "parts of the reward" }, ...rows);
}

function card(rollout, index, group) {
  const correct = rollout.correct == null ? ABSENT : rollout.correct ? "✓ correct" : "✗ incorrect";
  const sign = rollout.advantage > 0 ? "+" : "";
  const head = make("h4", {}, `${index + 1}. reward ${shown(rollout.reward)}`,
    make("span", {}, correct), make("span", {}, `advantage ${sign}${shown(rollout.advantage)}`), make("span", {}, rollout.finish_reason ?? ABSENT));
  const hue = state.colour === "advantage" ? (rollout.advantage < 0 ? "negative" : "positive") : state.colour;
  const body = make("div", { class: `tokens by-${hue}` }, ...tokenSpans(rollout, group));
  const made = make("article", { class: "card", "aria-label": `rollout ${index + 1}` }, head, partsList(rollout.parts), body);
  if (rollout.reward_error) made.append(make("p", { class: "horizon" }, `The reward failed: ${rollout.reward_error}`));
  const words = horizonWords(rollout);
  if (words) made.append(make("p", { class: "horizon" }, words));
  return made;
}

function drawSamples(run) {
  const groups = groupsAt(run, state.step), group = groups[state.group] ?? [];
  byId("group").textContent = groups.length ? `group ${state.group + 1} of ${groups.length}` : "no group";
  byId("group-back").disabled = state.group === 0;
  byId("group-on").disabled = state.group >= groups.length - 1;
  byId("sampled").textContent =
    `${run.groups.flat().length.toLocaleString("en")} of ${run.recorded.toLocaleString("en")} recorded rollouts of this run are in this file: whole groups, spread over all steps.`;
  drawScale(group);
  byId("prompt").replaceChildren(...(group.length
    ? [make("b", {}, "Prompt "), group[0].prompt, make("b", {}, "\nAnswer "), group[0].answer]
    : ["No rollouts of this step."]));
  byId("cards").replaceChildren(...group.map(card));
}

// --- timeline -------------------------------------------------------------------------------------------------------
const COLOURS = JSON.parse(byId("kinds").dataset.colours);

function drawTimeline(run) {
  const step = run.timeline[state.step], index = run.steps.indexOf(state.step);
  const [wait, ahead] = [run.times.wait[index], run.times.ahead[index]];
  byId("timeline-of").textContent = step
    ? `${run.name}, step ${state.step}: ${shown(step.seconds)} s, of which ${shown(wait)} s waiting for rollouts${ahead >= 0.005 ? ` and ${shown(ahead)} s draining those in flight` : ""}.`
    : `${run.name} has no timeline of step ${state.step ?? ABSENT}.`;
  if (!step) { byId("gantt").replaceChildren(); return; }
  const percent = (seconds) => `${(100 * seconds) / step.seconds}%`;
  const rows = Object.entries(run.lanes).flatMap(([worker, device]) => {
    const bars = step.spans.filter(([name]) => name === worker).map(([, work, start, end]) => make("i", {
      style: `left: ${percent(start)}; width: ${percent(end - start)}; background: var(--method-${COLOURS[work]})`,
      title: `${work} ${shown(start)} to ${shown(end)} s`,
    }));
    return [
      make("span", {}, `device ${device}: ${worker}`), make("div", { class: "track", "aria-hidden": "true" }, ...bars),
      make("span", { class: "num" }, `idle ${Math.round(100 * step.idle[device])} %`),
    ];
  });
  const axis = make("div", { class: "axis" }, ...[0, 0.25, 0.5, 0.75, 1].map((share) =>
    make("span", { style: `left: ${100 * share}%` }, `${(share * step.seconds).toFixed(1)} s`)));
  byId("gantt").replaceChildren(make("div", { class: "gantt" }, ...rows, make("span"), axis, make("span")));
}

// --- settings -------------------------------------------------------------------------------------------------------
function drawSettings(run) {
  byId("settings-of").textContent = run.name;
  const rows = Object.entries(run.settings).map(([key, value]) => {
    const others = [...new Set(runs.map((other) => other.settings[key] ?? ABSENT))].filter((other) => other !== value);
    const differs = others.length && key !== "run.dir";
    return make("tr", differs ? { class: "differs" } : {}, make("td", {}, key), make("td", {}, value), make("td", {}, differs ? others.join(" | ") : ""));
  });
  byId("all-settings").tBodies[0].replaceChildren(...rows);
}

// --- page -----------------------------------------------------------------------------------------------------------
function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
  select.value = String(chosen);
}

function draw() {
  const run = runs[state.run], steps = stepsOf(run);
  fill(byId("run"), runs.map((each, index) => [index, each.name]), state.run);
  fill(byId("step"), steps.map((step) => [step, step]), state.step);
  byId("step-back").disabled = steps.indexOf(state.step) <= 0;
  byId("step-on").disabled = steps.indexOf(state.step) >= steps.length - 1;
  for (const input of document.getElementsByName("colour")) input.checked = input.value === state.colour;
  drawSamples(run);
  drawTimeline(run);
  drawSettings(run);
}

function drawTheme() {
  if (state.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  byId("theme").textContent = `Theme: ${state.theme}`;
}

function nextTheme() {
  const themes = ["system", "light", "dark"];
  state.theme = themes[(themes.indexOf(state.theme) + 1) % themes.length];
  remember();
  drawTheme();
}

const SECTIONS = [...document.querySelectorAll("main > section")];
const KEYS = {
  ArrowLeft: () => move("step", -1), ArrowRight: () => move("step", 1),
  k: () => move("group", -1), j: () => move("group", 1), p: () => move("run", -1), n: () => move("run", 1),
  e: () => choose({ colour: "entropy" }), w: () => choose({ colour: "weight" }), a: () => choose({ colour: "advantage" }),
  t: nextTheme, "?": () => byId("keys").showModal(),
  ...Object.fromEntries(SECTIONS.map((section, index) => [String(index + 1), () => section.scrollIntoView()])),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("select, input, dialog");
  const scrolls = event.target.closest(".scroll") && event.key.startsWith("Arrow");
  if (typing || scrolls || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});
byId("run").addEventListener("change", (event) => choose({ run: Number(event.target.value) }));
byId("step").addEventListener("change", (event) => choose({ step: Number(event.target.value), group: 0 }));
for (const what of ["step", "group"]) {
  byId(`${what}-back`).addEventListener("click", () => move(what, -1));
  byId(`${what}-on`).addEventListener("click", () => move(what, 1));
}
for (const input of document.getElementsByName("colour")) input.addEventListener("change", () => choose({ colour: input.value }));
byId("theme").addEventListener("click", nextTheme);
byId("help").addEventListener("click", () => byId("keys").showModal());
const paper = byId("paper-details"); // whether it is open outlives the reload of a watched page
if (paper) {
  paper.open = state.paper;
  paper.addEventListener("toggle", () => { state.paper = paper.open; remember(); });
}

// A watched page polls the report's version, and reloads when it has changed.
async function watch() {
  for (;;) {
    await new Promise((wake) => setTimeout(wake, 2000));
    try {
      const answer = await fetch("version");
      if (answer.ok && (await answer.text()) !== document.body.dataset.version) {
        location.reload();
        return; // the old page stays until the new one is loaded: it must not reload again
      }
      byId("watch").textContent = "watching";
    } catch {
      byId("watch").textContent = "the server has ended";
    }
  }
}

settle();
draw();
drawTheme();
if (document.body.dataset.version) {
  byId("watch").hidden = false;
  watch();
}
