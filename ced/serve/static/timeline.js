/** The lanes of a sound under one time axis: waveform, spectrogram, heat map with its events, and an overview above. */

import { eachFrame } from "./dom.js";
import { drawAxis, drawHeat, drawMap, drawSpectrogram, INKS } from "./paint.js";
import { theme } from "./theme.js";
import RegionsPlugin from "./vendor/regions.esm.js";
import WaveSurfer from "./vendor/wavesurfer.esm.js";

/** Heights of the lanes in pixels; style.css has the same. */
export const HEIGHTS = { wave: 64, mel: 112, row: 22, axis: 22 };
const TILE = 800; // pixels; lanes are drawn in tiles of this width, those in view only
const FASTEST = 800; // pixels a second
const WIDEST = 15e6; // pixels; browsers cannot lay out much more
const NARROWEST = 4; // pixels; regions of shorter events could not be hit
const MOST_REGIONS = 600;

// Style of the inside of wavesurfer's shadow tree, which style.css does not reach.
const LANES_STYLE = `
  .lane { position: relative; overflow: hidden; pointer-events: none; }
  .lane canvas { image-rendering: auto; }
  [part~="region"] { outline: 1.5px solid var(--accent); outline-offset: -2px; cursor: pointer !important; }
  [part~="region"]:hover { outline-width: 2.5px; }
  [part~="region"].picked { outline: 2.5px solid var(--pick); }
`;

/** One lane, drawn in tiles that scroll with it. `draw` gets a context and {from, to, width, height, theme}. */
class Lane {
  #tiles = new Map();

  constructor(parent, height, draw) {
    this.box = document.createElement("div");
    this.box.className = "lane";
    this.draw = draw;
    this.height = height;
    parent.append(this.box);
  }

  set height(height) {
    if (this.tall === height) return;
    this.tall = height;
    this.box.style.height = `${height}px`;
    this.clear();
  }

  clear() {
    this.box.replaceChildren();
    this.#tiles.clear();
  }

  /** Draw the missing tiles between two positions (pixels), and drop those far away. */
  paint({ left, right, total, scale }) {
    if (!this.tall) return;
    for (let start = Math.floor(left / TILE) * TILE; start < Math.min(right, total); start += TILE) {
      if (this.#tiles.has(start)) continue;
      const width = Math.ceil(Math.min(TILE, total - start));
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(width * devicePixelRatio);
      canvas.height = Math.round(this.tall * devicePixelRatio);
      Object.assign(canvas.style, { left: `${start}px`, width: `${width}px`, height: `${this.tall}px` });
      const context = canvas.getContext("2d");
      context.scale(canvas.width / width, canvas.height / this.tall);
      const [from, to] = [start / scale, (start + width) / scale];
      this.draw(context, { from, to, width, height: this.tall, theme: theme() });
      this.#tiles.set(start, canvas);
      this.box.append(canvas);
    }
    for (const [start, canvas] of this.#tiles) {
      if (start + TILE > left - 2 * TILE && start < right + 2 * TILE) continue;
      canvas.remove();
      this.#tiles.delete(start);
    }
  }
}

export class Timeline {
  #clip = null;
  #rows = [];
  #events = [];
  #picked = null;
  #regions = new Map();
  #stale = false; // the waveform lacks what has come since it was drawn
  #played = ""; // the key of the event that was played last
  #until = null; // where an event that is being played ends

