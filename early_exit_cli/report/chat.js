"use strict";
{% include "tip.js" %}

// Text of the model and of its user gets into the page as text only: textContent and dataset, never markup.
const el = id => document.getElementById(id);
const known = JSON.parse(el("known").textContent);
const [turns, message, options] = ["turns", "message", "options"].map(el);

const make = (tag, className, text = "") => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
};
const button = (words, className, act) => {
  const made = make("button", className, words);
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
};
const number = (value, digits = 0) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

// Who decided a token, in words and in looks; the words are those of the page of --html.

const deciderOf = token => token.decided_by === "head" ? `head ${token.head}` : token.decided_by;
const lookOf = decider => {
  const head = /^head (\d+)$/.exec(decider);
  return known.looks[head ? `head ${head[1] % known.heads}` : decider] ?? known.looks[known.other];
};
const visible = text => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const quoted = text => `“${visible(text)}”`;
const why = token => {
  const lines = [];
  if (token.decided_by === "head") lines.push(`after ${token.exit_layer} blocks`);
  if (token.entropy !== null) {
    const gate = token.threshold === null ? "no threshold" : `below the threshold ${token.threshold.toFixed(3)}`;
    lines.push(`entropy ${token.entropy.toFixed(3)} nats, ${gate}`);
  }
  if (token.length !== undefined) lines.push(`continues a suffix of ${token.length} tokens that occurred before`);
  return lines;
};
const wordsOfToken = (round, place, count) => {
  const token = round.tokens[place];
  const partial = !token.text && token.token_text.includes("\ufffd");
  const lines = [`${partial ? "a part of a character" : quoted(token.token_text)} by ${deciderOf(token)}`, ...why(token)];
  if (place < round.accepted) lines.push("drafted, and accepted by the backbone");
  else if (round.accepted || round.rejected.length)
    lines.push(`the backbone's own token, ${round.accepted ? `after ${round.accepted} accepted` : "nothing of the draft was accepted"}`);
  return [...lines, `round ${count}, position ${token.position}, id ${token.token_id}`].join("\n");
};
const wordsOfRejected = (round, place, count) => {
  const token = round.rejected[place];
  const verdict = place
    ? "dropped: a drafted token before it was rejected"
    : `rejected: the backbone chose ${quoted(round.tokens.at(-1).token_text)}`;
  return [`${quoted(token.token_text)} drafted by ${deciderOf(token)}`, ...why(token), verdict, `round ${count}, id ${token.token_id}`].join("\n");
};
const meanings = {
  head: "An exit head proposed it from an early block, and the model agreed.",
  eagle: "The EAGLE head proposed it, and the model agreed.",
  lookup: "It continues something that stood in the text before, and the model agreed.",
  backbone: "The model's own choice, by all of its blocks.",
};

const deciders = new Set();
const explain = decider => {
  if (deciders.has(decider)) return;
  deciders.add(decider);
  const place = name => name === "backbone" ? "~" : name;
  const row = [...deciders].sort((a, b) => place(a) < place(b) ? -1 : 1).map(name => {
    const sample = make("span", lookOf(name), name);
    sample.dataset.tip = meanings[name.split(" ")[0]] ?? "It was proposed, and the model agreed.";
    return sample;
  });
  el("deciders").replaceChildren(...row);
  document.querySelector(".legend").hidden = false;
};

// What a screen reader says: whole sentences of an answer, and what became of it.

const say = text => {
  const spoken = el("spoken");
  while (spoken.childElementCount > 30) spoken.firstChild.remove();
  spoken.append(make("p", "", text));
};
class Reader {
  waiting = "";
  push(text) {
    this.waiting += text;
    const end = /^[^]*(?:[.!?:;]\s|\n)/.exec(this.waiting);
    if (end) this.flush(end[0].length);
  }
  flush(length = this.waiting.length) {
    const text = this.waiting.slice(0, length).trim();
    this.waiting = this.waiting.slice(length);
    if (text) say(text);
  }
}

