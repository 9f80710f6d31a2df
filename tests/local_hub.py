"""A local server in place of the Hugging Face hub, with models in the layout of `mispeech/ced-*`.

Like the hub it answers `resolve` with a redirect to a content address, tells revision, size and sha256 in headers, and
serves ranges; it can also cut connections and answer with errors.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save

from ced.model import zoo
from ced.model.vit import CED

CONFIGS = Path(__file__).parent / "data" / "hub_configs"


@dataclass
class LocalHub:
    """The repositories of the server, and how it behaves."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (repository, file): content
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next answers to `resolve`
    cuts: list[int] = field(default_factory=list)  # bytes of the body after which each of the next answers breaks off
    requests: list[str] = field(default_factory=list)  # method, path and range of each
    url: str = ""

    @property
    def content_url(self) -> str:
        """Its address under another host name, as the hub redirects to a storage host."""
        return self.url.replace("127.0.0.1", "localhost")

    def downloads(self) -> list[str]:
        """Return the requests for content."""
        return [each for each in self.requests if each.startswith("GET /content/")]


def hub_weights(network: CED) -> bytes:
    """Return a network as the hub's `model.safetensors`: `encoder.` before every key but the output layer's."""
    state = {}
    for key, value in network.state_dict().items():
        key = key.replace("init_bn.1.", "init_bn.")
        state[key if key.startswith("outputlayer.") else f"encoder.{key}"] = value.contiguous()
    return save(state, metadata={"format": "pt"})


def hub_config(size: str, **changes: object) -> bytes:
    """Return the hub's `config.json` of a size, with its class names cut at the first comma."""
    config = json.loads((CONFIGS / f"{size}.json").read_bytes()) | changes
    return json.dumps(config, indent=2).encode()


def write_folder(folder: Path, size: str, network: CED) -> Path:
    """Write the folder of a published model with the weights of a network."""
    folder.mkdir(parents=True)
    config = network.config
    (folder / "config.json").write_bytes(
        hub_config(size, embed_dim=config.embed_dim, num_heads=config.num_heads, depth=config.depth)
    )
    (folder / "model.safetensors").write_bytes(hub_weights(network))
    return folder


def published(hub: LocalHub, networks: Mapping[str, CED]) -> dict[str, zoo.Entry]:
    """Serve networks under published names at their pinned revisions; return the table of models with their sha256."""
    entries = dict(zoo.MODELS)
    for name, network in networks.items():
        entry, content = zoo.MODELS[name], hub_weights(network)
        assert entry.hub is not None
        hub.files[entry.hub.repo, "model.safetensors"] = content
        hub.files[entry.hub.repo, "config.json"] = hub_config(name.removeprefix("ced_"))
        source = replace(entry.hub, sha256=hashlib.sha256(content).hexdigest())
        entries[name] = replace(entry, width=network.config.embed_dim, heads=network.config.num_heads, hub=source)
    return entries


@contextmanager
def running(hub: LocalHub) -> Iterator[LocalHub]:
    """Run the server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            wanted = self.headers.get("Range", "")
            hub.requests.append(f"{self.command} {self.path} {wanted}".strip())
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
                self.resolve(*found.groups())
            elif found := re.fullmatch(r"/content/([0-9a-f]{64})", self.path):
                content = next(each for each in hub.files.values() if hashlib.sha256(each).hexdigest() == found[1])
                self.content(content, wanted, body)
            else:
                self.empty(404)

        def resolve(self, repo: str, revision: str, file: str) -> None:
            if hub.statuses:
                self.empty(*hub.statuses.pop(0))
                return
            pinned = {each.hub.repo: each.hub.revision for each in zoo.MODELS.values() if each.hub is not None}
            if revision not in (pinned.get(repo), "main"):
                self.empty(404, {"X-Error-Code": "RevisionNotFound"})
            elif (repo, file) not in hub.files:
                self.empty(404, {"X-Error-Code": "EntryNotFound"})
            else:
                content = hub.files[repo, file]
                digest = hashlib.sha256(content).hexdigest()
                headers = {
                    "Location": f"{hub.content_url}/content/{digest}",
                    "X-Repo-Commit": pinned.get(repo, "0" * 40),
                }
                self.empty(302, headers | {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))})

        def content(self, content: bytes, wanted: str, body: bool) -> None:
            start = int(found[1]) if (found := re.fullmatch(r"bytes=(\d+)-", wanted)) else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not body:
                return
            sent = content[start:]
            if hub.cuts:
                self.wfile.write(sent[: hub.cuts.pop(0)])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
            else:
                self.wfile.write(sent)

        def empty(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keep the output of the tests clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def random_network(name: str, seed: int = 0) -> CED:
    """Return a network of the size of a published model, with random weights."""
    torch.manual_seed(seed)
    return CED(zoo.MODELS[name].config).eval()
