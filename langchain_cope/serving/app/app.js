// The page of `cope-lc serve --app`: two answers side by side, and the user's own voice from texts
// to versions. It calls the server's public routes and nothing else; what the model wrote is only
// ever set as text.

const byId = (id) => document.getElementById(id);
const MEASURES = { nll: "NLL ↓", rouge1: "ROUGE-1 ↑", rougeL: "ROUGE-L ↑" };
const state = {
  key: sessionStorage.getItem("cope-key") ?? "",
  model: null,
  user: "",
  turns: [], // {question, seed, base: Answer, own: Answer, element}
  running: new Set(), // AbortControllers of the answers that are being written
  job: null, // {id, abort}
  alphaIsChosen: false, // by hand; until then the version's recommendation holds
};

// --- The server -------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(method, path, body, signal) {
  const headers = {};
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const message = problem.error?.message ?? `The server answered ${response.status}.`;
  if (response.status === 401) askForKey();
  throw new ServerError(response.status, message);
}

const call = async (method, path, body) => (await send(method, path, body)).json();
const ofUser = (path) => `${path}?user=${encodeURIComponent(state.user)}`;

/** Yield the events of a stream of server-sent events: {event, data}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/);
      const field = (name) =>
        lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
      const data = field("data").join("\n");
      if (data && data !== "[DONE]") yield { event: field("event")[0] ?? "message", data: JSON.parse(data) };
    }
  }
}

// --- What is said to people -------------------------------------------------------------------

function say(text, isProblem = false) {
  const status = byId("status");
  status.textContent = text;
  status.classList.toggle("problem", isProblem);
}

/** Run an action of the user's; show what went wrong, if something did. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

function askForKey() {
  const dialog = byId("key-dialog");
  if (!dialog.open) dialog.showModal();
}

const element = (name, text, className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

// --- Words coloured by reward -----------------------------------------------------------------

const alpha = () => Number(byId("alpha").value);

/** Return the words of an answer, each with the mean log-probabilities of its tokens. */
function wordsOf(pieces) {
  const words = [];
  for (const piece of pieces) {
    for (const text of piece.text.split(/(?<=\s)(?=\S)/)) {
      const last = words.at(-1);
      if (last && !/\s$/.test(last.text)) {
        last.text += text;
        last.tokens.push(...piece.tokens);
      } else {
        words.push({ text, tokens: [...piece.tokens] });
      }
    }
  }
  return words;
}

/** Return the mean reward of tokens, log p_user − α · log p_base, in nats. */
function rewardOf(tokens) {
  const rewards = tokens.map((token) => token.user - alpha() * token.base);
  return rewards.reduce((sum, reward) => sum + reward, 0) / (rewards.length || 1);
}

/** Show an answer's text, its words coloured by how far their reward lies from the answer's mean. */
function paint(answer) {
  const target = answer.element.querySelector(".text");
  const isColoured = byId("show-colours").checked && answer.pieces.some((piece) => piece.tokens.length);
  if (!isColoured) {
    target.textContent = answer.pieces.map((piece) => piece.text).join("");
    return;
  }
  const words = wordsOf(answer.pieces).map((word) => ({ ...word, reward: rewardOf(word.tokens) }));
  const scored = words.filter((word) => word.tokens.length);
  const mean = scored.reduce((sum, word) => sum + word.reward, 0) / scored.length;
  const spread = Math.max(0.25, ...scored.map((word) => Math.abs(word.reward - mean)));
  target.replaceChildren(
    ...words.flatMap((word) => {
      const share = word.tokens.length ? (word.reward - mean) / spread : 0;
      const level = Math.min(3, Math.floor(Math.abs(share) * 4));
      const kind = level ? `word ${share > 0 ? "user" : "base"}-${level}` : "word";
      const shown = element("span", word.text.trimEnd(), kind);
      if (word.tokens.length) shown.title = `reward ${word.reward.toFixed(2)} nats`;
      return [shown, word.text.slice(shown.textContent.length)];
    }),
  );
}