// Answers.

class Answer {
  text = "";
  rounds = 0;
  tokens = 0;
  counts = new Map();
  reader = new Reader();
  constructor(turn) {
    this.element = make("article", "answer");
    this.element.setAttribute("aria-label", "Answer");
    this.body = make("div", "text waiting");
    this.about = make("p", "about");
    this.share = make("div", "share");
    this.share.setAttribute("role", "img");
    this.share.hidden = true;
    this.tools = make("div", "tools");
    this.tools.hidden = true;
    this.tools.append(
      button("Copy", "copy", made => copy(this.text, made)),
      button("Retry", "retry", () => again(turn)),
    );
    const below = make("div", "below");
    below.append(this.share, this.about, this.tools);
    this.element.append(this.body, below);
    turns.append(this.element);
  }
  take(chunk) {
    const text = chunk.choices?.[0]?.delta?.content ?? "";
    const rounds = chunk.eexit?.rounds ?? [];
    this.started ??= rounds.length ? performance.now() : undefined;
    if (text || rounds.length) this.body.classList.remove("waiting");
    for (const round of rounds) this.draw(round);
    if (text && !rounds.length) this.body.append(text);
    this.text += text;
    this.reader.push(text);
    this.reason = chunk.choices?.[0]?.finish_reason ?? this.reason;
    this.timings = chunk.timings ?? this.timings;
    const seconds = (performance.now() - this.started) / 1000;
    if (rounds.length) this.about.textContent = `${this.tokens} tokens${seconds > 0.3 ? `, ${number(this.tokens / seconds)} tokens/s` : ""}`;
  }
  draw(round) {
    this.rounds += 1;
    const committed = round.tokens.map((token, place) => {
      const decider = deciderOf(token);
      explain(decider);
      this.counts.set(decider, (this.counts.get(decider) ?? 0) + 1);
      const made = make("span", lookOf(decider), token.text);
      made.dataset.p = token.position;
      made.dataset.tip = wordsOfToken(round, place, this.rounds);
      return made;
    });
    const struck = round.rejected.map((token, place) => {
      const made = make("del", "", visible(token.token_text));
      made.dataset.tip = wordsOfRejected(round, place, this.rounds);
      return made;
    });
    this.tokens += committed.length;
    this.body.append(...committed.slice(0, round.accepted), ...struck, ...committed.slice(round.accepted));
  }
  end(note) {
    this.body.classList.remove("waiting");
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", "Text; arrow keys say who decided each token");
    this.tools.hidden = false;
    this.describe(note);
    const parts = [...this.counts].sort((a, b) => b[1] - a[1]);
    for (const [decider, count] of parts) {
      const bar = make("i", lookOf(decider).split(" ")[1]);
      bar.style.flex = count;
      bar.dataset.tip = `${decider}: ${count} of ${this.tokens} tokens`;
      this.share.append(bar);
    }
    this.share.setAttribute("aria-label", `Tokens by who decided: ${parts.map(([name, count]) => `${name} ${count}`).join(", ")}`);
    this.share.hidden = !parts.length;
    this.reader.flush();
    say(note ? `Answer ${note}` : `Answer is whole. ${this.about.textContent}`);
  }
  describe(note) {
    const found = this.timings;
    const parts = [];
    if (found?.predicted_per_second) {
      const speed = make("span");
      speed.append(make("b", "", number(found.predicted_per_second)), " tokens/s");
      parts.push(speed);
      if (found.plain_ms && found.draft_n) {
        const times = make("span");
        times.append("plain decoding ", make("b", "", number(1000 * found.predicted_n / found.plain_ms)), " undisturbed");
        times.dataset.tip = "What plain decoding would have written in a second, by what a pass costs on this machine when nothing else runs";
        parts.push(times);
      }
      if (found.draft_n) parts.push(make("span", "", `${found.draft_n_accepted} of ${found.draft_n} drafted accepted`));
    } else if (this.tokens) parts.push(make("span", "", `${this.tokens} tokens`));
    const end = note ?? (this.reason === "length" ? "cut at the limit" : null);
    if (end) parts.push(make("span", "ended", end));
    this.about.replaceChildren(...parts.flatMap((part, place) => place ? [" · ", part] : [part]));
  }
}

