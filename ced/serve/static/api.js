/** Requests to the server; docs/serve.md describes its routes. */

const KEY = "ced-api-key"; // in sessionStorage: gone with the tab
const LIVE_PROTOCOL = "ced.live.v1";
const KEY_PROTOCOL = "ced.key."; // before the key, as browsers let no header be added to a WebSocket

/** An error of the server or of the connection. */
export class ServerError extends Error {
  /** @param {number} status HTTP status, 0 if there was no answer @param {number} retryAfter seconds, 0 if not given */
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Keep the API key until the tab is closed. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function address(path, options = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(options)) url.searchParams.set(name, value);
  return url;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The model, its labels and the server's limits. @throws {ServerError} */
export async function fetchModel() {
  const response = await fetch(address("v1/model"), { headers: headers() }).catch(() => {
    throw new ServerError("The server cannot be reached.");
  });
  if (!response.ok) throw refusal(response.status, await response.text(), response.headers.get("Retry-After"));
  return response.json();
}

/**
 * Send a sound and call `onLine` with each line of the streamed answer.
 *
 * Uses XMLHttpRequest, because fetch does not report how much of a body has been sent.
 *
 * @param {File | string} source a file, or the address of one, which the server fetches
 * @param {Record<string, string | number>} options of the stream route
 * @param {{onSent: (part: number) => void, onLine: (line: object) => void, signal: AbortSignal}} handlers
 * @throws {ServerError} also for a line of type "error", and for an answer that stops before its last line
 * @throws {DOMException} AbortError, when `signal` was aborted
 */
export function stream(source, options, { onSent, onLine, signal }) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const request = new XMLHttpRequest();
    const lines = new Lines();
    let ended = false;
    const read = () => {
      if (request.status !== 200) return;
      for (const line of lines.next(request.responseText)) {
        if (line.type === "error") throw new ServerError(line.error, 200);
        ended ||= line.type === "end";
        onLine(line);
      }
    };
    const guarded = (work) => () => {
      try {
        work();
      } catch (error) {
        reject(error);
        request.abort();
      }
    };
    request.open("POST", address("v1/audio/stream", options));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => onSent(total ? loaded / total : 1);
    request.onprogress = guarded(read);
    request.onload = guarded(() => {
      read();
      if (request.status !== 200)
        throw refusal(request.status, request.responseText, request.getResponseHeader("Retry-After"));
      if (!ended) throw new ServerError("The server's answer stopped before its end.");
      resolve();
    });
    request.onerror = () => reject(new ServerError("The connection to the server was lost."));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    if (typeof source === "string") {
      request.setRequestHeader("Content-Type", "application/json");
      request.send(JSON.stringify({ address: source }));
      return;
    }
    const form = new FormData();
    form.append("file", source, source.name);
    request.send(form);
  });
}

/** Splits a growing text into lines of JSON. */
class Lines {
  #place = 0;

  *next(text) {
    for (let end; (end = text.indexOf("\n", this.#place)) >= 0; this.#place = end + 1)
      if (end > this.#place) yield JSON.parse(text.slice(this.#place, end));
  }
}

function refusal(status, body, retryAfter) {
  let reason = `The server answers with status ${status}.`;
  try {
    reason = JSON.parse(body).error ?? reason;
  } catch {
    // a proxy's page, for example
  }
  return new ServerError(reason, status, Number(retryAfter) || 0);
}

/** Open the connection for live sound: s16le mono in, JSON out. */
export function openLive(options) {
  const url = address("v1/live", options);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const key = sessionStorage.getItem(KEY);
  return new WebSocket(url, [LIVE_PROTOCOL, ...(key ? [KEY_PROTOCOL + base64url(key)] : [])]);
}

function base64url(text) {
  const letters = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The bytes of a base64 text. */
export function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

/** The little-endian float32 numbers of a base64 text. */
export function floats(base64) {
  return new Float32Array(bytes(base64).buffer);
}
