"use strict";
// The page of labels: a state that every action replaces (so that undo is a matter of going back), and groups drawn where they are seen.
const data = JSON.parse(document.getElementById("data").textContent);
const thumbs = JSON.parse(document.getElementById("thumbs").textContent);
const N = data.files.length;
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const images = (count) => `${number(count)} image${count === 1 ? "" : "s"}`;
const key = `cmd_jax.label.${data.id}`;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

// ---- State: the group of each image, which images are struck, what an image was taken out of, the groups by number, and their
// order on the page. A group is {name, suggested}; its images are those that point to it. `out` has, by image, the numbers of the
// groups that it was taken out of, and the names of classes that it is not of as an earlier round or a labels.csv said.
function firstState() {
  const state = { group: new Int32Array(N), struck: new Uint8Array(N), out: new Map(), groups: new Map(), order: [] };
  data.groups.forEach(({ images, name, suggested }, index) => {
    state.groups.set(index + 1, { name, suggested });
    state.order.push(index + 1);
    for (const image of images) state.group[image] = index + 1;
  });
  for (const image of data.struck) state.struck[image] = 1;
  for (const [image, names] of Object.entries(data.ruled_out)) state.out.set(Number(image), names);
  return state;
}

const first = firstState();
// What was said before this page: an image that loses it again is saved as "open".
const saidBefore = first.group.map((group, image) => Number(first.groups.get(group).name !== "" || first.struck[image]));
let state = first;
let past = [];
let future = [];
let members = new Map(); // group -> images, as they are shown
let others = []; // rows of an opened labels.csv about images that are not here: kept, and saved again
let selected = new Set();
let saved = first;

const rank = new Float64Array(N);
data.groups.forEach((group) => group.images.forEach((image, place) => (rank[image] = place)));

function index() {
  members = new Map(state.order.map((group) => [group, []]));
  for (let image = 0; image < N; image++) members.get(state.group[image]).push(image);
  for (const [group, list] of members) {
    const by = state.groups.get(group).suggested && data.probability ? (i) => -data.probability[i] : (i) => data.place[i];
    list.sort((a, b) => by(a) - by(b));
  }
}

function act(message, change) {
  const next = { group: state.group.slice(), struck: state.struck.slice(), out: new Map(state.out), groups: new Map(state.groups), order: state.order.slice() };
  change(next);
  past.push({ state, message });
  if (past.length > 500) past.shift();
  future = [];
  state = next;
  settle(message);
}

function step(from, to, word) {
  if (!from.length) return say(`Nothing to ${word}.`);
  const { state: other, message } = from.pop();
  to.push({ state, message });
  state = other;
  settle(`${word === "undo" ? "Undone" : "Done again"}: ${message}`);
}
const undo = () => step(past, future, "undo");
const redo = () => step(future, past, "redo");

function settle(message) {
  selected = new Set();
  index();
  draw();
  say(message);
  clearTimeout(settle.timer);
  settle.timer = setTimeout(keep, 250);
}

// What is not saved yet survives a closed tab.
function keep() {
  try {
    if (state === first) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify({ group: [...state.group], struck: [...state.struck], out: [...state.out], groups: [...state.groups], order: state.order }));
  } catch { /* a browser without storage for files on disk */ }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(key) || "null");
    if (!kept || kept.group.length !== N) return;
    act("what this browser had kept of your last visit", (next) => {
      next.group.set(kept.group);
      next.struck.set(kept.struck);
      next.out = new Map(kept.out);
      next.groups = new Map(kept.groups);
      next.order = kept.order;
    });
    say("What you did on your last visit is here again; undo takes it back.");
  } catch { /* damaged, or no storage */ }
}

