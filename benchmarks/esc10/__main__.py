"""Run all of it: `python -m benchmarks.esc10 --data ESC10`. Hours on two cores; what is done is kept, so run it again.

With `--teacher onnx:FILE`, students learn from an outside teacher that knows AudioSet instead.

It writes its page beside what it trains; `--out docs` is how the published page was made.

Each fold has its folder with a configuration, a log and a model a job: any of them can be repeated by hand with the
command that the log begins with.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from benchmarks.esc10 import box, judge, outside, plan, report, split
from ced.config import StoreConfig, dump
from ced.distill.store import store_folder
from ced.errors import CedError, ConfigError
from ced.files import claimed

ROOT = Path(__file__).parents[2]
PARTS = ("main", "box", "extra")

_children: set[subprocess.Popen[bytes]] = set()  # that run
_ending = threading.Event()


@dataclass(frozen=True)
class Task:
    """A job in its fold."""

    fold: int
    folder: Path
    job: plan.Job
    stands_on: tuple["Task", ...] = ()  # tasks that it needs

    @property
    def made(self) -> Path:
        """What is there once the job is done."""
        suffix = ".safetensors" if self.job.command == "teacher" else ""
        return self.folder / plan.MODELS / f"{self.job.name}{suffix}"

    @property
    def settings(self) -> Path:
        """The configuration that its command reads."""
        return self.folder / f"{self.job.name}.yaml"

    @property
    def written(self) -> list[Path]:
        """What its command has written so far, whether it came to an end or not."""
        if self.job.command == "teacher":
            return [self.made] if self.made.exists() else []
        if isinstance(self.job.config, StoreConfig):
            store = self.folder / store_folder(self.job.config)
            return [store] if store.exists() else []
        return [path.parent for path in sorted(self.folder.glob(f"experiments/{self.job.name}/*/config.yaml"))]

    def recipe(self) -> str:
        """Return the configuration as it is written, under a digest of the recipes that it stands on."""
        below = hashlib.sha256("".join(other.recipe() for other in self.stands_on).encode()).hexdigest()
        return f"# stands on {below[:16]}\n{dump(self.job.config)}"

    def __str__(self) -> str:
        return f"fold {self.fold}: {self.job.name}"


def outside_tasks(work: Path, teacher: str, arms: Sequence[str], folds: list[int], seeds: int) -> list[Task]:
    """Return what there is to do with an outside teacher: seed by seed, arm by arm, each in all folds."""
    found: dict[tuple[int, str], Task] = {}
    for seed in range(1, seeds + 1):
        jobs = {job.name: job for job in (*plan.teaching(), *outside.jobs(teacher, seed))}
        for arm in arms:
            for fold in folds:
                _add(found, work, fold, next(job for job in jobs.values() if job.arm == arm), jobs)
    return list(found.values())


def _add(found: dict[tuple[int, str], Task], work: Path, fold: int, job: plan.Job, jobs: dict[str, plan.Job]) -> Task:
    """Add a job behind all that it needs, unless it is there, and return its task."""
    if (fold, job.name) not in found:
        below = tuple(_add(found, work, fold, jobs[name], jobs) for name in job.needs)
        found[fold, job.name] = Task(fold, work / f"fold{fold}", job, below)
    return found[fold, job.name]


def tasks(work: Path, parts: list[str], folds: list[int], seeds: int) -> list[Task]:
    """Return what there is to do, the first to be done first."""
    wanted = []
    for fold in folds:
        jobs = plan.groundwork()
        if "main" in parts:
            jobs += [job for seed in range(1, seeds + 1) for job in plan.main(seed)]
        if fold == report.EXTRA_FOLD and "box" in parts:
            jobs += plan.box()
        wanted += [(fold, job) for job in jobs]
    if report.EXTRA_FOLD in folds and "extra" in parts:
        wanted += [(report.EXTRA_FOLD, job) for job in plan.extra(1)]
    found: dict[tuple[int, str], Task] = {}
    for fold, job in wanted:  # some are wanted more than once
        below = tuple(found[fold, name] for name in job.needs)
        found.setdefault((fold, job.name), Task(fold, work / f"fold{fold}", job, below))
    return list(found.values())


def words(task: Task) -> list[str]:
    """Return the command of a job; a training that was interrupted goes on."""
    job, file = task.job, task.settings.name
    if job.command == "teacher":
        return [sys.executable, "-m", "benchmarks.esc10.teachers", job.name, file]
    begun = [] if job.command == "store" else task.written
    resume = ["--resume", str(begun[-1].relative_to(task.folder))] if begun else []
    return [sys.executable, "-m", "ced", job.command, file, *resume]


def perform(task: Task) -> None:
    """Do a job in a process of its own, with one thread: two side by side do more than one with two.

    Raises:
        RuntimeError: it failed; the message has the last line that it wrote.
    """
    task.made.parent.mkdir(exist_ok=True)
    task.settings.write_text(task.recipe(), encoding="utf-8")
    command = words(task)
    path = task.folder / "logs" / f"{task.job.name}.log"
    path.parent.mkdir(exist_ok=True)
    found = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([found] if found else [])]),
    }
    with path.open("a", encoding="utf-8") as log:
        print(*command, file=log, flush=True)
        child = subprocess.Popen(command, cwd=task.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _children.add(child)
        if _ending.is_set():  # it was begun while the others were told to end
            child.terminate()
        code = child.wait()
        _children.remove(child)
    if code:
        last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"{task} failed with {code}: {last} (all of it: {path})")
    if not task.made.exists():  # a teacher has written it itself
        task.made.unlink(missing_ok=True)  # a link to what was deleted
        task.made.symlink_to(os.path.relpath(task.written[-1], task.made.parent))


def check_made(todo: list[Task]) -> None:
    """Make sure that what is there, and all that it stands on, was made as the plan has it now.

    Raises:
        ConfigError: something was made by another configuration.
    """
    stale = [
        path
        for task in todo
        if task.settings.exists() and task.settings.read_text(encoding="utf-8") != task.recipe()
        for path in task.written
    ]
    if stale:
        raise ConfigError(
            "the plan has changed since these were made; delete them, or take another --work: "
            + " ".join(map(str, stale))
        )


def run(todo: list[Task], jobs: int, results: report.Results) -> list[str]:
    """Do all tasks, `jobs` at a time, and judge what comes out; return what failed."""
    failures: list[str] = []
    running: dict[Future[None], Task] = {}
    waiting = list(todo)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for task in list(waiting):
                if task.made.exists():
                    waiting.remove(task)
                    verdicts(task, results)
                elif len(running) < jobs and all(other.made.exists() for other in task.stands_on):
                    waiting.remove(task)
                    results.forget(task.fold, _judged(task), task.job.seed)  # it may have been made before
                    print(f"{task} ({len(waiting)} wait)", flush=True)
                    running[pool.submit(perform, task)] = task
            if not running:
                break  # the rest waits for what failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                if error := future.exception():
                    failures.append(str(error))
                    print(error, file=sys.stderr, flush=True)
                else:
                    verdicts(task, results)
    return failures


def _judged(task: Task) -> tuple[str, ...]:
    """Return what is judged once a task is done: a student, or at the first views the teachers; else nothing."""
    if task.job.arm is not None:
        return (task.job.arm,)
    if task.job.name == outside.VIEWS:
        return (outside.TEACHER,)
    return (*plan.TEACHERS, judge.ENSEMBLE) if task.job.name == "views" else ()


def verdicts(task: Task, results: report.Results) -> None:
    """Judge what a task has made, unless that was done."""
    if all(results.of(arm, task.fold, task.job.seed) for arm in _judged(task)):
        return
    if task.job.arm is not None:
        judged = outside if task.job.outside else judge
        results.add(judged.student(task.folder, task.job, task.fold))
    elif task.job.outside:
        results.add(outside.taught(task.folder, task.fold, task.job.outside))
    else:
        for verdict in judge.ensemble(task.folder, task.fold):
            results.add(verdict)


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.esc10", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="ESC-10: meta.tsv, credits.tsv, audio/")
    parser.add_argument("--work", type=Path, default=Path("esc10"), help="folder for all that is trained")
    parser.add_argument("--out", type=Path, help="folder of results.md, .json and .svg (default: --work)")
    parser.add_argument("--teacher", help="an outside teacher that knows AudioSet, as `ced store` names it: onnx:FILE")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=outside.ARMS,
        default=outside.MAIN,
        help="with --teacher; the ones left out of the default change one thing",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the box writes into the package")
    parser.add_argument("--folds", nargs="+", type=int, choices=report.FOLDS, default=report.FOLDS)
    parser.add_argument("--seeds", type=_count, default=1, help="seeds of the students in the main table")
    parser.add_argument("--jobs", type=_count, default=2, help="processes at a time, of one thread each")
    args = parser.parse_args()
    folds, out = list(dict.fromkeys(args.folds)), args.out or args.work
    if report.EXTRA_FOLD not in folds and "main" not in args.parts:
        parser.error(f"the box and the extra arms are of fold {report.EXTRA_FOLD}, which is not among --folds")
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    work = args.work.resolve()
    if args.teacher is None:
        todo = tasks(work, args.parts, folds, args.seeds)
    else:
        teacher = _absolute(args.teacher)
        todo = outside_tasks(work, teacher, args.arms, folds, args.seeds)
    try:
        out.mkdir(parents=True, exist_ok=True)  # said now what could not be written in hours
        with claimed(args.work / "run"):
            check_made(todo)
            if args.teacher is not None:
                outside.open_teacher(teacher)  # a clear error now, not after an hour of mixing
            results = report.Results(args.work / report.RESULTS)
            for fold in folds:
                split.prepare(args.data, work / f"fold{fold}", fold)
                if args.teacher is not None:
                    split.prepare_unlabelled(work / f"fold{fold}", outside.MIXTURES)
            failures = run(todo, args.jobs, results)
        if results.verdicts:
            report.write(results, out)
        if args.teacher is None and report.EXTRA_FOLD in folds and "box" in args.parts and not failures:
            box.ship(args.work, args.data)
    except (CedError, OSError) as error:
        sys.exit(f"error: {error}")
    undone = sum(not task.made.exists() for task in todo)
    sys.exit(f"{len(failures)} failed, and {undone} of {len(todo)} are still to be done" if failures else 0)


def _absolute(teacher: str) -> str:
    """Return the name of a teacher that works in any folder."""
    kind, colon, path = teacher.partition(":")
    return f"{kind}:{Path(path).resolve()}" if colon and Path(path).exists() else teacher


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _end(number: int, _: FrameType | None) -> None:
    """End with all that runs: what went on without this would be begun a second time by the next run."""
    _ending.set()
    for child in list(_children):
        child.terminate()
    print("interrupted; the same command goes on", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
