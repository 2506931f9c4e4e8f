// The page: what is in the form is sent to the server, and what the server tells is shown.

import { Mask } from "./web_mask.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
const FIRST = 24; // pictures of the gallery before "Show more"
const FLAGS = ["plain_prompt"];
const KEPT = "sd.py settings";

let about = null; // what the server says of the model and the folders
let pictures = []; // [{name, seed, prompt, text, width, height}], the newest first
let shown = FIRST; // of these
let jobs = []; // of all pages, the oldest first
let viewed = 0; // which of the pictures is large
let listening = false; // has the server told anything yet?
let server = ""; // which it is
const slots = { image: null, control: null }; // {name, size, fit} of what was uploaded
const finished = new Set(); // the numbers of jobs whose end was shown

// -------------------------------------------------------------------------------------- The server

// A page that is loaded anew is the same page; the server cancels what others have left.
const client = (sessionStorage.client ??= Array.from(
  crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0"),
).join(""));

class Problem extends Error {
  constructor(message, field = "") {
    super(message);
    this.field = field;
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Problem("The server does not answer. Is it still running?");
  }
  const told = answer.status === 204 ? null : await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw new Problem(told.message ?? `The server says ${answer.status}.`, told.field);
  }
  return told;
}

function send(path, body, type = "application/octet-stream") {
  if (body.size > about.most) {
    throw new Problem(`That is too large: at most ${about.most >> 20} MiB are taken.`);
  }
  return ask(path, { method: "POST", body, headers: { "Content-Type": type } });
}

