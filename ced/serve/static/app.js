/**
 * The page: connects the parts. The store determines what is shown; the parts change the store, never each other.
 *
 * api.js        requests, the stream of results, the live socket
 * state.js      the store, scores, overview and clips
 * queue.js      sounds that are sent one after the other
 * events.js     scores to events, as ced/tag/events.py
 * timeline.js   waveform (wavesurfer.js), lanes, regions, playing, zoom; paint.js draws the lanes
 * labels.js     the label filter
 * table.js      the table of events
 * export.js     records as CSV, JSONL, Audacity, Raven; wav.js pieces of sounds
 * microphone.js recording; worklet.js and resample.js run in the audio thread
 * live.js       the microphone over the live socket
 * theme.js, time.js, dom.js  light and dark; times as text; elements
 */

import { fetchModel, setKey } from "./api.js";
import { byId, eachFrame, element, icon, save } from "./dom.js";
import { findEvents } from "./events.js";
import { FORMATS, text } from "./export.js";
import { LabelFilter } from "./labels.js";
import { Live } from "./live.js";
import { Recorder } from "./microphone.js";
import { Queue } from "./queue.js";
import { record, Store } from "./state.js";
import { Table } from "./table.js";
import { setUpTheme } from "./theme.js";
import { clock } from "./time.js";
import { Timeline } from "./timeline.js";
import { snippet } from "./wav.js";

const WINDOWS = {
  "10 s": { window: 10, hop: 5, scores: "windows" },
  "5 s": { window: 5, hop: 2.5, scores: "windows" },
  "2 s": { window: 2, hop: 1, scores: "windows" },
  "1 s": { window: 1, hop: 0.5, scores: "windows" },
  "0.16 s": { window: 10, hop: null, scores: "columns" },
};
const NUMBERS = ["threshold", "top", "gap", "shortest"]; // inputs, and parts of the store

const store = new Store({
  model: null, // {name, labels, mids, live}
  limits: null, // {megabytes, seconds} of a request
  clips: [],
  selected: null,
  view: "sound", // or "live"
  windows: WINDOWS["2 s"],
  threshold: 0.5,
  top: 8, // rows of the heat map
  gap: 0, // seconds
  shortest: 0,
  classes: null, // indices of the chosen labels; null: all
  events: [], // of the selected sound
  picked: null, // one of them
  playable: true,
});

const timeline = new Timeline(
  { lanes: byId("lanes"), map: byId("map"), audio: byId("audio") },
  {
    onPick: (event) => store.set({ picked: event }),
    onPlayable: (playable) => store.set({ playable }),
    onPlaying: (playing) => {
      byId("play").replaceChildren(icon(playing ? "pause" : "play"));
      byId("play").setAttribute("aria-label", playing ? "Pause" : "Play");
    },
    onTime: (time, length) => (byId("time").textContent = `${clock(time)} / ${clock(length)}`),
  },
);

/** The options of the page that select events from the scores of a sound. */
function eventsOf(clip) {
  if (!clip?.scores) return [];
  const { threshold, gap, shortest, classes } = store;
  return findEvents(clip.scores, { threshold, gap, shortest, classes: classes ?? undefined });
}

/** The chosen classes with the highest probabilities, the highest first. */
function rowsOf(clip) {
  if (!clip?.scores?.length) return [];
  const { peaks, labels } = clip.scores;
  const chosen = store.classes ?? [...labels.keys()];
  return chosen.toSorted((one, other) => peaks[other] - peaks[one] || one - other).slice(0, store.top);
}

function sameEvent(one, other) {
  return one && other && one.index === other.index && one.onset === other.onset;
}

/** Merge the scores into events again, and show them in the heat map and the table. */
function refresh() {
  const clip = store.selected;
  const events = eventsOf(clip);
  const rows = rowsOf(clip);
  timeline.fill(rows, events);
  byId("rows").replaceChildren(
    ...rows.map((index) => {
      const peak = clip.scores.peaks[index];
      const label = clip.scores.labels[index];
      const parts = [element("span", {}, label), element("span", {}, peak.toFixed(2))];
      return element("li", { className: peak < store.threshold ? "below" : "", title: label }, ...parts);
    }),
  );
  table?.fill(events, store.playable);
  const labels = new Set(events.map(({ index }) => index)).size;
  byId("count").textContent = clip?.scores ? `${plural(events.length, "event")}${labels ? `, ${plural(labels, "label")}` : ""}` : "";
  byId("notes").textContent = notesOf(clip);
  byId("notes").hidden = !notesOf(clip);
  for (const button of byId("export").children) button.disabled = !clip?.scores?.length;
  store.set({ events, picked: events.find((event) => sameEvent(event, store.picked)) ?? null });
}