  /**
   * @param {{lanes: HTMLElement, map: HTMLCanvasElement, audio: HTMLAudioElement}} parts
   * @param {{onPick: (event: object | null) => void, onPlaying: (playing: boolean) => void,
   *   onTime: (seconds: number, length: number) => void, onPlayable: (playable: boolean) => void}} handlers
   */
  constructor({ lanes, map, audio }, handlers) {
    this.map = map;
    this.audio = audio;
    this.handlers = handlers;
    this.surfer = createWaveSurfer(lanes, audio);
    this.regions = this.surfer.registerPlugin(RegionsPlugin.create());
    const wrapper = this.surfer.getWrapper();
    this.mel = new Lane(wrapper, HEIGHTS.mel, (context, tile) => {
      if (this.#clip?.overview) drawSpectrogram(context, this.#clip.overview, tile);
    });
    this.heat = new Lane(wrapper, 0, (context, tile) => {
      if (this.#clip?.scores) drawHeat(context, this.#clip.scores, this.#rows, { ...tile, rowHeight: HEIGHTS.row });
    });
    this.axis = new Lane(wrapper, HEIGHTS.axis, (context, tile) =>
      drawAxis(context, { ...tile, ink: INKS[tile.theme].axis }),
    );
    this.paint = eachFrame(() => this.#paint());
    for (const name of ["scroll", "redraw", "resize"]) this.surfer.on(name, this.paint);
    for (const name of ["redraw", "resize"]) this.surfer.on(name, () => this.#clear());
    this.surfer.on("play", () => handlers.onPlaying(true));
    this.surfer.on("pause", () => {
      handlers.onPlaying(false);
      this.#until = null;
      if (this.#stale) this.#load();
    });
    this.surfer.on("timeupdate", (time) => handlers.onTime(time, this.seconds));
    this.surfer.on("interaction", () => handlers.onPick(null));
    this.surfer.on("error", () => {}); // players' errors arrive through the element, below
    this.regions.on("region-clicked", (region, click) => {
      click.stopPropagation();
      handlers.onPick(region.event);
      this.play(region.event);
    });
    audio.addEventListener("loadedmetadata", () => {
      handlers.onPlayable(true);
      this.#load();
    });
    audio.addEventListener("error", () => {
      if (!this.#clip) return;
      handlers.onPlayable(false);
      this.#load();
    });
    this.#setUpMap();
    this.#setUpWheel(lanes);
    this.recolour();
  }

  /** The length of the time axis: that of the player, so that times agree, else by the header, else the scored length. */
  get seconds() {
    const length = this.audio.duration;
    if (this.audio.readyState && Number.isFinite(length) && length > 0) return length;
    const scored = this.#clip?.scores?.scored ?? 0;
    return this.#clip?.seconds ?? Math.max(this.#clip?.length ?? 0, scored);
  }

  /** Show another sound, or none. */
  show(clip) {
    if (clip === this.#clip) return;
    this.surfer.pause();
    this.#clip = clip;
    this.#events = [];
    this.#rows = [];
    this.surfer.options.minPxPerSec = 0;
    this.#removeRegions(() => false);
    this.#clear();
    this.surfer.empty(); // nothing of the sound before stays in view
    if (clip?.url) this.audio.src = clip.url;
    else {
      this.audio.removeAttribute("src");
      this.audio.load(); // so that it forgets the sound before
      if (clip) this.handlers.onPlayable(false);
    }
    this.handlers.onTime(0, this.seconds);
    this.paint();
  }

  /** Show the scores and the waveform received so far. */
  grow() {
    this.#load();
    this.mel.clear();
    this.heat.clear();
    this.paint();
  }

  /** Show these classes as rows, and these events. */
  fill(rows, events) {
    if (`${rows}` !== `${this.#rows}`) this.#removeRegions(() => false); // they lie in other rows now
    this.#rows = rows;
    this.#events = events;
    this.heat.height = rows.length * HEIGHTS.row;
    this.heat.clear();
    this.paint();
  }

  /** Mark an event, and scroll to it. */
  pick(event) {
    this.#picked = event;
    for (const [key, { element }] of this.#regions) element.classList.toggle("picked", key === keyOf(event));
    if (!event || !this.seconds) return;
    const { from, to } = this.#range();
    if (event.offset > to || event.onset < from) this.#scrollTo((event.onset + event.offset) / 2);
  }

  /** Play an event, or continue it. */
  play(event) {
    const now = this.surfer.getCurrentTime();
    const paused = this.#played === keyOf(event) && !this.surfer.isPlaying();
    const inside = paused && now > event.onset && now < event.offset - 0.05;
    this.#played = keyOf(event);
    this.#until = event.offset;
    this.surfer.play(inside ? now : event.onset, event.offset).catch(() => (this.#until = null));
  }

  /** Play or pause; a marked event is played to its end. */
  toggle() {
    if (this.surfer.isPlaying()) this.surfer.pause();
    else if (this.#picked) this.play(this.#picked);
    else this.surfer.play().catch(() => {});
  }

  /** Zoom by a factor around a place of the view (pixels), or 0: show the whole sound. */
  zoom(factor, x = this.#focus()) {
    if (!this.surfer.getDecodedData()) return;
    const fit = this.surfer.getWidth() / this.seconds;
    const { left, scale } = this.#view();
    const next = Math.max(fit, Math.min(scale * factor, FASTEST, WIDEST / this.seconds));
    this.surfer.zoom(next > fit ? next : 0);
    this.surfer.setScroll(((left + x) / scale) * next - x);
  }

  /** Draw everything in the colours of the theme. */
  recolour() {
    const { wave, played, cursor } = INKS[theme()];
    this.surfer.setOptions({ waveColor: wave, progressColor: played, cursorColor: cursor });
    this.#clear();
    this.paint();
  }

  #clear() {
    for (const lane of [this.mel, this.heat, this.axis]) lane.clear();
  }

  /** Pass the waveform received so far to wavesurfer; the missing part is flat. */
  #load() {
    const seconds = this.seconds;
    this.#stale = this.#until !== null; // loading would forget where to stop
    if (this.#stale || !seconds || !this.#clip) return;
    const overview = this.#clip.overview;
    const peaks = new Float32Array(overview ? Math.max(2, Math.ceil(seconds * overview.rate)) : 2);
    const known = overview ? Math.min(overview.columns, peaks.length) : 0;
    for (let column = 0; column < known; column++) peaks[column] = overview.peaks[column] / 255;
    this.surfer.load(this.#clip.url ?? "", [peaks], seconds).catch(() => {});
    this.handlers.onTime(this.surfer.getCurrentTime(), seconds);
  }

  /** Where zooming by keys and buttons is centred: the marked event or the cursor, if in view, else the middle. */
  #focus() {
    const { left, right, scale } = this.#view();
    const times = [this.surfer.getCurrentTime()];
    if (this.#picked) times.unshift((this.#picked.onset + this.#picked.offset) / 2);
    const seen = times.map((time) => time * scale - left).find((x) => x > 0 && x < right - left);
    return seen ?? (right - left) / 2;
  }

  #view() {
    const left = this.surfer.getScroll();
    const total = this.surfer.getWrapper().clientWidth;
    return { left, right: left + this.surfer.getWidth(), total, scale: total / this.seconds };
  }

  #range() {
    const { left, right, scale } = this.#view();
    return { from: left / scale, to: right / scale };
  }

  #scrollTo(time) {
    const { scale } = this.#view();
    this.surfer.setScroll(time * scale - this.surfer.getWidth() / 2);
  }

  #paint() {
    const { from, to } = this.#range();
    if (this.seconds) {
      for (const lane of [this.mel, this.heat, this.axis]) lane.paint(this.#view());
      this.#placeRegions(from, to);
    }
    const width = this.map.clientWidth;
    const height = this.map.clientHeight;
    this.map.width = width * devicePixelRatio;
    this.map.height = height * devicePixelRatio;
    const context = this.map.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    if (this.#clip && this.seconds)
      drawMap(context, {
        overview: this.#clip.overview,
        events: this.#events,
        seconds: this.seconds,
        range: [from, to],
        width,
        height,
        colours: INKS[theme()],
      });
  }

  /** Lay a region over each event that is in view or near it and whose class has a row. */
  #placeRegions(from, to) {
    const shortest = (NARROWEST * (to - from)) / this.surfer.getWidth();
    const near = this.#events.filter(
      ({ onset, offset, index }) =>
        this.#rows.includes(index) && offset - onset >= shortest && offset > 2 * from - to && onset < 2 * to - from,
    );
    const wanted = new Map((near.length > MOST_REGIONS ? [] : near).map((event) => [keyOf(event), event]));
    this.#removeRegions((key) => wanted.has(key));
    for (const [key, event] of wanted) {
      if (this.#regions.has(key)) {
        this.#regions.get(key).event = event;
        continue;
      }
      const { onset: start, offset: end, index, peak } = event;
      const region = this.regions.addRegion({ start, end, drag: false, resize: false, color: "transparent" });
      region.event = event;
      const { element } = region;
      element.style.top = `${HEIGHTS.wave + HEIGHTS.mel + this.#rows.indexOf(index) * HEIGHTS.row}px`;
      element.style.height = `${HEIGHTS.row}px`;
      element.title = `${this.#clip.scores.labels[index]}, ${start.toFixed(2)} to ${end.toFixed(2)} s, ${peak.toFixed(2)}`;
      element.classList.toggle("picked", key === keyOf(this.#picked));
      this.#regions.set(key, region);
    }
  }

  #removeRegions(keep) {
    for (const [key, region] of this.#regions) {
      if (keep(key)) continue;
      region.remove();
      this.#regions.delete(key);
    }
  }

  #setUpMap() {
    const follow = ({ offsetX }) => this.#scrollTo((offsetX / this.map.clientWidth) * this.seconds);
    this.map.addEventListener("pointerdown", (press) => {
      this.map.setPointerCapture(press.pointerId);
      follow(press);
    });
    this.map.addEventListener("pointermove", (move) => move.buttons && follow(move));
    new ResizeObserver(this.paint).observe(this.map);
  }

  /** Zoom with Ctrl and the wheel, as in Audacity, or by pinching; without Ctrl the page scrolls. */
  #setUpWheel(lanes) {
    lanes.addEventListener(
      "wheel",
      (turn) => {
        if (!turn.ctrlKey) return;
        turn.preventDefault();
        this.zoom(Math.exp(-turn.deltaY / 200), turn.clientX - lanes.getBoundingClientRect().left);
      },
      { passive: false },
    );
  }
}

function keyOf(event) {
  return event ? `${event.index} ${event.onset} ${event.offset}` : "";
}

/** Create a wavesurfer whose style is a constructed style sheet: the page's policy forbids inline ones. */
function createWaveSurfer(lanes, audio) {
  const host = document.createElement("div"); // outside the document until the inline sheet is gone
  const surfer = WaveSurfer.create({ container: host, media: audio, height: HEIGHTS.wave, cursorWidth: 2 });
  const root = host.firstElementChild.shadowRoot;
  const inline = root.querySelector("style");
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(inline.textContent + LANES_STYLE);
  root.adoptedStyleSheets = [sheet];
  inline.remove();
  lanes.append(host);
  return surfer;
}
