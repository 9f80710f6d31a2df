"""Run all of it: `python -m benchmarks.esc10 --data ESC10`. Hours on two cores; what is done is kept, so run it again.

Each fold has its folder with a configuration, a log and a model a job: any of them can be repeated by hand with the
command that the log begins with.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.esc10 import box, judge, plan, report, split
from ced.config import StoreConfig, dump
from ced.distill.teacher import store_folder
from ced.files import claimed

ROOT = Path(__file__).parents[2]
FOLDS = (5, 1, 2, 3, 4)


@dataclass(frozen=True)
class Task:
    """A job in its fold."""

    fold: int
    folder: Path
    job: plan.Job

    @property
    def made(self) -> Path:
        """What is there once the job is done."""
        suffix = ".safetensors" if self.job.command == "teacher" else ""
        return self.folder / plan.MODELS / f"{self.job.name}{suffix}"

    def __str__(self) -> str:
        return f"fold {self.fold}: {self.job.name}"


def tasks(work: Path, parts: list[str], folds: list[int], seeds: int) -> list[Task]:
    """Return what there is to do, the first to be done first."""
    found = []
    for fold in folds:
        jobs = plan.groundwork()
        if "main" in parts:
            jobs += [job for seed in range(1, seeds + 1) for job in plan.main(seed)]
        if fold == report.EXTRA_FOLD and "box" in parts:
            jobs += plan.box()
        found += [Task(fold, work / f"fold{fold}", job) for job in jobs]
    if report.EXTRA_FOLD in folds and "extra" in parts:
        found += [Task(report.EXTRA_FOLD, work / f"fold{report.EXTRA_FOLD}", job) for job in plan.extra(1)]
    return found


def words(task: Task) -> list[str]:
    """Return the command of a job; a training that was interrupted goes on."""
    job, file = task.job, f"{task.job.name}.yaml"
    if job.command == "teacher":
        return [sys.executable, "-m", "benchmarks.esc10.teachers", job.name, file]
    begun = [] if job.command == "store" else sorted(task.folder.glob(f"experiments/{job.name}/*/config.yaml"))
    resume = ["--resume", str(begun[-1].parent.relative_to(task.folder))] if begun else []
    return [sys.executable, "-m", "ced", job.command, file, *resume]


def perform(task: Task) -> None:
    """Do a job in a process of its own, with one thread: two side by side do more than one with two.

    Raises:
        RuntimeError: it failed; the message has the last line that it wrote.
    """
    task.made.parent.mkdir(exist_ok=True)
    (task.folder / f"{task.job.name}.yaml").write_text(dump(task.job.config), encoding="utf-8")
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
        done = subprocess.run(command, cwd=task.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"{task} failed with {done.returncode}: {last} (all of it: {path})")
    if job_made := _result(task):
        task.made.symlink_to(os.path.relpath(job_made, task.made.parent))


def _result(task: Task) -> Path | None:
    """Return the folder that a job has made; None for a teacher, which writes its one file itself."""
    if isinstance(task.job.config, StoreConfig):
        return task.folder / store_folder(task.job.config)
    if task.job.command == "teacher":
        return None
    return sorted(task.folder.glob(f"experiments/{task.job.name}/*/config.yaml"))[-1].parent


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
                elif len(running) < jobs and _ready(task, todo):
                    waiting.remove(task)
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


def _ready(task: Task, todo: list[Task]) -> bool:
    needed = [other for other in todo if other.fold == task.fold and other.job.name in task.job.needs]
    return all(other.made.exists() for other in needed)


def verdicts(task: Task, results: report.Results) -> None:
    """Judge what a task has made, unless that was done."""
    if task.job.arm is not None:
        if not results.of(task.job.arm, task.fold, task.job.seed):
            results.add(judge.student(task.folder, task.job, task.fold))
    elif task.job.name == "views" and not results.of(judge.ENSEMBLE, task.fold):
        for verdict in judge.ensemble(task.folder, task.fold):
            results.add(verdict)


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.esc10", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="ESC-10: meta.tsv, credits.tsv, audio/")
    parser.add_argument("--work", type=Path, default=Path("esc10"), help="folder for all that is trained")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of results.md, .json and .svg")
    parser.add_argument("--parts", nargs="+", choices=("main", "box", "extra"), default=["main", "box", "extra"])
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=FOLDS)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the arms in the main table")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = report.Results(args.out / report.RESULTS)
    todo = tasks(args.work.resolve(), args.parts, list(args.folds), args.seeds)
    with claimed(args.work / "run"):
        for fold in args.folds:
            split.prepare(args.data, args.work / f"fold{fold}", fold)
        failures = run(todo, args.jobs, results)
    report.write(results, args.out)
    if report.EXTRA_FOLD in args.folds and "box" in args.parts and not failures:
        box.ship(args.work, args.data)
    sys.exit(f"{len(failures)} of {len(todo)} failed" if failures else 0)


if __name__ == "__main__":
    main()
