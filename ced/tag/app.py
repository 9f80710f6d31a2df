"""The page as an ASGI application: what is set up around the desk, and the files that it links to."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, Response, StreamingResponse

from ced.errors import ConfigError
from ced.tag import page
from ced.tag.desk import KEPT_SECONDS, SWEEP_SECONDS, TITLE, Access, Desk
from ced.tag.guard import Guard
from ced.tag.hearing import Hearing
from ced.tag.results import FORMATS
from ced.tag.shelf import Kept, Shelf
from ced.tag.timeline import Filter, mel_picture, png


@contextmanager
def serving(hearing: Hearing, access: Access) -> Iterator[fastapi.FastAPI]:
    """Give the page as an ASGI application; all that strangers hand over is in a folder that is gone at the end.

    Nothing is sent anywhere: no usage figures, no checks for versions, and pages may load nothing from elsewhere.
    """
    with TemporaryDirectory(prefix="ced-app-") as name:
        folder = Path(name).resolve()
        with _environment(
            GRADIO_TEMP_DIR=str(folder / "uploads"),
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_OFFLINE="1",
            HF_HUB_DISABLE_TELEMETRY="1",
        ):
            yield _application(hearing, access, folder)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Server(uvicorn.Server):
    """Ends when it is told to: pages hold connections open for as long as they are shown."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open, so that nothing waits for it to end by itself, and end."""
        for connection in self.server_state.connections:
            connection.transport.close()
        await super().shutdown(sockets)


def _application(hearing: Hearing, access: Access, folder: Path) -> fastapi.FastAPI:
    shelf, uploads = Shelf(folder / "sounds"), folder / "uploads"

    @asynccontextmanager
    async def sweeping(_: fastapi.FastAPI) -> AsyncIterator[None]:
        async def forever() -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                await asyncio.to_thread(shelf.sweep)
                await asyncio.to_thread(_remove_stale, uploads)

        task = asyncio.create_task(forever())
        yield
        task.cancel()

    app = fastapi.FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None, lifespan=sweeping)
    app.add_middleware(Guard, loopback=access.loopback)
    app.get("/sounds/{token}/clip.flac")(partial(_clip, shelf))
    app.get("/sounds/{token}/mel.png")(partial(_mel, shelf))
    app.get("/sounds/{token}/{kind}")(partial(_download, shelf))
    gr.mount_gradio_app(
        app,
        Desk(hearing, access, shelf, uploads, folder / "fetched").blocks(),
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=hearing.limits.bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font="system-ui, sans-serif", font_mono="monospace"),
        css=page.CSS,
        head=f"<script>{page.JAVASCRIPT}</script>",
    )
    return app


def _remove_stale(uploads: Path) -> None:
    """Remove what Gradio leaves behind of uploads, besides the files that it removes itself."""
    for path in uploads.glob("*"):
        if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def _clip(shelf: Shelf, token: str) -> Response:
    kept = _found(shelf, token)
    return FileResponse(kept.clip.path, media_type="audio/flac", headers={"Cache-Control": "no-store"})


def _mel(shelf: Shelf, token: str) -> Response:
    drawn = png(mel_picture(_found(shelf, token).timeline.mel))
    return Response(drawn, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _download(
    shelf: Shelf,
    token: str,
    kind: str,
    threshold: float = 0.5,
    only: list[str] = fastapi.Query([]),  # noqa: B008
) -> Response:
    kept = _found(shelf, token)
    make = FORMATS[kind].text if kind in page.DOWNLOADS else None
    if make is None:
        raise fastapi.HTTPException(404, f"there is no {kind}; there are {', '.join(page.DOWNLOADS)}")
    try:
        record = kept.timeline.record(Filter(threshold, tuple(only)))
    except ConfigError as error:
        raise fastapi.HTTPException(422, str(error)) from error
    text = (piece.encode("utf-8", "backslashreplace") for piece in make([record]))
    headers = {"Content-Disposition": f'attachment; filename="tags{FORMATS[kind].suffix}"', "Cache-Control": "no-store"}
    return StreamingResponse(text, media_type="text/plain; charset=utf-8", headers=headers)


def _found(shelf: Shelf, token: str) -> Kept:
    kept = shelf.find(token)
    if kept is None:
        raise fastapi.HTTPException(404, "this sound is gone; hand it over again")
    return kept
