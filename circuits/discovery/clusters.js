"use strict";
const cards = [...document.querySelectorAll("#cards article")];
const texts = cards.map((card) => card.textContent.toLowerCase());
const query = document.getElementById("query"), order = document.getElementById("order");

function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  cards.forEach((card, i) => {
    card.hidden = !words.every((word) => texts[i].includes(word));
    shown += !card.hidden;
  });
  document.getElementById("shown").textContent = `${shown} of ${cards.length} clusters`;
  document.getElementById("nothing").hidden = shown > 0;
}

function sort() {
  const key = (card) => Number(card.dataset[order.value].replace("inf", "Infinity"));
  const sorted = [...cards].sort((a, b) => key(b) - key(a) || 0);
  document.getElementById("cards").append(...sorted);
}

query.addEventListener("input", search);
order.addEventListener("change", sort);
