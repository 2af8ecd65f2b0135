"use strict";
// Updates an open page while the run trains, and sends prompts to base and adapter.

(() => {
  const EVERY_MS = 2000;
  const box = document.getElementById("try");
  const part = (name) => document.getElementById("try-" + name);
  let version = box.dataset.version;
  let asking = false;

  // A chart is drawn again only if something other than its data has changed.
  const known = new Map(Object.entries(charts).map(([id, spec]) => [id, shape(spec)]));
  function shape(spec) { return JSON.stringify({ ...spec, data: null }); }

  function showBox(state) {
    part("state").textContent = state.text;
    part("ask").disabled = asking || !state.ready;
  }

  async function update() {
    const state = await (await fetch("state")).json();
    showBox(state.box);
    if (state.version === version) return;
    const page = new DOMParser().parseFromString(await (await fetch(".")).text(), "text/html");
    const fresh = JSON.parse(page.getElementById("charts").textContent);
    for (const section of page.querySelectorAll("main > section:not(#try)")) replace(document.importNode(section, true));
    for (const [id, spec] of Object.entries(fresh)) {
      const view = views.get(id);
      if (view && known.get(id) === shape(spec)) await view.data(spec.data.name, spec.data.values).runAsync();
      else await embed(id, spec);
      known.set(id, shape(spec));
    }
    version = page.getElementById("try").dataset.version;
  }

  // Replaces a section's text, and keeps the drawn charts and the opened details.
  function replace(section) {
    const old = document.getElementById(section.id);
    for (const place of section.querySelectorAll(".chart")) {
      const drawn = document.getElementById(place.id);
      if (drawn && drawn.childNodes.length) place.replaceWith(drawn);
    }
    const opened = [...old.querySelectorAll("details")].map((details) => details.open);
    section.querySelectorAll("details").forEach((details, number) => { details.open = opened[number] ?? details.open; });
    old.replaceWith(section);
  }

  async function ask() {
    asking = true;
    part("ask").disabled = true;
    part("note").textContent = "Both are answering…";
    try {
      const reply = await fetch("answer", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ prompt: part("prompt").value }),
      });
      if (reply.status !== 200 && reply.status !== 409) throw new Error(await reply.text());
      const answer = await reply.json();
      part("note").textContent = answer.error ?? answer.seconds + " s";
      if (answer.error === undefined) {
        part("base").textContent = answer.base;
        part("adapted").textContent = answer.adapted;
        part("step").textContent = "with the adapter of step " + answer.step;
        part("answers").hidden = false;
      }
    } catch (error) {
      part("note").textContent = "No answer: " + error.message;
    } finally {
      asking = false;
      part("ask").disabled = false;
    }
  }

  part("ask").addEventListener("click", ask);
  part("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !part("ask").disabled) ask();
  });

  async function loop() {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
      if (document.hidden) continue;
      try {
        await window.drawn;
        await update();
        document.documentElement.dataset.updated = version;
      } catch (error) {
        part("state").textContent = "The server does not answer any more; this page stays as it is.";
      }
    }
  }
  loop();
})();