// ---- Actions.
const nameOf = (group) => state.groups.get(group).name;
const title = (group) => nameOf(group) || `group ${group}`;
const newGroup = (next, name, after) => {
  const group = Math.max(0, ...next.order) + 1;
  next.groups.set(group, { name, suggested: "" });
  next.order.splice(after === undefined ? next.order.length : next.order.indexOf(after) + 1, 0, group);
  return group;
};
const isDone = (group) => nameOf(group) !== "" || members.get(group).every((image) => state.struck[image]);
const groupNamed = (next, name) => next.order.find((group) => next.groups.get(group).name === name);

// What an image is taken out of, it is not of: the classes of these groups, once they have a name.
const rule = (next, image, what) => next.out.set(image, [...new Set(next.out.get(image)).add(what)]);
function ruledOut(image) {
  const names = (state.out.get(image) || []).map((what) => (typeof what === "string" ? what : nameOf(what)));
  return [...new Set(names)].filter((name) => name && name !== nameOf(state.group[image])).sort();
}

function nameGroup(group, name) {
  name = name.trim();
  if (name === nameOf(group)) return focusGroup(name ? nextOpen(group) : group);
  act(name ? `${images(members.get(group).length)} named ${name}` : `the name ${nameOf(group)} of a group is taken back`, (next) => {
    next.groups.set(group, { ...next.groups.get(group), name });
  });
  focusGroup(name ? nextOpen(group) : group);
}

function strike(list) {
  const off = list.every((image) => state.struck[image]);
  act(off ? `${images(list.length)} not struck any more` : `${images(list.length)} struck`, (next) => list.forEach((image) => (next.struck[image] = off ? 0 : 1)));
}

function divide(group) {
  const list = members.get(group).slice().sort((a, b) => data.place[a] - data.place[b]);
  if (list.length < 2) return say("A group of one image cannot be divided.");
  let best = 1;
  let highest = -1;
  for (let i = 1; i < list.length; i++) {
    let height = 0; // of the merger that joins both
    for (let place = data.place[list[i - 1]]; place < data.place[list[i]]; place++) height = Math.max(height, data.heights[place]);
    if (height > highest) [best, highest] = [i, height];
  }
  act(`${title(group)} divided into ${best} and ${list.length - best}`, (next) => {
    const made = newGroup(next, "", group);
    list.slice(best).forEach((image) => (next.group[image] = made));
  });
  focusGroup(group);
}

function takeOut(list) {
  const from = state.group[list[0]];
  act(`${images(list.length)} taken out of ${title(from)}`, (next) => {
    const made = newGroup(next, "", from);
    for (const image of list) {
      next.group[image] = made;
      rule(next, image, from);
    }
  });
  focusGroup(from);
}

function move(list, to, name) {
  const from = state.group[list[0]];
  const whole = list.length === members.get(from).length;
  act(`${images(list.length)} moved to ${name || title(to)}`, (next) => {
    const target = name ? groupNamed(next, name) || newGroup(next, name, from) : to;
    for (const image of list) {
      next.group[image] = target;
      if (!whole) rule(next, image, from);
    }
    if (whole) for (const [image, all] of state.out) if (all.includes(from)) rule(next, image, target);
  });
  focusGroup(members.get(from) && members.get(from).length ? from : nextOpen(from));
}

