"""The desk, which Gradio makes: a sound is dropped, recorded or named by its address, and its timeline shown."""

import html
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from ced.errors import CedError
from ced.progress import Progress
from ced.tag import page
from ced.tag.fetch import fetch
from ced.tag.hearing import DETAILS, Hearing
from ced.tag.shelf import Shelf
from ced.tag.timeline import Filter, clock, unit

TITLE = "CED: what is heard"
DETAIL = "2 s"  # unless another is chosen
MOST_ROWS = 20
SWEEP_SECONDS = 60
KEPT_SECONDS = 600  # that an upload stays which nothing was made of
_WAITING = 16  # sounds in the queue


@dataclass(frozen=True)
class Access:
    """What those who open the page may do."""

    addresses: bool = True  # have sounds fetched from the internet
    private: bool = False  # and from this machine and its networks
    loopback: bool = True  # nobody but this machine's users: other names of it are refused


class Desk:
    """The parts of the page and what happens when they are used."""

    def __init__(self, hearing: Hearing, access: Access, shelf: Shelf, uploads: Path, fetched: Path) -> None:
        self._hearing, self._access, self._shelf = hearing, access, shelf
        self._uploads, self._fetched = uploads, fetched

    def blocks(self) -> gr.Blocks:
        """Lay the page out."""
        limits = self._hearing.limits
        blocks: gr.Blocks
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)) as blocks:
            gr.Markdown(
                f"## What is heard\nModel: {page.escaped(self._hearing.model)}. Up to {limits.minutes:g} min and"
                f" {limits.megabytes:g} MB a sound; what you hand over is deleted after use."
            )
            with gr.Row():
                with gr.Column(scale=3):
                    with gr.Tab("File"):
                        file = gr.File(show_label=False, type="filepath", height=130, elem_id="ced-file")
                    with gr.Tab("Microphone"):
                        microphone = gr.Audio(
                            sources=["microphone"], type="filepath", show_label=False, elem_id="ced-microphone"
                        )
                    if self._access.addresses:
                        with gr.Tab("Address"):
                            address = gr.Textbox(placeholder="https://...", show_label=False, submit_btn="Fetch")
                with gr.Column(scale=2):
                    detail = gr.Dropdown(
                        list(DETAILS), value=DETAIL, label="Windows (tags again)", elem_id="ced-windows"
                    )
                    threshold = gr.Slider(0, 1, Filter.threshold, step=0.01, label="Threshold", elem_id="ced-threshold")
                    only = gr.Dropdown(
                        self._labels(), multiselect=True, label="Only these labels", elem_id="ced-only", filterable=True
                    )
                    rows = gr.Slider(1, MOST_ROWS, Filter.rows, step=1, label="Rows of the picture")
            player = gr.HTML(js_on_load=None, elem_id="ced-sound")
            picture = gr.HTML(js_on_load=None, elem_id="ced-timeline")
            events = gr.HTML(js_on_load=None, elem_id="ced-table")

            choices, shown = [detail, threshold, only, rows], [player, picture, events]
            long: dict[str, Any] = {"concurrency_id": "hearing", "concurrency_limit": 1, "show_progress_on": picture}
            for source, handed, name in (
                (file, file.upload, "file"),
                (microphone, microphone.stop_recording, "microphone"),
            ):
                _take_only(source, self._uploads)
                heard = handed(self.hear_file, [source, *choices], shown, api_name=name, **long)
                for after in (heard.success, heard.failure):  # `then` is not called after errors
                    after(lambda: None, None, source, queue=False, api_visibility="undocumented")
            if self._access.addresses:
                address.submit(self.hear_address, [address, *choices], shown, api_name="address", **long)
            detail.input(self.hear_again, choices, shown, api_name="again", **long)
            gr.on(
                [threshold.change, only.change, rows.change],
                self.redraw,
                choices,
                [picture, events],
                queue=False,
                trigger_mode="always_last",
                show_progress="hidden",
                api_name="redraw",
            )
            blocks.unload(self.leave)
        blocks.queue(max_size=_WAITING)
        return blocks

    def _labels(self) -> list[str]:
        return sorted(self._hearing.tagger.labels.names)

    def hear_file(
        self,
        path: str | None,
        detail: str,
        threshold: float,
        only: list[str],
        rows: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio finds it there)
    ) -> list[Any]:
        """Tag an upload, and delete it."""
        if path is None:
            return [gr.skip()] * 3
        upload = Path(path)
        try:
            with _shown_errors():
                self._hear(upload, _owner(request), detail, progress)
        finally:
            shutil.rmtree(upload.parent, ignore_errors=True)  # Gradio gives each upload a folder
        return self._show(_owner(request), _filter(threshold, only, rows))

    def hear_address(
        self,
        address: str,
        detail: str,
        threshold: float,
        only: list[str],
        rows: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Tag what an address holds."""
        self._fetched.mkdir(exist_ok=True)
        with _shown_errors(), TemporaryDirectory(dir=self._fetched) as folder:
            progress(0, desc="fetching")
            most, private = self._hearing.limits.bytes, self._access.private
            self._hear(fetch(address, Path(folder), most=most, private=private), _owner(request), detail, progress)
        return self._show(_owner(request), _filter(threshold, only, rows))

    def hear_again(
        self,
        detail: str,
        threshold: float,
        only: list[str],
        rows: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Tag the sound that is there once more, in other windows."""
        kept = self._shelf.get(_owner(request))
        if kept is None:
            return [gr.skip()] * 3
        with _shown_errors():
            timeline = self._hearing.score(kept.clip, DETAILS[detail], _reporting(progress))
        self._shelf.put(_owner(request), kept.clip, timeline)
        return self._show(_owner(request), _filter(threshold, only, rows))

    def redraw(self, detail: str, threshold: float, only: list[str], rows: int, request: gr.Request) -> list[Any]:
        """Show what is there under other filters, without the model."""
        if self._shelf.get(_owner(request)) is None:
            return [gr.skip()] * 2
        return self._show(_owner(request), _filter(threshold, only, rows))[1:]

    def leave(self, request: gr.Request) -> None:
        """Remove the sound of someone who has closed the page."""
        self._shelf.forget(_owner(request))

    def _hear(self, path: Path, owner: str, detail: str, progress: gr.Progress) -> None:
        progress(0, desc="reading")
        room = self._shelf.room()
        try:
            clip = self._hearing.take_in(path, path.name, room)
            path.unlink()
            self._shelf.put(owner, clip, self._hearing.score(clip, DETAILS[detail], _reporting(progress)))
        except BaseException:
            shutil.rmtree(room, ignore_errors=True)
            raise

    def _show(self, owner: str, chosen: Filter) -> list[Any]:
        kept = self._shelf.get(owner)
        if kept is None:
            raise gr.Error("this sound is gone; hand it over again", print_exception=False)
        with _shown_errors():
            timeline = kept.timeline
            heat = timeline.heat(chosen)
            drawn = page.picture(kept, heat, chosen)
            return [page.player(kept), drawn, page.table(kept, timeline.record(chosen), chosen)]


def _take_only(component: gr.components.Component, uploads: Path) -> None:
    """Let a component take what was uploaded, and nothing else that a request may name.

    Gradio itself would fetch addresses, whatever their size, and read any file where it is mounted in an application.
    This is no subclass because Gradio writes a file beside the module of each that it meets.
    """
    move = component.async_move_resource_to_block_cache

    async def take(path: str | Path | None) -> str | None:
        if path is not None and not Path(path).resolve().is_relative_to(uploads):
            raise gr.Error("only what was uploaded is read", print_exception=False)
        moved: str | None = await move(path)
        return moved

    component.async_move_resource_to_block_cache = take  # type: ignore[method-assign, assignment]


def _owner(request: gr.Request) -> str:
    if not request.session_hash:
        raise gr.Error("a call needs a session", print_exception=False)
    return str(request.session_hash)


def _filter(threshold: float, only: Sequence[str] | None, rows: float) -> Filter:
    return Filter(float(threshold), tuple(only or ()), int(rows))


def _reporting(progress: gr.Progress) -> Progress:
    def report(task: str, done: int, total: int) -> None:
        progress(done / total, desc=f"{task}: {clock(done, total)} of {clock(total, total)} {unit(total)}")

    return report


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Show what is wrong with a sound to whoever handed it over; other errors are for the log alone."""
    try:
        yield
    except CedError as error:
        message = html.escape(str(error))
        raise gr.Error(message, duration=None, print_exception=False) from error