/** Warnings and the error of the sound that is shown. */
function notesOf(clip) {
  const notes = clip ? [clip.error, ...clip.notes] : [];
  if (clip?.scores && !store.playable)
    notes.push(
      clip.file
        ? "this browser cannot play the file, but its tags are complete"
        : "a sound from an address is tagged, but not played here",
    );
  return notes.filter(Boolean).join("; ");
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

let table = null; // these three once the model is known
let live = null;
const refreshSoon = eachFrame(refresh);
const growSoon = eachFrame(() => {
  timeline.grow();
  refresh();
}, 400);

const queue = new Queue(store, byId("queue"), {
  onGrow: (clip) => {
    if (clip === store.selected) growSoon();
  },
  askKey,
});

store.on(["selected"], () => {
  const clip = store.selected;
  store.set({ view: "sound", picked: null, playable: true, windows: clip?.windows ?? store.windows });
  timeline.show(clip);
  byId("name").textContent = clip?.name ?? "";
  byId("name").title = clip?.name ?? "";
  table?.reset();
  refreshSoon();
});
store.on(["selected", "view"], () => {
  const sound = store.view === "sound" && store.selected;
  byId("sound").hidden = byId("found").hidden = !sound;
  byId("welcome").hidden = sound || store.view === "live";
  byId("live").hidden = store.view !== "live";
  if (sound) refreshSoon();
});
store.on(["picked"], () => {
  timeline.pick(store.picked);
  table?.pick(store.picked);
});
store.on(["playable"], () => {
  byId("play").disabled = !store.playable;
  refreshSoon();
});
store.on([...NUMBERS, "classes"], refreshSoon);
store.on(["limits", "windows"], () => {
  const { limits, windows } = store;
  byId("windows").value = Object.keys(WINDOWS).find((name) => WINDOWS[name] === windows);
  if (!limits) return;
  const cost = windows.hop ? Math.max(1, windows.window) / windows.hop : 1; // overlapping windows count in full
  const minutes = limits.seconds / cost / 60;
  const most = minutes < 120 ? `${Math.round(10 * minutes) / 10} min` : `${Math.floor(minutes / 60)} h`;
  byId("limits").textContent = `Up to ${limits.megabytes} MB and ${most} each`;
});
store.on(["clips"], () => (byId("scope").hidden = store.clips.length < 2));

// Sources

byId("files").addEventListener("change", ({ target }) => {
  queue.add(target.files);
  target.value = "";
  byId("timeline").focus({ preventScroll: true }); // so that the keys work
});
for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, (drag) => {
    if (!drag.dataTransfer.types.includes("Files")) return;
    drag.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop") queue.add(drag.dataTransfer.files);
  });

byId("fetch").addEventListener("submit", (event) => {
  event.preventDefault();
  queue.add([byId("address").value.trim()]);
  byId("fetch").reset();
});

let recorder = null;
byId("record").addEventListener("click", async () => {
  const button = byId("record");
  if (recorder) return finishRecording();
  const next = new Recorder();
  button.disabled = true; // while the browser asks for permission
  try {
    await next.start((seconds, level) => {
      if (recorder === next) button.textContent = `Stop ${clock(seconds, 0)} · ${level.toFixed(0)} dB`;
    }, finishRecording);
    recorder = next;
    complain("");
  } catch (error) {
    complain(error.message);
  }
  button.disabled = false;
});

function finishRecording() {
  if (!recorder) return;
  queue.add([recorder.stop()]);
  recorder = null;
  byId("record").textContent = "Record";
}

byId("listen").addEventListener("click", () => {
  store.set({ view: "live" });
  live?.start();
});

// Timeline

byId("play").append(icon("play"));
byId("play").addEventListener("click", () => timeline.toggle());
byId("zoom-in").addEventListener("click", () => timeline.zoom(2));
byId("zoom-out").addEventListener("click", () => timeline.zoom(0.5));
byId("zoom-fit").addEventListener("click", () => timeline.zoom(0));
for (const [name, { hop }] of Object.entries(WINDOWS))
  byId("windows").append(element("option", { value: name }, hop ? `${name}, every ${hop} s` : `${name} columns`));