// The choice of a class or group to move to; `whole` is the group that is merged, or nothing.
function chooseTarget(list, whole) {
  const dialog = $("target");
  const input = $("target-name");
  const choices = $("target-list");
  const from = state.group[list[0]];
  const middle = data.place[list[0]];
  const distance = (group) => Math.min(...members.get(group).map((image) => Math.abs(data.place[image] - middle)));
  const names = allNames();
  const back = document.activeElement;
  const near = state.order.filter((group) => group !== from && members.get(group).length && !nameOf(group)).map((group) => [distance(group), group]);
  near.sort((a, b) => a[0] - b[0]);
  const fill = () => {
    const typed = input.value.trim();
    const found = names.filter((name) => name.toLowerCase().includes(typed.toLowerCase()) && name !== nameOf(from)).slice(0, 200);
    choices.replaceChildren();
    if (typed && !names.includes(typed)) choices.append(element("option", { value: `name:${typed}` }, `new class ${typed}`));
    for (const name of found) choices.append(element("option", { value: `name:${name}` }, name));
    if (!typed) for (const [, group] of near.slice(0, 30)) choices.append(element("option", { value: `group:${group}` }, `group ${group} (${images(members.get(group).length)})`));
    if (choices.options.length) choices.selectedIndex = 0;
  };
  $("target-title").textContent = whole ? `Merge ${title(from)} with` : `Move ${images(list.length)} to`;
  input.value = "";
  fill();
  input.oninput = fill;
  input.onkeydown = (event) => {
    if (event.key === "ArrowDown") choices.focus();
  };
  choices.onkeydown = (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      dialog.close("ok");
    }
  };
  choices.ondblclick = () => dialog.close("ok");
  dialog.onclose = () => {
    if (dialog.returnValue !== "ok" || !choices.value) return back.focus();
    const [kind, value] = [choices.value.slice(0, choices.value.indexOf(":")), choices.value.slice(choices.value.indexOf(":") + 1)];
    return kind === "name" ? move(list, 0, value) : move(list, Number(value), "");
  };
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
}

const allNames = () => [...new Set([...data.names, ...[...state.groups.values()].map(({ name }) => name).filter(Boolean)])].sort((a, b) => a.localeCompare(b));

// ---- Drawing: a section for each group that has images, filled when it comes near the window.
const sections = new Map();
const drawn = new Map(); // group -> what it was drawn from
const near = new Set();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const group = Number(target.dataset.group);
      if (isIntersecting) {
        near.add(group);
        fill(group);
      } else near.delete(group);
    }
  },
  { rootMargin: "1200px" },
);

function draw() {
  const holder = $("groups");
  const show = $("main").dataset.show;
  const shown = state.order.filter((group) => members.get(group).length && (show === "all" || (show === "done") === isDone(group)));
  const wanted = new Set(shown);
  for (const [group, section] of sections) {
    if (!wanted.has(group)) {
      watcher.unobserve(section);
      near.delete(group);
      section.remove();
      sections.delete(group);
      drawn.delete(group);
    }
  }
  let before = null;
  for (const group of shown) {
    let section = sections.get(group);
    if (!section) {
      section = element("section", { class: "group", id: `group-${group}`, "data-group": group });
      sections.set(group, section);
      watcher.observe(section);
    }
    section.classList.toggle("done", isDone(group));
    section.setAttribute("aria-label", nameOf(group) ? `Group ${group}, ${nameOf(group)}` : `Group ${group}`);
    const place = before ? before.nextSibling : holder.firstChild;
    if (place !== section) holder.insertBefore(section, place);
    before = section;
    if (near.has(group)) fill(group);
    else if (drawn.has(group) && drawn.get(group) !== signature(group)) empty(group);
  }
  $("none").hidden = shown.length > 0;
  const done = state.group.reduce((sum, group, image) => sum + (nameOf(group) !== "" || state.struck[image] ? 1 : 0), 0);
  const struck = state.struck.reduce((sum, value) => sum + value, 0);
  const open = state.order.filter((group) => !isDone(group)).length;
  $("progress").value = done;
  $("counts").textContent = `${number(done - struck)} named, ${number(struck)} struck, ${number(N - done)} left in ${number(open)} group${open === 1 ? "" : "s"}`;
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
  $("save").textContent = state === saved ? "Save labels.csv" : "Save labels.csv *";
  $("names").replaceChildren(...allNames().map((name) => element("option", { value: name })));
  for (const button of document.querySelectorAll("[data-strike]")) pressed(button);
}

function signature(group) {
  const { name, suggested } = state.groups.get(group);
  return JSON.stringify([name, suggested, members.get(group).map((image) => [image, state.struck[image], ...ruledOut(image)])]);
}

function empty(group) {
  sections.get(group).replaceChildren();
  drawn.delete(group);
}