function repaint() {
  byId("alpha-value").textContent = alpha().toFixed(2);
  byId("legend").hidden = !byId("show-colours").checked;
  for (const turn of state.turns) paint(turn.own);
}

// --- Chat -------------------------------------------------------------------------------------

const textOf = (answer) => answer.pieces.map((piece) => piece.text).join("");

/** Return the messages that lead to turn number `index`, as one side of the chat saw them. */
function messagesUntil(index, side) {
  const messages = [];
  for (const turn of state.turns.slice(0, index)) {
    messages.push({ role: "user", content: turn.question });
    messages.push({ role: "assistant", content: textOf(turn[side]) });
  }
  return [...messages, { role: "user", content: state.turns[index].question }];
}

function addTurn(question) {
  const shown = byId("turn-template").content.firstElementChild.cloneNode(true);
  shown.querySelector(".question").textContent = question;
  shown.querySelector(".own h3").textContent = state.user ? `As ${state.user}` : "As you: choose a name first";
  const turn = {
    question,
    seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1,
    base: { pieces: [], element: shown.querySelector(".base") },
    own: { pieces: [], element: shown.querySelector(".own") },
  };
  shown.querySelector(".like").addEventListener("click", () => attempt(() => rate(turn, true)));
  shown.querySelector(".dislike").addEventListener("click", () => attempt(() => rate(turn, false)));
  shown.querySelector(".correct").addEventListener("click", () => openEdit(turn));
  state.turns.push(turn);
  byId("turns").append(shown);
  byId("welcome").hidden = true;
}

/** Let one side answer turn number `index`, in place of what it answered before. */
async function answer(index, side) {
  const turn = state.turns[index];
  const shown = turn[side];
  shown.abort?.abort();
  const abort = new AbortController();
  shown.abort = abort;
  state.running.add(abort);
  showRunning();
  const text = shown.element.querySelector(".text");
  const facts = shown.element.querySelector(".facts");
  shown.pieces = [];
  text.replaceChildren();
  text.className = "text writing";
  facts.textContent = "";
  const request = {
    model: state.model,
    messages: messagesUntil(index, side),
    stream: true,
    seed: turn.seed,
    cope: {},
  };
  if (side === "base") {
    request.cope.adapter_scale = 0;
  } else {
    Object.assign(request, { user: state.user, logprobs: true });
    if (state.alphaIsChosen) request.cope.alpha = alpha();
  }
  try {
    const response = await send("POST", "/v1/chat/completions", request, abort.signal);
    for await (const { data } of events(response)) {
      if (data.error) throw new ServerError(0, data.error.message);
      readChunk(shown, data, side);
    }
    if (side === "own") shown.element.querySelector(".feedback").hidden = false;
  } catch (error) {
    if (error.name === "AbortError") {
      if (shown.abort === abort) facts.textContent = "Stopped.";
    } else {
      text.classList.add("problem");
      text.textContent = error.message;
    }
  } finally {
    state.running.delete(abort);
    if (shown.abort === abort) text.classList.remove("writing");
    showRunning();
  }
}

function readChunk(shown, chunk, side) {
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content ?? "";
  const tokens = (choice?.logprobs?.content ?? [])
    .filter((token) => token.log_p_base !== undefined && token.log_p_base !== null)
    .map((token) => ({ user: token.logprob, base: token.log_p_base }));
  if (text || tokens.length) {
    shown.pieces.push({ text, tokens });
    paint(shown);
  }
  if (chunk.cope && side === "own") {
    shown.element.querySelector(".facts").textContent = factsOf(chunk.cope);
    if (!chunk.cope.adapter_version) {
      for (const piece of shown.pieces) piece.tokens = []; // the base's words lean to nobody
      paint(shown);
    }
  }
}

