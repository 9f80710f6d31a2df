/** Make elements. Text enters the document as text only, never as HTML. */

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 2.5h3v11H4zM9 2.5h3v11H9z",
  save: "M7 2h2v6h2.5L8 11.5 4.5 8H7zM3 12.5h10V14H3z",
  close: "M4.2 3.1 8 6.9l3.8-3.8 1.1 1.1L9.1 8l3.8 3.8-1.1 1.1L8 9.1l-3.8 3.8-1.1-1.1L6.9 8 3.1 4.2z",
  retry: "M8 3a5 5 0 1 1-4.6 7l1.4-.6A3.5 3.5 0 1 0 8 4.500v2L4.500 3.800 8 1z",
};

/** An element with properties and attributes (names with "-" or "role"), and children: elements or text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** An icon, hidden from screen readers. */
export function icon(name) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 16 16");
  picture.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  picture.append(path);
  return picture;
}

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Save a blob as a file of the user. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Debounce: call `work` once, in the next frame and at least `pause` ms after the last call of the result. */
export function eachFrame(work, pause = 0) {
  let asked = false;
  let last = -Infinity;
  const run = () => {
    asked = false;
    work();
    last = performance.now();
  };
  return () => {
    if (asked) return;
    asked = true;
    const wait = last + pause - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(run), wait);
    else requestAnimationFrame(run);
  };
}