byId("windows").addEventListener("change", ({ target }) => {
  store.set({ windows: WINDOWS[target.value] });
  if (store.selected) queue.again(store.selected);
});

/** Select the event before or after the selected one or, without one, the playing position. */
function step(direction) {
  const { events, picked } = store;
  if (!events.length) return;
  const now = byId("audio").currentTime;
  let place = events.indexOf(picked) + direction;
  if (!picked) place = direction > 0 ? events.findIndex(({ onset }) => onset >= now) : events.findLastIndex(({ onset }) => onset < now);
  if (place >= 0 && place < events.length) store.set({ picked: events[place] });
}

const KEYS = {
  " ": () => store.playable && timeline.toggle(),
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => timeline.zoom(2),
  "=": () => timeline.zoom(2), // + without Shift
  "-": () => timeline.zoom(0.5),
  0: () => timeline.zoom(0),
};
document.addEventListener("keydown", (press) => {
  const busy = press.target.closest("input, select, textarea, dialog") || (press.key === " " && press.target.closest("button, a"));
  if (busy || press.ctrlKey || press.metaKey || press.altKey || byId("sound").hidden || !(press.key in KEYS)) return;
  press.preventDefault();
  KEYS[press.key]();
});

// Filter and export

for (const name of NUMBERS) {
  const inputs = name === "threshold" ? [byId("threshold"), byId("threshold-number")] : [byId(name)];
  const show = (except) => inputs.forEach((input) => input !== except && (input.value = store[name]));
  show();
  for (const input of inputs) {
    input.addEventListener("input", () => {
      if (!input.value || !input.validity.valid) return; // while a number is being typed
      store.set({ [name]: input.valueAsNumber });
      show(input);
    });
    input.addEventListener("change", () => show());
  }
}
byId("filter").addEventListener("submit", (event) => event.preventDefault());

byId("export").append(
  ...Object.entries(FORMATS).map(([format, { name }]) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => exportAs(format));
    return button;
  }),
);

function exportAs(format) {
  const { suffix, type, shared } = FORMATS[format];
  const all = shared && byId("all").checked;
  const clips = all ? store.clips.filter(({ status }) => status === "done") : [store.selected];
  const records = clips.map((clip) => record(clip, store.model, eventsOf(clip)));
  const stem = all ? "events" : store.selected.name.replace(/\.[^.]*$/, "");
  save(new Blob([text(format, records)], { type }), stem + suffix);
}

async function saveSnippet({ onset, offset, index }) {
  const clip = store.selected;
  try {
    if (!clip.file) throw new Error("Pieces of sounds from addresses cannot be saved here; fetch the file and choose it.");
    const piece = await snippet(clip.file, onset, offset, timeline.seconds);
    const label = store.model.labels[index].replace(/[^\p{L}\p{N}]+/gu, "_");
    save(piece, `${clip.name.replace(/\.[^.]*$/, "")}_${label}_${onset.toFixed(2)}-${offset.toFixed(2)}.wav`);
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

// Model

function complain(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

/** Ask for the API key until one is entered. */
function askKey() {
  const dialog = byId("key");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        setKey(byId("key-value").value);
        byId("key-value").value = "";
        resolve();
      },
      { once: true },
    );
  });
}

async function connect() {
  for (;;) {
    try {
      return await fetchModel();
    } catch (error) {
      if (error.status !== 401) throw error;
      await askKey();
    }
  }
}

async function start() {
  const info = await connect();
  const labels = info.labels.map(({ name }) => name);
  const model = { name: info.model, labels, mids: info.labels.map(({ mid }) => mid), live: info.live };
  byId("model").textContent = `${model.name}, ${plural(labels.length, "label")}`;
  table = new Table({ table: byId("events"), more: byId("more") }, labels, {
    onPick: (event) => store.set({ picked: event }),
    onPlay: (event) => timeline.play(event),
    onSave: saveSnippet,
  });
  new LabelFilter(labels, {
    peaks: () => store.selected?.scores?.peaks ?? null,
    onChange: (classes) => store.set({ classes }),
  });
  live = new Live(model, {
    onChange: (running) => (byId("listen").textContent = running ? "Listening …" : "Live"),
  });
  byId("windows").querySelector('[value="0.16 s"]').hidden = !info.columns;
  byId("fetch").hidden = !info.addresses;
  store.set({ model, limits: info.limits });
  queue.run();
}

setUpTheme(byId("theme"), () => {
  timeline.recolour();
  live?.draw();
});
start().catch((error) => complain(error.message));