function factsOf({ adapter_version: version, alpha: used, relevance }) {
  if (relevance === 0) return "Unlike the prompts of your texts: this is the base model.";
  if (!version) return "No version of yours yet: this is the base model.";
  const share = relevance < 1 && relevance !== null ? `, adapter at ${100 * relevance} %` : "";
  return `Version ${version}, α ${used}${share}`;
}

function showRunning() {
  byId("stop").disabled = state.running.size === 0;
}

async function ask(question) {
  if (!state.model) await start();
  addTurn(question);
  const index = state.turns.length - 1;
  byId("turns").lastElementChild.scrollIntoView({ block: "nearest" });
  const sides = state.user ? ["base", "own"] : ["base"];
  await Promise.all(sides.map((side) => answer(index, side)));
}

function newChat() {
  for (const abort of state.running) abort.abort();
  state.turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
}

// --- Feedback ---------------------------------------------------------------------------------

const promptOf = (turn) => messagesUntil(state.turns.indexOf(turn), "own");

async function addRows(rows) {
  await call("POST", "/v1/history", { user: state.user, rows });
  await showTexts();
}

async function rate(turn, isLiked) {
  await addRows([{ prompt: promptOf(turn), answer: textOf(turn.own), score: isLiked ? 1 : 0 }]);
  turn.own.element.querySelector(".facts").textContent = isLiked
    ? "Kept: more like this."
    : "Kept: less like this.";
}

let edited = null;

function openEdit(turn) {
  edited = turn;
  byId("edit").value = textOf(turn.own);
  byId("edit-dialog").showModal();
}

async function saveEdit() {
  const text = byId("edit").value.trim();
  const before = textOf(edited.own);
  if (!text || text === before.trim()) return;
  await addRows([{ prompt: promptOf(edited), answer: before, correction: text }]);
  edited.own.pieces = [{ text, tokens: [] }];
  paint(edited.own);
  edited.own.element.querySelector(".facts").textContent = "Corrected by you. Personalize again to learn from it.";
}

// --- The user, the texts, the versions --------------------------------------------------------

async function useName(name) {
  newChat();
  state.user = name;
  state.alphaIsChosen = false;
  state.job?.abort.abort();
  byId("user").value = name;
  byId("result").replaceChildren();
  if (!name) {
    byId("texts-count").textContent = "Choose a name first.";
    return;
  }
  await Promise.all([showTexts(), showVersions(), findJob()]);
  say(`You write as ${name}.`);
}

async function showUsers() {
  const users = await call("GET", "/v1/users").catch(() => ({ data: [] }));
  byId("users").replaceChildren(
    ...users.data.map((user) => {
      const option = document.createElement("option");
      option.value = user.id;
      return option;
    }),
  );
  const known = users.data.find((user) => user.has_adapter);
  if (known && !state.user) await useName(known.id);
}

async function showTexts() {
  const user = state.user;
  const { items } = await call("GET", ofUser("/v1/history"));
  if (state.user !== user) return;
  byId("texts-count").textContent = items === 1 ? "1 text of yours is kept." : `${items} texts of yours are kept.`;
}

async function addTexts(text, user) {
  const { added } = await call("POST", "/v1/history", { user, text });
  byId("texts").value = "";
  await showTexts();
  say(added === 1 ? "1 text was added." : `${added} texts were added.`);
}

async function showVersions() {
  const user = state.user;
  const { data, recommended } = await call("GET", ofUser("/v1/adapters"));
  if (state.user !== user) return;
  byId("rollback").disabled = data.length < 2;
  if (recommended?.alpha !== undefined && !state.alphaIsChosen) {
    byId("alpha").value = recommended.alpha;
    repaint();
  }
  const shown = data.map((version) => {
    const item = element("li", "", version.active ? "active" : "");
    const when = new Date(version.created).toLocaleString();
    item.append(element("span", version.active ? `${when} (in use)` : when));
    if (version.reason) item.append(element("span", version.reason));
    if (!version.active) {
      const button = element("button", "Use this one");
      button.type = "button";
      button.setAttribute("aria-label", `Use the version of ${when}`);
      button.addEventListener("click", () => attempt(() => change("activate", { version: version.version })));
      item.append(button);
    }
    return item;
  });
  byId("versions").replaceChildren(...(shown.length ? shown : [element("li", "None yet.")]));
}