function fill(group) {
  const now = signature(group);
  if (drawn.get(group) === now) return;
  drawn.set(group, now);
  const section = sections.get(group);
  const { name, suggested } = state.groups.get(group);
  const list = members.get(group);
  const hint = !name && suggested && data.probability ? `, maybe ${suggested}, ${Math.round(100 * mean(list.map((image) => data.probability[image])))} %` : "";
  const input = element("input", { id: `name-${group}`, list: "names", autocomplete: "off", placeholder: "name of the class", class: name ? "" : "suggested", value: name || suggested });
  const button = (what, text, shortcut, more = {}) => element("button", { type: "button", "data-do": what, "aria-keyshortcuts": shortcut, ...more }, text);
  const head = element(
    "header",
    {},
    element("h2", {}, name || `Group ${group}`, element("span", { class: "soft" }, ` ${images(list.length)}${hint}`)),
    element("label", { class: "hidden", for: `name-${group}` }, `Name of group ${group}`),
    input,
    button("name", name ? "Rename" : "Name", "Enter", name ? {} : { class: "primary" }),
    button("divide", "Divide", "d"),
    button("merge", "Merge ...", "g"),
    button("move", "Move ...", "m"),
    button("out", "Take out", "t"),
    button("strike", "Strike", "s"),
  );
  const sheet = element("ul", { class: "sheet", role: "listbox", "aria-multiselectable": "true", "aria-label": `Images of ${title(group)}` });
  list.forEach((image, place) => sheet.append(option(image, place === 0)));
  section.replaceChildren(head, sheet);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const shortName = (image) => data.files[image].split("/").pop();

function option(image, inTabOrder) {
  const notes = [...(data.flags[image] || []), ...(state.struck[image] ? ["struck"] : []), ...ruledOut(image).map((name) => `not ${name}`)];
  const chance = data.probability && !nameOf(state.group[image]) ? ` ${Math.round(100 * data.probability[image])} %` : "";
  const made = element(
    "li",
    { role: "option", tabindex: inTabOrder ? "0" : "-1", "aria-selected": String(selected.has(image)), "aria-label": [shortName(image), ...notes].join(", "), "data-image": image, title: data.files[image] },
    cell(image),
    ...(data.flags[image] || []).slice(0, 1).map((note) => element("span", { class: "flag", "aria-hidden": "true" }, note.split(":")[0])),
    element("span", { class: "name", "aria-hidden": "true" }, `${shortName(image)}${chance}`),
  );
  made.classList.toggle("struck", Boolean(state.struck[image]));
  return made;
}

// The whole picture inside a square, with its key patches.
function cell(image) {
  const [width, height] = data.sizes[image];
  const photo = element("div", { class: "photo" }, element("img", { alt: "", src: `data:image/webp;base64,${thumbs[image]}`, width, height }));
  const longer = Math.max(width, height);
  photo.style.width = `calc(var(--side) * ${(width / longer).toFixed(4)})`;
  photo.style.aspectRatio = `${width} / ${height}`;
  for (const [x, y, w, h] of data.marks[image]) {
    const mark = element("i", { class: "mark" });
    Object.assign(mark.style, { left: `${x / 10}%`, top: `${y / 10}%`, width: `${w / 10}%`, height: `${h / 10}%` });
    photo.append(mark);
  }
  return element("div", { class: "cell" }, photo);
}

function enlarge(image) {
  const [width, height] = data.sizes[image];
  const picture = element("img", { alt: shortName(image), src: `data:image/webp;base64,${thumbs[image]}` });
  const whole = new Image(); // the photograph itself, where it still lies beside this page
  whole.onload = () => (picture.src = whole.src);
  if (location.protocol === "file:") whole.src = data.base + data.files[image].split("/").map(encodeURIComponent).join("/");
  $("large-title").textContent = data.files[image];
  $("large-photo").replaceChildren(element("div", { class: "photo" }, picture));
  $("large-note").textContent = [`${number(width)} x ${number(height)} px`, ...(data.flags[image] || [])].join("; ");
  const from = document.activeElement;
  $("large").onclose = () => from && from.focus();
  $("large").showModal();
}

// ---- Findings of the first look.
function pressed(button) {
  const struck = Boolean(state.struck[Number(button.dataset.strike)]);
  button.setAttribute("aria-pressed", String(struck));
  button.parentElement.classList.toggle("struck", struck);
}

for (const details of document.querySelectorAll("#look details")) {
  const found = data.findings.filter(({ kind }) => kind === details.dataset.kind);
  const list = details.querySelector("ul");
  const more = details.querySelector(".more");
  const next = () => {
    for (const { image, other, file, note } of found.slice(list.children.length, list.children.length + 24)) {
      const pair = element("div", { class: "pair" });
      for (const each of [image, other].filter((each) => each >= 0)) {
        const button = element("button", { type: "button", "data-strike": each, "aria-label": `Strike ${shortName(each)}` }, "Strike");
        pair.append(element("div", {}, cell(each), button));
        pressed(button);
      }
      list.append(element("li", {}, pair, element("p", {}, file), element("p", { class: "soft" }, note)));
    }
    more.hidden = list.children.length >= found.length;
  };
  details.addEventListener("toggle", () => details.open && !list.children.length && next());
  more.addEventListener("click", next);
}

// ---- Selection, mouse and keyboard.
const focused = () => document.activeElement.closest("[data-image]");
const groupOf = (node) => {
  const section = node && node.closest("[data-group]");
  return section ? Number(section.dataset.group) : 0;
};
const isSelected = (group) => members.get(group).filter((image) => selected.has(image));

// The selected images of a group, else the one that has the focus.
function chosen(group) {
  const list = isSelected(group);
  const one = focused();
  if (list.length) return list;
  return one ? [Number(one.dataset.image)] : [];
}

function select(image, on) {
  const group = state.group[image];
  if ([...selected].some((other) => state.group[other] !== group)) {
    for (const node of document.querySelectorAll('[aria-selected="true"]')) node.setAttribute("aria-selected", "false");
    selected = new Set();
  }
  if (on) selected.add(image);
  else selected.delete(image);
  const node = document.querySelector(`[data-image="${image}"]`);
  if (node) node.setAttribute("aria-selected", String(on));
  const count = isSelected(group).length;
  say(count ? `${images(count)} of ${title(group)} selected: M moves, T takes out, S strikes.` : "");
}

function focusImage(node) {
  if (!node) return;
  for (const other of node.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
  node.scrollIntoView({ block: "nearest" });
}

function focusGroup(group) {
  const section = sections.get(group);
  if (!section) return;
  fill(group);
  section.scrollIntoView({ block: "nearest" });
  section.querySelector("[data-image]").focus({ preventScroll: true });
}

const onPage = () => [...document.querySelectorAll(".group")].map((section) => Number(section.dataset.group));

// The first open group behind one, which may have left the page.
function nextOpen(group) {
  const at = state.order.indexOf(group);
  const isOpen = (other) => sections.has(other) && !isDone(other);
  return state.order.slice(at + 1).find(isOpen) || state.order.find(isOpen) || 0;
}

function neighbour(group, by) {
  const all = onPage();
  if (all.length) focusGroup(all[Math.min(Math.max(all.indexOf(group) + by, 0), all.length - 1)]);
}

function doOn(group, what) {
  const list = chosen(group);
  const everything = members.get(group);
  if (what === "name") return nameGroup(group, $(`name-${group}`).value);
  if (what === "divide") return divide(group);
  if (what === "merge") return chooseTarget(everything, group);
  if (what === "strike") {
    const at = focused() && focused().dataset.image;
    strike(list.length ? list : everything);
    const again = at && document.querySelector(`#group-${group} [data-image="${at}"]`);
    return again ? focusImage(again) : focusGroup(group);
  }
  if (!list.length) return say("Select images first: click on them, or press X on each.");
  return what === "move" ? chooseTarget(list, 0) : takeOut(list);
}

let anchor = -1;
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && button.dataset.do) return doOn(groupOf(button), button.dataset.do);
  if (button && button.dataset.strike) return strike([Number(button.dataset.strike)]);
  const node = event.target.closest("[data-image]");
  if (!node) return undefined;
  const image = Number(node.dataset.image);
  const list = members.get(state.group[image]);
  focusImage(node);
  if (event.shiftKey && list.includes(anchor)) {
    const [from, to] = [list.indexOf(anchor), list.indexOf(image)].sort((a, b) => a - b);
    list.slice(from, to + 1).forEach((each) => select(each, true));
  } else select(image, !selected.has(image));
  anchor = image;
  return undefined;
});
document.addEventListener("dblclick", (event) => {
  const node = event.target.closest("[data-image]");
  if (node) enlarge(Number(node.dataset.image));
});

