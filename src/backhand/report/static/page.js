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

// A live page calls this with newer charts. One is drawn again only if something other than its data has changed.
window.redraw = async (fresh) => {
  for (const [id, spec] of Object.entries(fresh)) {
    const view = views.get(id);
    if (view && known.get(id) === shape(spec)) await view.data(spec.data.name, spec.data.values).runAsync();
    else await embed(id, spec);
    known.set(id, shape(spec));
  }
};

function shape(spec) { return JSON.stringify({ ...spec, data: null }); }

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
const known = new Map(Object.entries(charts).map(([id, spec]) => [id, shape(spec)]));
window.drawn = drawAll(charts).then(() => { document.documentElement.dataset.drawn = ""; });