async function change(action, body) {
  await call("POST", `/v1/adapters/${action}`, { user: state.user, ...body });
  await showVersions();
  say("The next answer comes from the version in use.");
}

async function erase() {
  const name = state.user;
  await call("POST", "/v1/erase", { user: name, confirm: byId("erase-confirm").value });
  if (state.user === name) {
    await useName("");
    byId("versions").replaceChildren(element("li", "None yet."));
  }
  await showUsers();
  say(`Everything of ${name} is erased.`);
}

// --- Personalizing ----------------------------------------------------------------------------

async function train() {
  needsName();
  const user = state.user;
  const job = await call("POST", "/v1/personalize", { user });
  if (state.user === user) await follow(job.id);
}

/** Go on following the job that runs for this user, if one does. */
async function findJob() {
  const user = state.user;
  const { data } = await call("GET", ofUser("/v1/personalize"));
  if (state.user !== user) return;
  const live = data.find((job) => job.status === "queued" || job.status === "running");
  if (live) attempt(() => follow(live.id));
  else if (data[0]) showOutcome(data[0]);
}

async function follow(id) {
  const abort = new AbortController();
  state.job = { id, abort };
  showTraining(true);
  byId("result").replaceChildren();
  byId("stage").textContent = "Waiting";
  byId("progress").removeAttribute("value");
  try {
    const response = await send("GET", `/v1/personalize/${id}/events`, undefined, abort.signal);
    for await (const { event, data } of events(response)) {
      if (event === "end") await showResult(data);
      else showProgress(data);
    }
  } finally {
    if (state.job?.id === id) {
      state.job = null;
      showTraining(false);
    }
  }
}

function showTraining(isRunning) {
  byId("train").disabled = isRunning;
  byId("cancel").hidden = !isRunning;
  byId("training").hidden = !isRunning;
}

function showProgress({ status, label, step, total, seconds_left: left }) {
  if (status === "queued") return;
  const time = left ? `, about ${Math.ceil(left)} s left` : "";
  byId("stage").textContent = total ? `${label}: ${step} of ${total}${time}` : label;
  if (total) byId("progress").value = step / total;
  else byId("progress").removeAttribute("value");
}

async function showResult(job) {
  showOutcome(job);
  await Promise.all([showVersions(), showTexts()]);
}

/** Say how a training ended: its voice score, whether it was published and why, its report. */
function showOutcome({ status, result, error }) {
  const shown = byId("result");
  shown.replaceChildren();
  if (status === "cancelled") {
    shown.append(element("p", "Cancelled. Nothing was published."));
  } else if (status === "failed") {
    shown.append(element("p", error?.message ?? "It failed.", "problem"));
  } else {
    if (typeof result.voice === "number") {
      const points = Math.abs(100 * result.voice).toFixed(1);
      const which = result.voice < 0 ? "less" : "more";
      const text = `${points} points ${which} like your own texts than the base`;
      shown.append(element("p", text, "score"));
    }
    shown.append(element("p", result.published ? "Published. Ask something." : "Not published."));
    shown.append(element("p", result.reason));
    const open = element("button", "Open the report");
    open.type = "button";
    open.addEventListener("click", () => openReport(result));
    shown.append(open);
  }
}

/** Show what a training found: figures, how strongly the version acts, notes, answers side by side. */
function openReport(result) {
  const { voice, voice_note: note, verdict, recommended, metrics, notes, samples } = result;
  const score = typeof voice === "number" ? `${voice.toFixed(3)}: ${note}` : `none: ${note}`;
  const lines = [result.reason, verdict?.advice, strengthOf(recommended), `Voice: ${score}`];
  byId("report").replaceChildren(
    ...lines.filter(Boolean).map((line) => element("p", line)),
    metricsTable(metrics),
    ...notes.map((line) => element("p", line, "quiet")),
    ...samples.slice(0, 5).flatMap(sampleOf),
  );
  byId("report-dialog").showModal();
}

