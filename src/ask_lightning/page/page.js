// What the page does in the browser beside Gradio: players, spectrograms, the map.
(() => {
  "use strict";

  const clipOf = (element) => element.closest(".clip");
  const LONGEST = 30; // seconds that a spectrogram shows

  // What screen readers hear: an element that stays, of which only the text changes.
  function say(text) {
    const said = document.getElementById("said");
    if (said) said.textContent = text;
  }

  // Tells the clips that this page shows from those of a server that was started later.
  const keyOfPage = () => document.querySelector("header.page")?.dataset.of;

  // ---- sounds that are given ----
  // Browsers call webm and mp4 films even without a picture, and Gradio takes what is called a sound alone.
  function asSounds(files) {
    const sounds = new DataTransfer();
    for (const file of files) {
      const isSound = file.type.startsWith("audio/");
      sounds.items.add(isSound ? file : new File([file], file.name, { type: "audio/unknown" }));
    }
    return sounds;
  }
  const areSounds = (files) => [...files].every((file) => file.type.startsWith("audio/"));
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!(input instanceof Element) || !input.matches("#sound input[type=file]")) return;
    if (!areSounds(input.files)) input.files = asSounds(input.files).files;
  }, true);
  document.addEventListener("drop", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest("#sound")) return;
    if (!event.dataTransfer || areSounds(event.dataTransfer.files)) return;
    event.preventDefault();
    event.stopPropagation();
    const dataTransfer = asSounds(event.dataTransfer.files);
    event.target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
  }, true);

  // ---- players ----
  document.addEventListener("play", (event) => {
    for (const other of document.querySelectorAll(".clip audio")) {
      if (other !== event.target) other.pause();
    }
  }, true);

  document.addEventListener("timeupdate", (event) => {
    const head = clipOf(event.target)?.querySelector(".playhead");
    if (!head || !event.target.duration) return;
    const share = event.target.currentTime / Math.min(event.target.duration, LONGEST);
    head.hidden = event.target.currentTime === 0 || share > 1;
    head.style.left = `${100 * share}%`;
  }, true);

  // A click into a spectrogram plays from there; by keyboard, the player does it.
  async function playFrom(picture, share) {
    const audio = clipOf(picture).querySelector("audio");
    if (!audio.duration) {
      const loaded = new Promise((done) => audio.addEventListener("loadedmetadata", done, { once: true }));
      audio.load();
      audio.play();
      await loaded;
    }
    audio.currentTime = share * Math.min(audio.duration, LONGEST);
    audio.play();
  }

  // What cannot be drawn or played says why.
  document.addEventListener("error", async (event) => {
    const failed = event.target;
    if (!(failed instanceof HTMLElement) || !failed.matches(".clip img, .clip audio")) return;
    let reason = "the server does not answer. Is it still running?";
    try {
      const response = await fetch(failed.src);
      const verb = failed.matches("img") ? "show" : "play";
      reason = response.ok ? `this browser cannot ${verb} it.` : await response.text();
    } catch { /* the reason stays */ }
    const what = failed.matches("img") ? "No spectrogram" : "No sound";
    const line = Object.assign(document.createElement("p"), { className: "problem" });
    line.setAttribute("role", "alert");
    line.textContent = `${what}: ${reason}`;
    (failed.closest(".picture") ?? failed).replaceWith(line);
  }, true);

  // ---- map ----
  const points = () => [...document.querySelectorAll(".map .point")];
  const place = (point) => [Number(point.getAttribute("cx")), Number(point.getAttribute("cy"))];

  function reach(point, focus) {
    for (const other of document.querySelectorAll('.map .point[tabindex="0"]')) other.tabIndex = -1;
    point.tabIndex = 0;
    if (focus) point.focus();
  }

  function label(point) {
    const box = document.getElementById("map-label");
    if (!box) return;
    box.hidden = !point;
    if (!point) return;
    box.textContent = point.getAttribute("aria-label");
    const frame = point.closest(".map").getBoundingClientRect();
    const at = point.getBoundingClientRect();
    const left = at.left + at.width / 2 - frame.left;
    box.style.left = `${Math.max(0, Math.min(left - box.offsetWidth / 2, frame.width - box.offsetWidth))}px`;
    const above = at.top - frame.top - box.offsetHeight - 6;
    box.style.top = `${above >= 0 ? above : at.bottom - frame.top + 6}px`;
  }

  async function open(point) {
    const target = document.getElementById("map-clip");
    for (const other of document.querySelectorAll(".map .point.open")) other.classList.remove("open");
    point.classList.add("open");
    reach(point, false);
    try {
      const response = await fetch(`/clip/${point.dataset.row}/card?of=${keyOfPage()}`);
      if (!response.ok) throw new Error(await response.text());
      target.innerHTML = await response.text(); // escaped by the server
      say(`Opened: ${point.getAttribute("aria-label")}`);
      if (target.getBoundingClientRect().top > window.innerHeight - 80) target.scrollIntoView({ block: "end" });
    } catch (error) {
      target.textContent = `The clip cannot be shown: ${error.message}`;
    }
  }

  function step(from, right, down) {
    const marked = points().filter((point) => point.classList.contains("marked"));
    const [x, y] = place(from);
    let best = null;
    let lowest = Infinity;
    for (const point of marked.length ? marked : points()) {
      const [px, py] = place(point);
      const along = (px - x) * right + (py - y) * down;
      const across = Math.abs((px - x) * down) + Math.abs((py - y) * right);
      const cost = along + 2 * across;
      if (along > 0.05 && cost < lowest) [best, lowest] = [point, cost];
    }
    return best;
  }

  const DIRECTIONS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  document.addEventListener("keydown", (event) => {
    const point = event.target;
    if (!(point instanceof Element) || !point.matches(".map .point")) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(point);
    } else if (event.key in DIRECTIONS) {
      event.preventDefault();
      const next = step(point, ...DIRECTIONS[event.key]);
      if (next) reach(next, true);
    }
  });

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element)) return;
    const point = event.target.closest(".map .point");
    if (point) open(point);
    const picture = event.target.closest(".picture");
    if (picture) {
      const frame = picture.getBoundingClientRect();
      playFrom(picture, (event.clientX - frame.left) / frame.width);
    }
  });

  for (const [shown, gone] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    document.addEventListener(shown, (event) => {
      if (event.target instanceof Element && event.target.matches(".map .point")) label(event.target);
    });
    document.addEventListener(gone, (event) => {
      if (event.target instanceof Element && event.target.matches(".map .point")) label(null);
    });
  }

  function mark(words) {
    const wanted = words.normalize("NFC").trim().toLowerCase();
    // The texts have their case folded: ß is ss there, which it becomes by way of its capital.
    const folded = [...wanted].map((sign) => sign.toUpperCase().toLowerCase()).join("");
    let count = 0;
    for (const point of points()) {
      const marked = wanted !== "" && [wanted, folded].some((form) => point.dataset.texts.includes(form));
      point.classList.toggle("marked", marked);
      if (marked && count++ === 0) reach(point, false);
    }
    document.querySelector(".map")?.classList.toggle("marking", wanted !== "");
    const said = document.getElementById("map-count");
    if (said) said.textContent = wanted === "" ? "" : `${count} marked`;
  }
  document.addEventListener("input", (event) => {
    if (event.target instanceof Element && event.target.id === "map-words") mark(event.target.value);
  });

  // ---- what Gradio's parts do not say ----
  function name(element, attribute, value) {
    if (element && element.getAttribute(attribute) !== value) element.setAttribute(attribute, value);
  }
  function nameParts() {
    for (const id of ["lowest", "count"]) {
      const words = document.querySelector(`#${id} [data-testid=block-info]`)?.textContent.trim() ?? id;
      name(document.querySelector(`#${id} .reset-button`), "aria-label", `Reset: ${words}`);
    }
    for (const fold of document.querySelectorAll("#filters button.label-wrap")) {
      name(fold, "aria-expanded", String(fold.classList.contains("open")));
      name(fold, "aria-label", "Filters");
    }
    for (const panel of document.querySelectorAll('[role="tabpanel"]')) {
      const tab = document.getElementById(`${panel.id}-button`);
      name(panel, "aria-label", tab?.textContent.trim() || "Search");
    }
    name(document.querySelector("#sound input[type=file]"), "accept", "audio/*,video/*");
    name(document.getElementById("sound"), "role", "group");
    name(document.getElementById("sound"), "aria-label", "Or give a sound");
  }

  // The results are a few steps of the keyboard away, past the filters.
  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || !event.target.matches("a.skip")) return;
    event.preventDefault();
    const heading = document.getElementById("results");
    const target = heading?.offsetParent ? heading : document.querySelector('.map .point[tabindex="0"]');
    target?.focus();
  });

  // A fold opens and closes without a new element.
  document.addEventListener("click", () => setTimeout(nameParts, 50));

  // ---- after each answer ----
  let answered = "";
  function afterChange() {
    nameParts();
    const key = document.getElementById("results")?.dataset.of;
    if (key && keyOfPage() && key !== keyOfPage()) {
      location.reload(); // title, map and switches are those of other clips than the answer
      return;
    }
    const cards = [...document.querySelectorAll("#answer .clip")];
    const found = new Set(cards.map((card) => card.dataset.row));
    for (const point of points()) point.classList.toggle("found", found.has(point.dataset.row));
    const status = document.querySelector("#answer .status, #answer .problem");
    if (!status || status.textContent === answered) return;
    const first = answered === "";
    answered = status.textContent;
    if (!first && status.matches(".status")) say(answered); // a problem is an alert by itself
    // On a narrow screen the answer is below the form.
    if (!first && status.getBoundingClientRect().top > window.innerHeight - 80) {
      status.scrollIntoView({ block: "start" });
    }
  }
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; afterChange(); });
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