function across(node) {
  const cells = [...node.parentElement.children];
  const top = cells[0].offsetTop;
  const count = cells.findIndex((cell) => cell.offsetTop !== top);
  return count < 0 ? cells.length : count;
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.closest("input, select, textarea");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
    event.preventDefault();
    return save();
  }
  if (typing) {
    const group = groupOf(typing);
    if (group && event.key === "Enter") nameGroup(group, typing.value);
    else if (group && event.key === "Escape") focusGroup(group);
    else return undefined;
    event.preventDefault();
    return undefined;
  }
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    event.preventDefault();
    return event.shiftKey ? redo() : undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
  const node = focused();
  const group = groupOf(document.activeElement);
  const wide = { n: () => neighbour(group, 1), p: () => neighbour(group, -1), z: undoHere, y: redoHere, k: toggleMarks, "?": () => $("keys").showModal() };
  const inGroup = { d: "divide", g: "merge", m: "move", t: "out", s: "strike" };
  if (event.key in wide) wide[event.key]();
  else if (group && event.key in inGroup) doOn(group, inGroup[event.key]);
  else if (node) {
    const image = Number(node.dataset.image);
    const cells = [...node.parentElement.children];
    const at = cells.indexOf(node);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across(node), ArrowDown: across(node) };
    if (event.key in steps) focusImage(cells[at + steps[event.key]]);
    else if (event.key === "Home") focusImage(cells[0]);
    else if (event.key === "End") focusImage(cells[cells.length - 1]);
    else if (event.key === " " || event.key === "x") select(image, !selected.has(image));
    else if (event.key === "a") {
      const all = cells.every((cell) => selected.has(Number(cell.dataset.image)));
      cells.forEach((cell) => select(Number(cell.dataset.image), !all));
    } else if (event.key === "v") enlarge(image);
    else if (event.key === "Enter") {
      const input = $(`name-${group}`);
      input.focus();
      input.select();
    } else return undefined;
  } else return undefined;
  event.preventDefault();
  return undefined;
});