function strengthOf(recommended) {
  if (!recommended) return "";
  const { alpha, tau, adapter_scale: scale, why } = recommended;
  return `Recommended: α ${alpha}, τ ${tau}, adapter scale ${scale} (${why})`;
}

function sampleOf({ prompt, reference, base, cope }) {
  const texts = [["You wrote", reference], ["Base model", base], ["In your voice", cope]];
  const list = document.createElement("dl");
  for (const [who, text] of texts) list.append(element("dt", who), element("dd", text, "text"));
  return [element("h3", prompt.at(-1)?.content ?? ""), list];
}

function metricsTable(metrics) {
  const had = new Set(Object.values(metrics).flatMap(Object.keys));
  const measures = Object.keys(MEASURES).filter((name) => had.has(name));
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  const heading = (text, scope) => Object.assign(element("th", text), { scope });
  const names = measures.map((name) => MEASURES[name]);
  head.append(...["way", ...names].map((name) => heading(name, "col")));
  const body = table.createTBody();
  for (const [way, figures] of Object.entries(metrics)) {
    const row = body.insertRow();
    row.append(heading(way, "row"));
    for (const name of measures) row.append(element("td", figures[name]?.toFixed(3) ?? "–"));
  }
  return table;
}

// --- Wiring -----------------------------------------------------------------------------------

function needsName() {
  if (state.user) return;
  byId("user").focus();
  throw new Error("Choose a name first.");
}

function onSubmit(id, action) {
  byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
    attempt(action);
  });
}

const onClick = (id, action) => byId(id).addEventListener("click", () => attempt(action));

onSubmit("user-form", () => useName(byId("user").value.trim()));
onSubmit("ask", async () => {
  const question = byId("question").value.trim();
  if (!question) return;
  byId("question").value = "";
  say("");
  await ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
onClick("stop", async () => state.running.forEach((abort) => abort.abort()));
onClick("new-chat", async () => newChat());

byId("alpha").addEventListener("input", repaint);
byId("alpha").addEventListener("change", () => {
  state.alphaIsChosen = true;
  const last = state.turns.length - 1;
  if (last >= 0 && state.user) attempt(() => answer(last, "own"));
});
byId("show-colours").addEventListener("change", repaint);

onSubmit("texts-form", async () => {
  needsName();
  if (byId("texts").value.trim()) await addTexts(byId("texts").value, state.user);
});
byId("texts-file").addEventListener("change", (event) =>
  attempt(async () => {
    needsName();
    const { user } = state;
    const [file] = event.target.files;
    if (file) await addTexts(await file.text(), user);
    event.target.value = "";
  }),
);

onClick("train", train);
onClick("cancel", async () => {
  if (state.job) await call("POST", `/v1/personalize/${state.job.id}/cancel`);
});
onClick("rollback", () => change("rollback", {}));

onClick("erase", async () => {
  needsName();
  byId("erase-name").textContent = state.user;
  byId("erase-confirm").value = "";
  byId("erase-dialog").showModal();
});
onClick("erase-no", async () => byId("erase-dialog").close());
onSubmit("erase-form", erase);
onClick("report-close", async () => byId("report-dialog").close());
onClick("edit-no", async () => byId("edit-dialog").close());
onSubmit("edit-form", saveEdit);

onSubmit("key-form", async () => {
  state.key = byId("key").value.trim();
  sessionStorage.setItem("cope-key", state.key);
  byId("key").value = "";
  await start();
});

async function start() {
  const { data } = await call("GET", "/v1/models");
  state.model = data[0].id;
  await showUsers();
}

repaint();
attempt(start);
