// Inserts the results of commands, uploads files, copies commands, and keeps an open page up to date.

const EVERY_MS = 1500;

async function insert(place, address, options = {}, wait = "") {
  const began = Date.now();
  const status = document.createElement("p");
  status.className = "soft";
  status.setAttribute("role", "status");
  const text = wait || place.textContent.trim();
  const work = crypto.getRandomValues(new Uint32Array(2)).join("-");
  const root = document.body.dataset.root;
  let latest = "";
  const tick = () => { status.textContent = `${text} ${Math.round((Date.now() - began) / 1000)} s${latest && ` (${latest})`}`; };
  tick();
  const timer = setInterval(async () => {
    tick();
    const told = await fetch(`${root}/progress/${work}`).catch(() => null);
    if (told?.ok) latest = await told.text();
  }, 1000);
  const ended = new AbortController();
  const cancel = document.createElement("button");
  Object.assign(cancel, { type: "button", className: "quiet", textContent: "Cancel" });
  cancel.addEventListener("click", () => ended.abort());
  place.replaceChildren(status, cancel);
  const waiting = place.closest("form")?.querySelectorAll("[data-after]") ?? [];
  const allow = (allowed, reason = "") => {
    if (place.closest("[data-changed]")) return;
    for (const button of waiting) button.disabled = !allowed;
    for (const why of waiting.length ? place.closest("form").querySelectorAll("[data-why]") : []) {
      why.textContent = reason;
      why.hidden = !reason;
    }
    for (const ready of waiting.length ? place.closest("form").querySelectorAll("[data-ready]") : []) ready.hidden = !!reason;
  };
  allow(false);
  try {
    const reply = await fetch(address, { ...options, signal: ended.signal, headers: { "X-Part": "1", "X-Work": work } });
    if (reply.redirected) {
      location.assign(reply.url);
      return;
    }
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    place.replaceChildren(...page.body.childNodes);
    prepare(place);
    allow(reply.ok, reply.ok ? "" : "Not yet possible: the message above says why.");
  } catch {
    if (!ended.signal.aborted) status.textContent = "The server does not answer. Start it again with the command in its terminal.";
    else {
      status.textContent = "Cancelled.";
      cancel.remove();
      allow(true);
    }
  } finally {
    clearInterval(timer);
  }
}

function upload(form) {
  const file = form.querySelector("input[type=file]").files[0];
  const status = form.querySelector("[role=status]");
  if (!file) { status.textContent = "Choose a file first."; return; }
  const request = new XMLHttpRequest();
  request.open("POST", `${form.dataset.upload}?name=${encodeURIComponent(file.name)}`);
  request.setRequestHeader("X-Part", "1");
  request.upload.addEventListener("progress", (event) => {
    status.textContent = `${Math.floor((100 * event.loaded) / (event.total || 1))} % sent`;
  });
  request.addEventListener("load", () => {
    if (request.status === 200) location.assign(`${form.dataset.next}&data=${encodeURIComponent(request.responseText)}`);
    else status.textContent = new DOMParser().parseFromString(request.responseText, "text/html").body.textContent.trim();
  });
  request.addEventListener("error", () => { status.textContent = "The file could not be sent: it has changed since it was chosen, or the server does not answer. Choose it again."; });
  status.textContent = "0 % sent";
  request.send(file);
}

// Only the fields of the chosen objective are shown and sent.
function choose(select) {
  for (const part of select.form.querySelectorAll("[data-if]")) {
    const shown = part.dataset.if.split(" ").includes(select.value);
    part.hidden = !shown;
    for (const input of part.querySelectorAll("input, select, textarea")) input.disabled = !shown;
  }
}

function prepare(part) {
  for (const place of part.querySelectorAll("[data-load]")) insert(place, place.dataset.load);
  for (const select of part.querySelectorAll("select[data-choice]")) {
    select.addEventListener("change", () => choose(select));
    choose(select);
  }
}

// A typed value takes precedence over a list, so a choice in the list clears it.
document.addEventListener("change", ({ target }) => {
  if (!target.matches("select, input[type=radio]") || !target.value) return;
  const typed = target.closest("[data-if], form")?.querySelector(`[name="typed_${target.name}"]`);
  if (typed) typed.value = "";
});

// What has been checked is what a run learns: choices that have changed since are checked first.
document.addEventListener("input", ({ target }) => {
  const checked = document.querySelector("[data-checked]");
  if (!checked || !target.form?.matches("[data-choices]")) return;
  checked.dataset.changed = "";
  for (const button of checked.querySelectorAll("[data-after]")) button.disabled = true;
  for (const why of checked.querySelectorAll("[data-why]")) {
    why.textContent = "The choices above have changed. Check the rows again.";
    why.hidden = false;
  }
});

// A link to an earlier step takes along what has been typed.
document.addEventListener("click", ({ target }) => {
  const form = target.matches("[data-step]") && document.querySelector("[data-choices]");
  if (!form) return;
  const typed = [...new FormData(form)].filter(([name, value]) => value && name !== "name");
  target.search = new URLSearchParams(typed);
});

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.upload) {
    event.preventDefault();
    upload(form);
  } else if (form.dataset.into && event.submitter?.getAttribute("formmethod") !== "get") {
    event.preventDefault();
    const body = new URLSearchParams(new FormData(form));
    insert(document.getElementById(form.dataset.into), form.action, { method: "POST", body }, form.dataset.wait);
  }
});

document.addEventListener("click", async (event) => {
  if (!event.target.matches("[data-copy]")) return;
  await navigator.clipboard.writeText(event.target.parentElement.querySelector("pre").textContent);
  event.target.textContent = "Copied";
});

// ---- an open page of runs ----

const main = document.querySelector("main");
const live = document.querySelector("[data-live]");
let version = "";

async function update() {
  const reply = await fetch(location.href, { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
  if (reply.status !== 200) return;
  version = reply.headers.get("ETag");
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  let before = null;
  for (const part of page.querySelectorAll("main > [id]")) {
    const old = document.getElementById(part.id);
    const fresh = document.importNode(part, true);
    if (old === null) before === null ? main.prepend(fresh) : before.after(fresh);
    else if ("live" in part.dataset) replace(old, fresh);
    before = document.getElementById(part.id);
  }
  for (const old of main.querySelectorAll(":scope > [id]")) if (!page.getElementById(old.id)) old.remove();
  const charts = page.getElementById("charts");
  if (charts && window.redraw) await window.redraw(JSON.parse(charts.textContent));
}

// Replaces a part, and keeps drawn charts, opened details and the focus.
function replace(old, part) {
  for (const place of part.querySelectorAll(".chart")) {
    const drawn = document.getElementById(place.id);
    if (drawn && drawn.childNodes.length) place.replaceWith(drawn);
  }
  const opened = [...old.querySelectorAll("details")].map((details) => details.open);
  part.querySelectorAll("details").forEach((details, number) => { details.open = opened[number] ?? details.open; });
  if (old instanceof HTMLDetailsElement) part.open = old.open;
  if (!old.contains(document.activeElement) || document.activeElement === document.body) old.replaceWith(part);
  else version = ""; // the next answer replaces it
}

async function follow() {
  for (;;) {
    if (!document.hidden) {
      try {
        await window.drawn;
        await update();
        document.documentElement.dataset.updated = version;
        document.getElementById("offline").hidden = true;
      } catch {
        document.getElementById("offline").hidden = false;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

prepare(document);
if (live) follow();
