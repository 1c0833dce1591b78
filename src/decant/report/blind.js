"use strict";
const data = JSON.parse(document.getElementById("pairs").textContent);
const found = (id) => document.getElementById(id);
const kept = "decant-blind-" + data.page;
const choices = { left: "left", right: "right", tie: "tie" };
let votes = new Array(data.pairs.length).fill(null);
let at = 0;

// A page opened as a file may have no storage: then votes last as long as the page.
function load() {
  try {
    const before = JSON.parse(localStorage.getItem(kept) || "[]");
    if (before.length === votes.length) votes = before.map((vote) => choices[vote] || null);
  } catch (error) { /* begin anew */ }
  at = votes.indexOf(null);
  if (at < 0) at = votes.length;
}

function save() {
  try { localStorage.setItem(kept, JSON.stringify(votes)); } catch (error) { /* see above */ }
}

function ballot() {
  const cast = votes.map((choice, pair) => ({ pair, choice })).filter((vote) => vote.choice);
  return JSON.stringify({ page: data.page, votes: cast }, null, 1);
}

function show() {
  const given = votes.filter(Boolean).length;
  const over = at >= data.pairs.length;
  found("voting").hidden = over;
  found("bar").value = given;
  found("count").textContent = given + " of " + data.pairs.length;
  found("back").disabled = at === 0;
  found("end").hidden = given === 0;
  found("thanks").textContent = given === data.pairs.length
    ? "All pairs are decided. Save your votes and hand them in."
    : "You can save what you have decided so far.";
  found("text").value = ballot();
  if (over) return;
  const pair = data.pairs[at];
  found("prompt").textContent = pair.prompt;
  for (const side of ["left", "right"]) {
    const image = found(side + "-picture");
    image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
    image.src = pair[side];
    found(side).setAttribute("aria-pressed", votes[at] === side);
  }
}

function choose(choice) {
  if (at >= data.pairs.length) return;
  votes[at] = choice;
  at += 1;
  save();
  show();
}

function back() {
  at = Math.max(0, at - 1);
  show();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ballot()], { type: "application/json" }));
  link.download = "votes.json";
  link.click();
}

async function copy() {
  found("text").select();
  try { await navigator.clipboard.writeText(ballot()); } catch (error) { document.execCommand("copy"); }
  found("copied").hidden = false;
}

for (const side of ["left", "right"]) {
  found(side).addEventListener("click", () => choose(side));
  found(side + "-better").addEventListener("click", () => choose(side));
}
found("tie").addEventListener("click", () => choose("tie"));
found("back").addEventListener("click", back);
found("save").addEventListener("click", download);
found("copy").addEventListener("click", copy);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "TEXTAREA") return;
  const key = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (key) choose(key);
  else if (event.key === "Backspace" || event.key === "ArrowUp") back();
  else return;
  event.preventDefault();
});
load();
show();