// The focus stays in the group that it was in, or goes to the one that came back.
function stay(action) {
  const group = groupOf(document.activeElement);
  action();
  if (!document.activeElement.closest("[data-image]")) focusGroup(sections.has(group) ? group : onPage()[0]);
}
const undoHere = () => stay(undo);
const redoHere = () => stay(redo);

// ---- labels.csv.
const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function toCsv() {
  const rows = [["file", "class", "state", "group"]];
  for (const group of state.order) {
    for (const image of members.get(group)) {
      const name = state.struck[image] ? "" : nameOf(group);
      const said = state.struck[image] ? "struck" : name ? "named" : saidBefore[image] ? "open" : "";
      rows.push([data.files[image], name, said, String(group)]);
    }
  }
  for (const image of state.out.keys()) for (const name of ruledOut(image)) rows.push([data.files[image], name, "not", ""]);
  return rows.concat(others).map((row) => `${row.map(quoted).join(",")}\n`).join("");
}

function fromCsv(text) {
  const rows = [[""]];
  let inside = false;
  const body = text.replace(/^\ufeff/, "");
  for (let i = 0; i < body.length; i++) {
    const row = rows[rows.length - 1];
    const letter = body[i];
    if (inside) {
      if (letter !== '"') row[row.length - 1] += letter;
      else if (body[i + 1] === '"') row[row.length - 1] += body[++i];
      else inside = false;
    } else if (letter === '"') inside = true;
    else if (letter === ",") row.push("");
    else if (letter === "\n") rows.push([""]);
    else if (letter !== "\r") row[row.length - 1] += letter;
  }
  return rows.filter((row) => row.length > 1 || row[0] !== "");
}

