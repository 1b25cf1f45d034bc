"use strict";

// Shows what happens in the conversation as it happens, and sends messages without reloading the page. Everything works
// without it: the server answers the same forms with whole pages.

const element = (id) => document.getElementById(id);
const composer = element("composer");
const field = element("message");
const dialogue = element("dialogue");
const send = composer.querySelector("button");

let last = Number(composer.dataset.after || 0);
let source = null;
let listening = Boolean(composer.dataset.events);
let writing = element("status").textContent !== "";
let waiting = writing; // whether the last entry is one that waits for its answer

// The dialogue -------------------------------------------------------------------------------------------------------

function bubble(role) {
  const item = document.createElement("li");
  const who = document.createElement("span");
  item.className = role;
  who.className = "unseen";
  who.textContent = role === "user" ? "You:" : "Assistant:";
  item.append(who, " ", document.createElement("p"));
  return item;
}

function pending() {
  return dialogue.querySelector(".pending");
}

function addEntry({ seq, role, content }) {
  if (seq <= last) return;
  last = seq;
  const item = (role === "assistant" && pending()) || bubble(role);
  item.classList.remove("pending");
  item.id = `entry-${seq}`;
  item.dataset.seq = seq;
  item.querySelector("p").textContent = content;
  dialogue.append(item);
  waiting = role === "user";
  fail("");
  setWriting(waiting);
}

function addPiece({ to, start, text }) {
  if (to !== last) return;
  let item = pending();
  if (!item) {
    item = bubble("assistant");
    item.classList.add("pending");
    dialogue.append(item);
  }
  const words = item.querySelector("p");
  words.textContent = words.textContent.slice(0, start) + text;
  setWriting(true);
}

function setWriting(now) {
  writing = now;
  element("status").textContent = now ? "The assistant is writing…" : "";
  // A screen reader reads an answer once, when it is complete, and not again with each word.
  element("log").setAttribute("aria-busy", String(now));
  send.disabled = now;
  if (!now) pending()?.remove();
}

function fail(words) {
  element("failure-words").textContent = words;
  element("failure").hidden = words === "";
  if (words) setWriting(false);
}

function complain(words) {
  element("message-problem").textContent = words;
  field.setAttribute("aria-invalid", String(words !== ""));
}

function farewell(words, label) {
  listening = false;
  source?.close();
  setWriting(false);
  element("farewell-words").textContent = words;
  element("farewell-link").textContent = label;
  element("farewell").hidden = false;
  composer.hidden = true;
}

function rename({ title }) {
  element("title").textContent = title;
  document.title = `${title} · ${document.title.split(" · ").pop()}`;
  const here = element("here");
  if (here) here.textContent = title;
}

// What the server tells ----------------------------------------------------------------------------------------------

function listen() {
  source?.close();
  // All tabs of a browser share six connections: one that nobody sees leaves its own to the others.
  if (!listening || document.hidden) return;
  // Each time from behind what the page has; the browser itself does so where the connection is lost.
  source = new EventSource(`${composer.dataset.events}?after=${last}`);
  const on = (kind, handler) => source.addEventListener(kind, (message) => handler(JSON.parse(message.data)));
  on("entry", addEntry);
  on("piece", addPiece);
  on("title", rename);
  on("problem", ({ to, words }) => to === last && (words ? fail(words) : element("failure").hidden || fail("")));
  on("signed-out", ({ words }) => farewell(words, "Sign in"));
  on("ended", ({ words }) => farewell(words, "Go on"));
  source.addEventListener("error", () => {
    // The browser comes back by itself, unless the answer was no stream, such as that of a server which is starting.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  });
}

// What the user does -------------------------------------------------------------------------------------------------

async function post(form) {
  const body = new URLSearchParams(new FormData(form));
  const response = await fetch(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
  const answer = await response.json();
  if (response.status === 401) farewell(answer.problem, "Sign in");
  return { ok: response.ok, answer };
}

async function say() {
  const text = field.value;
  const { ok, answer } = await post(composer);
  if (!ok) {
    setWriting(false);
    complain(answer.problem);
    return;
  }
  complain("");
  if (field.value === text) field.value = ""; // what was typed meanwhile stays
  composer.elements.key.value = crypto.getRandomValues(new Uint32Array(4)).join("-");
  // Behind what the page has there may be more, from another tab: then the stream tells all of it, in its order.
  if (answer.seq === last + 1) addEntry(answer);
  if (answer.seq <= last) setWriting(waiting); // sent once more, it may be answered already
  listen();
}

composer.addEventListener("submit", async (event) => {
  if (!composer.dataset.events) return; // an earlier part of the dialogue: the form leads to the latest one
  event.preventDefault();
  if (writing) return;
  fail("");
  setWriting(true);
  try {
    await say();
  } catch {
    setWriting(false);
    complain("The server cannot be reached. Please try again.");
  }
  field.focus();
});

field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  composer.requestSubmit();
});

element("again").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const { ok } = await post(event.target);
    if (!ok) return;
    fail("");
    setWriting(true);
    listen();
  } catch {
    element("failure-words").textContent = "The server cannot be reached. Please try again.";
  }
  field.focus();
});

listen();
setWriting(writing);
document.addEventListener("visibilitychange", () => (document.hidden ? source?.close() : listen()));
// What the browser keeps of a page that one comes back to is out of date.
addEventListener("pageshow", (event) => event.persisted && location.reload());
addEventListener("pagehide", () => source?.close());