const copy = async (text, made) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only pages of this machine and of https may use it
    const box = make("textarea", "unseen");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    made.focus();
  }
  made.textContent = "Copied";
  say("Copied");
  setTimeout(() => { made.textContent = "Copy"; }, 1500);
};

// Settings: in this tab only.

const STORE = "eexit";
const restore = () => {
  try {
    for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem(STORE) ?? "{}")))
      if (options.elements[name]) options.elements[name].value = value;
  } catch { /* no storage, or not ours: nothing is remembered */ }
};
const remember = () => {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(new FormData(options))));
  } catch { /* as above */ }
};
const setting = name => options.elements[name].value.trim();
const numbers = () => {
  const given = ["temperature", "top_p", "seed", "max_tokens"].filter(name => setting(name) !== "");
  return Object.fromEntries(given.map(name => [name, Number(setting(name))]));
};
const headers = () => setting("key") ? { Authorization: `Bearer ${setting("key")}` } : {};
const openSettings = name => {
  if (!el("settings").open) el("settings").showModal();
  if (name) options.elements[name].focus();
};

// What goes wrong, in one line.

// about: "key" where the server takes none or another one, "server" where it is away, "request" for all else.
class Told extends Error {
  constructor(line, about = "request") {
    super(line);
    this.about = about;
  }
}
const broken = () => new Told("The connection broke before the answer was whole.");
const away = () => new Told("The server cannot be reached.", "server");
const refusal = async response => {
  const told = await response.json().then(body => body.error?.message, () => null);
  const seconds = Number(response.headers.get("Retry-After"));
  if (response.status === 401) return new Told(setting("key") ? "The server does not take this key." : "This server asks for a key.", "key");
  if (response.status === 429) return new Told(`The server is busy: ${told ?? "others wait already"}. Try again in ${seconds || 1} s.`);
  if (response.status === 503) return new Told(`Nothing is answered now: ${told ?? "the server is not ready"}.`);
  return new Told(`Not answered: ${told ?? `the server said ${response.status}`}.`);
};
const showError = told => {
  const line = el("error");
  line.dataset.about = told.about;
  line.replaceChildren(make("span", "", told.message));
  if (told.about === "key") line.append(button("Enter the key", "", () => openSettings("key")));
  line.hidden = false;
};
const hideError = () => { el("error").hidden = true; };

// The conversation.

let conversation = { messages: [] };
let running = null;

const events = async function* (response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw broken();
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Told(`The answer broke off: ${chunk.error.message}.`);
      yield chunk;
    }
  }
};

const request = async (messages, tries, signal) => {
  const system = setting("system") ? [{ role: "system", content: options.elements.system.value }] : [];
  const asked = numbers();
  if (asked.seed !== undefined) asked.seed += tries;
  const body = { messages: [...system, ...messages], stream: true, eexit: { trace: true }, ...asked };
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  return response;
};

const setBusy = controller => {
  running = controller;
  document.body.classList.toggle("busy", controller !== null);
  el("send").setAttribute("aria-label", controller ? "Stop" : "Send");
};

