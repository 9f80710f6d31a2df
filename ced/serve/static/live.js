/** Live: the microphone over a WebSocket; events as they begin and end, the level and a scrolling heat map. */

import { bytes, openLive } from "./api.js";
import { byId, element, save } from "./dom.js";
import { openMicrophone, pcm16 } from "./microphone.js";
import { drawAxis, drawHeat, INKS } from "./paint.js";
import { Scores } from "./state.js";
import { theme } from "./theme.js";
import { clock } from "./time.js";

const SHOWN = 60; // seconds in the heat map
const ROWS = 8;
const ROW_HEIGHT = 22; // pixels, as in style.css
const AXIS_HEIGHT = 22;
const MOST_BUFFERED = 64_000; // bytes (two seconds) that may wait in the socket; later ones are dropped
const MOST_EVENTS = 500; // in the list

export class Live {
  #microphone = null;
  #socket = null;
  #windows = []; // of the last minute: {start, end, probs}
  #rows = []; // indices of classes
  #going = new Map(); // events by number
  #lines = []; // events that have ended, as `ced live -f jsonl` writes them
  #fault = "";

  /** @param {{labels: string[], live: {rate: number}}} model @param {{onChange: (running: boolean) => void}} handlers */
  constructor(model, { onChange }) {
    this.model = model;
    this.onChange = onChange;
    byId("live-stop").addEventListener("click", () => (this.running ? this.stop() : this.start()));
    byId("live-save").addEventListener("click", () => {
      const lines = this.#lines.map((line) => `${JSON.stringify(line)}\n`).join("");
      save(new Blob([lines], { type: "application/jsonl" }), "live.jsonl");
    });
    new ResizeObserver(() => this.draw()).observe(byId("live-heat"));
  }

  get running() {
    return this.#socket !== null;
  }

  async start() {
    if (this.running) return;
    this.#windows = [];
    this.#rows = [];
    this.#lines = [];
    this.#fault = "";
    this.#going.clear();
    byId("live-events").replaceChildren();
    this.#note("Connecting …");
    const socket = (this.#socket = openLive({ scores: "true" }));
    this.onChange(true);
    socket.onmessage = ({ data }) => this.#take(JSON.parse(data));
    socket.onclose = ({ code }) => this.#ended(code);
    const lost = (error) => {
      this.#fault ||= error.message;
      this.stop();
    };
    try {
      const microphone = await openMicrophone(this.model.live.rate, (block) => this.#send(block), lost);
      if (this.#socket === socket) this.#microphone = microphone;
      else microphone.close(); // stopped in the meantime
    } catch (error) {
      lost(error);
    }
  }

  /** Stop listening; events that have begun are ended. */
  stop() {
    this.#microphone?.close();
    this.#microphone = null;
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send("stop");
    else this.#socket?.close();
  }

  #send(block) {
    if (this.#socket?.readyState === WebSocket.OPEN && this.#socket.bufferedAmount < MOST_BUFFERED)
      this.#socket.send(pcm16(block));
  }

  #ended(code) {
    this.#socket = null;
    this.#microphone?.close();
    this.#microphone = null;
    this.#note(this.#fault || (code === 1000 ? "Stopped" : "The connection to the server was lost."));
    this.onChange(false);
  }

  #take(message) {
    if (message.type === "begin") this.#note("Listening");
    else if (message.type === "window") this.#window(message);
    else if (message.type === "event") this.#event(message);
    else if (message.type === "dropped") this.#note(`Listening; ${message.windows} windows were dropped, as the model is too slow`);
    else if (message.type === "error") this.#fault = message.error;
  }

  #note(words) {
    byId("live-state").textContent = words;
    byId("live-stop").textContent = this.running ? "Stop" : "Start again";
  }

  #window({ start, end, level, scores }) {
    const probs = Float32Array.from(bytes(scores), (value) => value / 255);
    this.#windows.push({ start, end, probs });
    while (this.#windows[0].end < end - SHOWN - 2) this.#windows.shift();
    byId("live-time").textContent = clock(end, 0);
    byId("live-level").value = level;
    byId("live-decibels").textContent = `${level.toFixed(0)} dBFS`;
    this.draw();
  }

  #event({ type, ...report }) {
    const { state, event, time, pieces: [piece] } = report; // prettier-ignore
    const [{ label, prob }] = piece.tags;
    let row = this.#going.get(event);
    if (!row) {
      const cells = [new Date(time).toLocaleTimeString(), label, "now", ""].map((words) => element("td", {}, words));
      row = element("tr", { className: "going" }, ...cells);
      this.#going.set(event, row);
      const list = byId("live-events");
      list.prepend(row);
      if (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
    }
    row.cells[3].textContent = prob.toFixed(2);
    if (state === "end") {
      this.#going.delete(event);
      this.#lines.push(report);
      row.classList.remove("going");
      row.cells[2].textContent = `${(piece.end - piece.start).toFixed(1)} s`;
    }
    const now = [...this.#going.values()].map(({ cells }) => element("span", {}, cells[1].textContent));
    byId("live-now").replaceChildren(...now);
  }

  /** Draw the last minute; rows keep their places as long as their classes are among the most probable. */
  draw() {
    const canvas = byId("live-heat");
    const width = canvas.clientWidth;
    const height = ROWS * ROW_HEIGHT + AXIS_HEIGHT;
    if (!width) return;
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    const scores = new Scores(this.model.labels);
    for (const { start, end, probs } of this.#windows) scores.add(start, end, probs);
    this.#arrange(scores.peaks);
    const to = Math.max(SHOWN, scores.scored);
    const tile = { from: to - SHOWN, to, width, theme: theme() };
    drawHeat(context, scores, this.#rows, { ...tile, rowHeight: ROW_HEIGHT });
    context.translate(0, ROWS * ROW_HEIGHT);
    drawAxis(context, { ...tile, height: AXIS_HEIGHT, ink: INKS[tile.theme].axis });
  }

  #arrange(peaks) {
    const best = [...peaks.keys()].sort((one, other) => peaks[other] - peaks[one]).slice(0, ROWS);
    const kept = this.#rows.filter((index) => best.includes(index));
    const added = best.filter((index) => !kept.includes(index));
    this.#rows = this.#rows.length ? this.#rows.map((index) => (best.includes(index) ? index : added.shift())) : best;
    byId("live-rows").replaceChildren(
      ...this.#rows.map((index) => element("li", {}, element("span", {}, this.model.labels[index]))),
    );
  }
}