function save() {
  const url = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
  element("a", { href: url, download: "labels.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  saved = state;
  draw();
  say("labels.csv is saved where your browser saves downloads.");
}

function openCsv(text, name) {
  const [head, ...rows] = fromCsv(text);
  const column = (title) => head.indexOf(title);
  if (column("file") < 0 || column("class") < 0) return say(`${name} has no columns file and class: it is not opened.`);
  const places = new Map(data.files.map((file, image) => [file, image]));
  const get = (row, title) => (column(title) < 0 ? "" : row[column(title)] || "");
  const kept = [];
  let changed = 0;
  let read = 0;
  act(`${name} opened`, (next) => {
    const made = new Map();
    const order = [];
    for (const row of rows) {
      const image = places.get(get(row, "file"));
      const label = get(row, "class").trim();
      const said = get(row, "state") || (label ? "named" : "");
      const number = get(row, "group");
      if (image === undefined) {
        kept.push([get(row, "file"), label, said, ""]);
        continue;
      }
      if (!said && !number) continue;
      read++;
      if (said === "not") {
        rule(next, image, label);
        continue;
      }
      const before = state.struck[image] ? "" : nameOf(state.group[image]);
      if (before && before !== label) changed++;
      const at = `${number}\n${said === "struck" && !number ? "" : label}`;
      if (said === "struck") next.struck[image] = 1;
      else next.struck[image] = 0;
      if (said === "struck" && !number) continue;
      // A struck image of a named group has no class of its own: it stays with its group.
      const group = said === "struck" ? [...made].find(([id]) => id.startsWith(`${number}\n`)) : undefined;
      if (group) next.group[image] = group[1];
      else {
        if (!made.has(at)) {
          const id = Math.max(0, ...next.order, ...order) + 1;
          next.groups.set(id, { name: label, suggested: "" });
          made.set(at, id);
          order.push(id);
        }
        next.group[image] = made.get(at);
      }
    }
    next.order = order.concat(next.order);
  });
  others = kept;
  const parts = [`${number(read)} rows of ${name} read`];
  if (changed) parts.push(`${images(changed)} had another name here (undo brings it back)`);
  if (kept.length) parts.push(`${number(kept.length)} rows are of images that are not here; they are kept`);
  return say(`${parts.join("; ")}.`);
}

// ---- Buttons of the page.
const say = (text) => ($("status").textContent = text);
function toggleMarks() {
  const plain = document.body.classList.toggle("plain");
  $("marks").setAttribute("aria-pressed", String(!plain));
}
$("undo").addEventListener("click", undo);
$("redo").addEventListener("click", redo);
$("save").addEventListener("click", save);
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) openCsv(await file.text(), file.name);
  event.target.value = "";
});
$("marks").addEventListener("click", toggleMarks);
$("help").addEventListener("click", () => $("keys").showModal());
$("show").addEventListener("change", (event) => {
  $("main").dataset.show = event.target.value;
  draw();
});
$("theme").addEventListener("click", (event) => {
  const order = ["system", "light", "dark"];
  const next = order[(order.indexOf(document.documentElement.dataset.theme || "system") + 1) % order.length];
  document.documentElement.dataset.theme = next;
  event.target.textContent = `Theme: ${next}`;
});

index();
draw();
restore();