function listen() {
  const events = new EventSource(`events?client=${client}`);
  events.onmessage = (event) => {
    tellLine("");
    const told = JSON.parse(event.data);
    if (told.server !== server) finished.clear(); // another one, which counts from 1 again
    ({ jobs, server } = told);
    showJobs();
  };
  events.onerror = () => {
    tellLine("The server does not answer; trying again…", true);
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

// ---------------------------------------------------------------------------------------- The form

const fields = () => [...form.elements].filter((each) => each.name);

function fillChoices() {
  const fill = (id, names, none) => {
    const options = names.map((name) => new Option(name, name));
    $(id).replaceChildren(...(none ? [new Option(none, "")] : []), ...options);
  };
  fill("sampler", about.samplers);
  fill("spacing", about.spacings, "the usual");
  fill("rng", about.rngs);
  fill("controlnet", about.controlnets, "none");
  $("loras").replaceChildren(...about.loras.map(makeLora));
  const where = (what) => about.folders ? `There are no ${what} in the folder.`
    : `Start the server with --folder FOLDER to choose ${what} here.`;
  if (!about.loras.length) $("loras").textContent = where("LoRAs");
  $("control_fields").hidden = !about.controlnets.length;
  $("no_control").hidden = !$("control_fields").hidden;
  $("no_control").textContent = where("ControlNets");
  $("model").textContent = `paints with ${about.model}`;
}

function makeLora(name, i) {
  const row = document.createElement("div");
  row.className = "lora";
  const label = document.createElement("label");
  label.textContent = name;
  label.htmlFor = `lora${i}`;
  const [slider, number] = ["range", "number"].map((type) => {
    const input = document.createElement("input");
    Object.assign(input, { type, min: type === "range" ? 0 : -5, max: type === "range" ? 1.5 : 5 });
    Object.assign(input, { step: 0.05, value: 0, title: "0 leaves it out" });
    return input;
  });
  slider.id = `lora${i}`;
  number.setAttribute("aria-label", `Strength of ${name}`);
  number.dataset.lora = name;
  slider.addEventListener("input", () => { number.value = slider.value; });
  number.addEventListener("input", () => { slider.value = number.value; });
  row.append(label, slider, number);
  return row;
}

// settings as the server has them; what they do not say is the model's own
async function fillForm(settings) {
  const told = { ...about.defaults, ...settings };
  for (const field of fields()) {
    if (field.type === "checkbox") field.checked = Boolean(told[field.name]);
    else field.value = told[field.name] ?? "";
  }
  for (const number of form.querySelectorAll("[data-lora]")) {
    number.value = settings.loras?.[number.dataset.lora] ?? 0;
    number.dispatchEvent(new Event("input", { bubbles: true }));
  }
  const control = settings.controlnet ?? {};
  $("controlnet").value = control.name ?? "";
  $("weight").value = control.weight ?? 1;
  setSlot("control", control.image ? { name: control.image } : null);
  setSlot("image", settings.image ? { name: settings.image } : null);
  mask.reset();
  $("partly").checked = Boolean(settings.mask);
  $("editor").hidden = !settings.mask;
  if (settings.mask) await loadMask(settings.mask);
  showForm();
}

async function loadMask(name) { // sent again as it is, unless it is changed
  const picture = new Image();
  picture.src = `inputs/${name}`;
  await Promise.all([picture.decode(), $("under").decode()]);
  mask.fit();
  mask.load(picture);
  mask.source = name;
}

// What stands beside sliders and behind the headings.
function showForm() {
  $("seed").readOnly = $("random").checked;
  for (const output of form.querySelectorAll("output[for]")) {
    output.value = $(output.htmlFor.value).value;
  }
  const loras = [...form.querySelectorAll("[data-lora]")].filter((each) => Number(each.value));
  const head = (id, text) => { $(id).querySelector("summary output").value = text; };
  head("loras_box", loras.length ? `${loras.length} used` : "");
  head("control", $("controlnet").value ? "used" : "");
  head("from", slots.image ? ($("partly").checked ? "a part of it" : "used") : "");
}

async function gather() {
  const settings = {};
  for (const field of fields()) {
    if (field.name === "strength" && !slots.image) continue;
    if (field.validity.badInput) { // what it holds is no number, and its value is empty
      throw new Problem(`${field.labels[0].textContent.trim()} must be a number.`, field.name);
    }
    if (field.type === "checkbox") settings[field.name] = field.checked;
    else if (field.value !== "" || field.name === "prompt") settings[field.name] = field.value;
  }
  if (!settings.upscale) delete settings.upscale_strength;
  if ($("random").checked) settings.seed = "-1";
  if (slots.image) {
    settings.image = slots.image.name;
    if ($("partly").checked) settings.mask = await sendMask();
  }
  for (const number of form.querySelectorAll("[data-lora]")) {
    if (Number(number.value)) (settings.loras ??= {})[number.dataset.lora] = number.value;
  }
  if ($("controlnet").value) {
    if (!slots.control) throw new Problem("Choose what the ControlNet is to follow.", "controlnet");
    const [name, weight] = [$("controlnet").value, $("weight").value || 1];
    settings.controlnet = { name, weight, image: slots.control.name };
  }
  return settings;
}

async function sendMask() {
  if (mask.empty()) {
    throw new Problem("Nothing is brushed yet: brush over what is to be painted anew.", "mask");
  }
  mask.source ??= (await send("inputs", await mask.blob())).name;
  return mask.source;
}

async function paint() {
  clearProblems();
  try {
    const body = JSON.stringify({ settings: await gather(), client });
    const told = await send("jobs", body, "application/json");
    if ($("random").checked) $("seed").value = told.seed;
    showNotes(told.notes);
  } catch (problem) {
    showProblem(problem);
  }
}

function keepForm() {
  const value = (field) => field.type === "checkbox" ? field.checked : field.value;
  const settings = Object.fromEntries(fields().map((field) => [field.name, value(field)]));
  localStorage.setItem(KEPT, JSON.stringify({ model: about.model, settings }));
}

function keptForm() { // of the same model, or else only what was to be painted
  try {
    const { model, settings } = JSON.parse(localStorage.getItem(KEPT)) ?? {};
    const { prompt, negative_prompt } = settings ?? {};
    return model === about.model ? settings : { ...(settings && { prompt, negative_prompt }) };
  } catch {
    return {};
  }
}

// ------------------------------------------------------------------------ What is wrong, and notes

function showProblem(problem) {
  if (!(problem instanceof Problem)) throw problem;
  const field = form.querySelector(`[name="${CSS.escape(problem.field || "-")}"]`);
  const place = form.querySelector(`.problem[data-for~="${CSS.escape(problem.field || "-")}"]`)
    ?? (field && problemBeside(field)) ?? $("error");
  place.textContent = capital(problem.message);
  const box = place.closest("details");
  if (box) box.open = true;
  if (place === $("error")) return;
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
  place.scrollIntoView({ block: "nearest" });
}

function problemBeside(field) {
  const box = field.closest(".row") ?? field.closest(".field, .check");
  const place = document.createElement("p");
  place.className = "problem made";
  place.id = `${field.id}_problem`;
  place.setAttribute("role", "alert");
  field.setAttribute("aria-errormessage", place.id);
  box.after(place);
  return place;
}

function clearProblems() {
  for (const place of document.querySelectorAll(".problem.made")) place.remove();
  for (const place of document.querySelectorAll("p.problem")) place.textContent = "";
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}

const capital = (text) => /^[a-z]+ /.test(text) ? text[0].toUpperCase() + text.slice(1) : text;

function showNotes(notes) {
  $("notes").replaceChildren(...[...new Set(notes)].map((note) => {
    const item = document.createElement("li");
    item.textContent = capital(note);
    return item;
  }));
}

function tellLine(text, problem = false) {
  if ($("line").textContent !== text) $("line").textContent = text;
  $("line").classList.toggle("problem", problem);
}

// -------------------------------------------------------------------------- Pictures to begin with

function setSlot(name, told) {
  slots[name] = told;
  const box = document.querySelector(`[data-slot=${name}]`);
  box.querySelector("img")?.remove();
  box.querySelector(".clear").hidden = !told;
  if (told) {
    const img = new Image();
    img.src = `inputs/${told.name}`;
    img.alt = name === "image" ? "What it begins with" : "What it is to follow";
    box.prepend(img);
    box.closest("details").open = true;
  }
  if (name === "image") {
    $("with_image").hidden = !told;
    if (told) $("under").src = `inputs/${told.name}`;
    if (told?.fit) [$("width").value, $("height").value] = told.fit;
  }
  showForm();
}

async function uploadTo(name, file) {
  clearProblems();
  try {
    const told = await send("inputs", file);
    if (name === "image") mask.reset();
    setSlot(name, told);
  } catch (problem) {
    problem.field = name === "image" ? "image" : "controlnet";
    showProblem(problem);
  }
}

async function makeAgain(path, file) {
  clearProblems();
  try {
    const told = await (file ? send(path, file) : ask(path));
    await fillForm(told.settings);
    $("random").checked = told.settings.seed === undefined;
    showForm();
    keepForm();
    showNotes([...told.notes, "The settings are the picture's. Paint makes it again."]);
    $("paint").focus();
    $("paint").scrollIntoView({ block: "center" });
  } catch (problem) {
    problem.field = "";
    showProblem(problem);
  }
}

// --------------------------------------------------------------------------------- What is painted

function showJobs() {
  const waiting = jobs.filter((job) => job.place);
  const mine = jobs.filter((job) => job.mine);
  showQueue(waiting);
  for (const job of jobs) {
    if (job.place || finished.has(job.number)) continue;
    finished.add(job.number);
    if (!job.mine || !listening) continue; // what was over before is no news
    showNotes(job.notes);
    if (job.state === "failed") showProblem(new Problem(job.message, job.field));
    tellLine(`${describe(job)}.`);
  }
  listening = true;
  const job = mine.find((each) => each.place) ?? waiting[0] ?? mine.at(-1);
  if (job) showStage(job);
  const names = new Set(pictures.map((picture) => picture.name));
  if (jobs.some((each) => each.pictures.some((name) => !names.has(name)))) loadPictures();
}

function showStage(job) {
  const was = $("stage").hidden && job.place;
  $("stage").hidden = !job.place && !job.pictures.length; // the line at the top says the rest
  $("stage").dataset.job = job.number;
  $("stage").dataset.state = job.state;
  const sources = job.pictures.length && !job.place
    ? job.pictures.map((name) => `pictures/${encodeURIComponent(name)}`) : job.previews;
  const sheet = $("stage").querySelector(".sheet");
  const another = sheet.dataset.job !== String(job.number);
  if (sources.length || job.place || another || sheet.querySelector(".blank")) {
    fillSheet(sheet, job, sources);
  }
  const bar = $("stage").querySelector("progress");
  bar.max = job.steps || 1;
  if (job.state === "waiting" || job.state === "loading") bar.removeAttribute("value");
  else bar.value = job.state === "done" ? bar.max : job.step;
  bar.hidden = !job.place;
  $("cancel").hidden = !job.place;
  $("cancel").disabled = job.cancelled;
  $("progress").textContent = describe(job);
  if (was) $("stage").scrollIntoView({ block: "nearest" });
}

function fillSheet(sheet, job, sources) {
  sheet.dataset.job = job.number;
  if (sources.length !== sheet.querySelectorAll("img").length || !sources.length) {
    const room = job.place ? [blank()] : [];
    sheet.replaceChildren(...(sources.length ? sources.map(() => new Image()) : room));
  }
  sheet.querySelectorAll("img").forEach((img, i) => {
    img.src = sources[i];
    img.alt = job.place ? `Preview at step ${job.step}` : `Picture ${i + 1}: ${job.prompt}`;
  });
}

function blank() { // as large as the picture will be
  const box = document.createElement("div");
  box.className = "blank";
  box.style.aspectRatio = `${$("width").value || 1} / ${$("height").value || 1}`;
  return box;
}

function describe(job) {
  if (job.cancelled && job.place) return "Stopping…";
  const left = job.left === null || !job.step ? "" : ` · ${duration(job.left)} left`;
  return {
    waiting: job.place > 1 ? `Place ${job.place} in the queue` : "About to begin",
    loading: "Loading",
    painting: `Step ${job.step} of ${job.steps}${left}`,
    decoding: "Decoding",
    done: `Painted; seed ${job.seed}`,
    cancelled: "Cancelled",
    failed: "It was not painted",
  }[job.state];
}

const duration = (s) => s < 90 ? `${Math.ceil(s)} s` : s < 5400 ? `${Math.round(s / 60)} min`
  : `${(s / 3600).toFixed(1)} h`;

function showQueue(waiting) {
  $("queue").hidden = waiting.length < 2;
  const told = waiting.map((job) => `${job.number} ${job.place}`).join();
  if ($("queue").dataset.told === told) return; // who is on one of its buttons stays there
  $("queue").dataset.told = told;
  $("queue").querySelector("ol").replaceChildren(...waiting.map((job) => {
    const item = document.createElement("li");
    const what = document.createElement("span");
    what.className = "what";
    what.textContent = job.prompt || "(no prompt)";
    const place = document.createElement("span");
    place.className = "place";
    const where = job.place === 1 ? "being painted" : job.place;
    place.textContent = job.mine ? `yours, ${where}` : where;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "small";
    button.textContent = "Cancel";
    button.setAttribute("aria-label", `Cancel place ${job.place}`);
    button.addEventListener("click", () => cancel(job.number));
    item.append(place, what, button);
    return item;
  }));
}

function cancel(number) {
  ask(`jobs/${number}`, { method: "DELETE" }).catch(showProblem);
}

// ------------------------------------------------------------------------------------- The gallery

async function loadPictures() {
  try {
    pictures = await ask("pictures");
  } catch (problem) {
    showProblem(problem);
  }
  showGallery();
}

function showGallery() {
  const list = $("gallery").querySelector("ul");
  const old = new Map([...list.children].map((item) => [item.dataset.name, item]));
  const some = pictures.slice(0, shown);
  list.replaceChildren(...some.map((picture) => old.get(picture.name) ?? makeThumb(picture)));
  $("gallery").querySelector(".empty").hidden = pictures.length > 0;
  $("show_more").hidden = pictures.length <= shown;
}

const source = (picture) => `pictures/${encodeURIComponent(picture.name)}`;

function makeThumb(picture) {
  const item = document.createElement("li");
  item.dataset.name = picture.name;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "thumb";
  const img = new Image();
  const alt = picture.prompt || picture.name;
  Object.assign(img, { src: source(picture), loading: "lazy", alt });
  button.append(img);
  button.addEventListener("click", () => view(pictures.findIndex((p) => p.name === picture.name)));
  const under = document.createElement("div");
  under.className = "under";
  const seed = document.createElement("span");
  seed.textContent = picture.seed === "" ? picture.name : `seed ${picture.seed}`;
  const link = document.createElement("a");
  Object.assign(link, { href: source(picture), download: picture.name, textContent: "Save" });
  link.setAttribute("aria-label", `Download ${picture.name}`);
  under.append(seed, link);
  item.append(button, under);
  return item;
}

function view(i) {
  viewed = Math.min(Math.max(0, i), pictures.length - 1);
  const picture = pictures[viewed];
  const viewer = $("viewer");
  Object.assign(viewer.querySelector("img"), { src: source(picture), alt: picture.prompt });
  viewer.querySelector(".caption").textContent = picture.name;
  viewer.querySelector("pre").textContent = picture.text || "It does not say how it was made.";
  Object.assign($("download"), { href: source(picture), download: picture.name });
  $("reuse").disabled = !picture.text;
  $("previous").disabled = viewed === 0;
  $("next").disabled = viewed === pictures.length - 1;
  if (!viewer.open) viewer.showModal();
}

async function beginWith(picture) {
  $("viewer").close();
  const answer = await fetch(source(picture));
  await uploadTo("image", await answer.blob());
}

// --------------------------------------------------------------------------------- What is pressed

const mask = new Mask($("mask"), $("under"), () => {
  mask.source = null;
  $("brush").value = mask.size;
  showForm();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  paint();
});
form.addEventListener("input", () => {
  showForm();
  keepForm();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("viewer").open) {
    event.preventDefault();
    paint();
  }
});
for (const id of ["image", "control"]) {
  const input = $(`${id}_file`);
  input.addEventListener("change", () => {
    if (input.files[0]) uploadTo(id, input.files[0]);
    input.value = "";
  });
  const remove = document.querySelector(`[data-slot=${id}] .clear`);
  remove.addEventListener("click", () => setSlot(id, null));
}
$("again").addEventListener("change", () => {
  if ($("again").files[0]) makeAgain("settings", $("again").files[0]);
  $("again").value = "";
});
$("partly").addEventListener("change", () => {
  $("editor").hidden = !$("partly").checked;
  $("strength").value = $("partly").checked ? 1 : 0.75; // as the command line has it
  mask.fit();
});
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => {
    mask.tool = button.dataset.tool;
    for (const each of document.querySelectorAll("[data-tool]")) {
      each.setAttribute("aria-pressed", each === button);
    }
  });
}
$("undo").addEventListener("click", () => mask.undo());
$("invert").addEventListener("click", () => mask.add("invert"));
$("clear").addEventListener("click", () => mask.add("clear"));
$("brush").addEventListener("input", () => { mask.size = Number($("brush").value); });
$("swap").addEventListener("click", () => {
  [$("width").value, $("height").value] = [$("height").value, $("width").value];
  keepForm();
});
$("reset").addEventListener("click", () => {
  fillForm({ prompt: $("prompt").value, negative_prompt: $("negative_prompt").value });
  keepForm();
});
$("cancel").addEventListener("click", () => cancel($("stage").dataset.job));
$("show_more").addEventListener("click", () => {
  shown += FIRST;
  showGallery();
});
$("close").addEventListener("click", () => $("viewer").close());
$("previous").addEventListener("click", () => view(viewed - 1));
$("next").addEventListener("click", () => view(viewed + 1));
$("viewer").addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (way) view(viewed + way);
});
$("reuse").addEventListener("click", () => {
  $("viewer").close();
  makeAgain(`${source(pictures[viewed])}/settings`);
});
$("begin").addEventListener("click", () => beginWith(pictures[viewed]));

const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
const slotOf = (event) => event.target.closest?.(".drop");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  const box = slotOf(event);
  for (const each of document.querySelectorAll(".drop")) {
    each.classList.toggle("over", each === box);
  }
  $("dropping").hidden = Boolean(box);
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) endDrag();
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  endDrag();
  const [file] = event.dataTransfer.files;
  const box = slotOf(event);
  if (file && box) uploadTo(box.dataset.slot, file);
  else if (file) makeAgain("settings", file);
});

function endDrag() {
  $("dropping").hidden = true;
  for (const each of document.querySelectorAll(".drop")) each.classList.remove("over");
}

// --------------------------------------------------------------------------------------- It begins

try {
  about = await ask("about");
  fillChoices();
  await fillForm(keptForm());
  listen();
  await loadPictures();
} catch (problem) {
  showProblem(problem);
}
