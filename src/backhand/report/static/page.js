"use strict";
// Draws the page's charts with Vega-Lite from the specifications in it, and on a live page keeps everything up to date.

const views = new Map();

function embed(id, spec) {
  const place = document.getElementById("chart-" + id);
  if (!place) return Promise.resolve();
  place.textContent = "";
  // `ast` evaluates Vega's expressions without making code of text, as the page's security policy demands.
  const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: { theme: "page" } };
  return vegaEmbed(place, spec, options).then(
    (result) => { views.set(id, result.view); },
    (error) => { place.textContent = "This chart could not be drawn: " + error.message; throw error; },
  );
}

function drawAll(charts) {
  return Promise.all(Object.entries(charts).map(([id, spec]) => embed(id, spec)));
}

// What is printed is all there is: closed parts are opened for it.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.printed = "";
  }
});
window.addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-printed]")) {
    details.open = false;
    delete details.dataset.printed;
  }
});

const charts = JSON.parse(document.getElementById("charts").textContent);
window.drawn = drawAll(charts).then(() => { document.documentElement.dataset.drawn = ""; });
