"use strict";

// Sends a message without reloading the page, so that the dialogue does not flicker and a screen reader hears what is
// new. Everything works without it: the server answers the same form with the same page.

const form = document.getElementById("composer");
const field = document.getElementById("message");
const problem = document.getElementById("message-problem");
const dialogue = document.getElementById("dialogue");
const button = form.querySelector("button");

async function send() {
  const response = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  if (!page.getElementById("dialogue")) {
    location.assign(new URL(".", form.action)); // signed out meanwhile, or an error: the server says which
    return;
  }
  takeOver(page);
}

function takeOver(page) {
  const messages = [...page.getElementById("dialogue").children];
  if (messages.length <= dialogue.children.length) dialogue.replaceChildren(...messages);
  else dialogue.append(...messages.slice(dialogue.children.length));
  field.value = page.getElementById("message").value;
  complain(page.getElementById("message-problem").textContent);
}

function complain(words) {
  problem.textContent = words;
  field.setAttribute("aria-invalid", String(words !== ""));
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (button.disabled) return;
  button.disabled = true;
  try {
    await send();
  } catch {
    complain("The server cannot be reached. Please try again.");
  }
  button.disabled = false;
  field.focus();
});