// Whether there is an answer, or a part of one, to the last message.
const answer = async turn => {
  const own = conversation;
  const controller = new AbortController();
  setBusy(controller);
  hideError();
  const shown = new Answer(turn);
  follow(true);
  let note = null;
  let told = null;
  try {
    for await (const chunk of events(await request(own.messages, turn.tries, controller.signal))) {
      const follows = isAtEnd();
      shown.take(chunk);
      follow(follows);
    }
  } catch (error) {
    if (controller.signal.aborted) note = "stopped";
    else {
      note = "broke off";
      told = error instanceof Told ? error : shown.rounds ? broken() : away();
    }
  }
  if (own !== conversation) return true; // another one was begun
  setBusy(null);
  if (told) showError(told);
  const follows = isAtEnd();
  if (note && !shown.rounds) {
    shown.element.remove();
    if (!told) say("Stopped before the first token");
    return false;
  }
  shown.end(note);
  turn.shown = shown;
  own.messages.push({ role: "assistant", content: shown.text });
  follow(follows);
  return true;
};

const ask = async text => {
  el("welcome").hidden = true;
  const own = conversation;
  const question = make("article", "question", text);
  question.setAttribute("aria-label", "You");
  turns.append(question);
  own.messages.push({ role: "user", content: text });
  if (await answer({ tries: 0 })) return;
  own.messages.pop(); // it goes back to where it was typed
  question.remove();
  el("welcome").hidden = own.messages.length > 0;
  message.value = message.value ? `${text}\n\n${message.value}` : text;
  fit();
};

const again = async turn => {
  if (running) return;
  const own = conversation;
  const [before, taken] = [turn.shown, own.messages.pop()];
  before.element.remove();
  turn.tries += 1;
  if (await answer(turn)) {
    turn.shown.element.querySelector(".retry").focus();
    return;
  }
  own.messages.push(taken);
  turns.append(before.element);
};

const send = () => {
  if (running || !message.value.trim()) return;
  if (!options.checkValidity()) {
    openSettings();
    options.reportValidity();
    return;
  }
  const text = message.value;
  message.value = "";
  fit();
  ask(text);
};
const stop = () => running?.abort();

const begin = () => {
  conversation = { messages: [] };
  stop();
  setBusy(null);
  turns.replaceChildren();
  el("welcome").hidden = false;
  hideError();
  message.focus();
};

const isAtEnd = () => document.documentElement.scrollHeight - scrollY - innerHeight < 60;
const follow = follows => { if (follows) scrollTo(0, document.documentElement.scrollHeight); };
const fit = () => {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
};

// Which model answers, and whether it asks for a key.
const greet = async () => {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    showError(away());
    return;
  }
  el("needs-key").hidden = response.status !== 401;
  if (!response.ok) {
    const told = await refusal(response);
    if (told.about === "key" && !setting("key")) openSettings("key");
    else showError(told);
    return;
  }
  if (el("error").dataset.about !== "request") hideError();
  const name = (await response.json()).data[0].id;
  el("model").title = name;
  el("model").textContent = name.split("/").at(-1);
  document.title = `${el("model").textContent} – eexit`;
};

el("ask").addEventListener("submit", event => {
  event.preventDefault();
  if (running) stop();
  else send();
});
message.addEventListener("input", fit);
message.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || el("settings").open) return;
  stop();
  hideTip();
});
turns.addEventListener("keydown", event => {
  const text = event.target.closest(".text");
  if (!text || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  const all = [...text.querySelectorAll("[data-tip]")].filter(token => token.offsetWidth);
  const at = all.indexOf(event.target);
  const next = all[event.key === "ArrowRight" ? at + 1 : at < 0 ? all.length - 1 : at - 1];
  if (!next) return;
  next.tabIndex = -1;
  next.setAttribute("aria-describedby", "tip");
  next.focus();
  showTip(next);
});
turns.addEventListener("focusout", hideTip);
for (const idea of el("ideas").querySelectorAll("button"))
  idea.addEventListener("click", () => { message.value = idea.textContent; send(); message.focus(); });
el("begin").addEventListener("click", begin);
el("open").addEventListener("click", () => openSettings());
options.addEventListener("input", remember);
el("settings").addEventListener("close", () => { greet(); message.focus(); });
restore();
greet();
