"""The experiment on ESC-10, in small: 10 classes of hums, one epoch of everything."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
from onnx import TensorProto, helper, numpy_helper

from benchmarks.esc10 import __main__ as esc10
from benchmarks.esc10 import outside, plan, report, split
from benchmarks.esc10.judge import ENSEMBLE, Clips, Verdict, divergence
from ced.config import FinetuneConfig, TrainConfig, check
from ced.errors import ConfigError, TableError
from ced.sound.labels import audioset
from ced.sound.tables import read_table, write_table

FOLDS = (1, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of ten classes; in each two clips of one source, and one of another."""
    folder = tmp_path_factory.mktemp("hums")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for fold in FOLDS:
        for label in range(plan.CLASSES):
            for source, take in ((1000 * fold + label, "A"), (1000 * fold + label, "B"), (2000 * fold + label, "A")):
                filename = f"{fold}-{source}-{take}-{label}.wav"
                hum = np.sin(2 * np.pi * 100 * (label + 1) * np.arange(5 * 8000) / 8000)
                soundfile.write(folder / "audio" / filename, 0.1 * hum + 0.01 * rng.standard_normal(len(hum)), 8000)
                rows.append((filename, str(fold), str(label), f"hum {label}"))
    write_table(
        folder / "meta.tsv", dict(zip(("filename", "fold", "label", "name"), zip(*rows, strict=True), strict=True))
    )
    licences = ["CC0"] * (len(rows) - 1) + ["CC-Sampling+"]
    write_table(folder / "credits.tsv", {"filename": [row[0] for row in rows], "license": licences})
    return folder


def test_what_chooses_never_judges_and_sources_stay_together(data: Path) -> None:
    clips, names = split.read_clips(data)
    parts = split.split(clips, 5)
    assert names == [f"hum {label}" for label in range(10)]
    assert [len(parts[table]) for table in split.TABLES] == [20, 10, 30]
    assert {clip.fold for clip in parts["judge"]} == {5}
    assert not {clip.source for clip in parts["choose"]} & {clip.source for clip in parts["learn"]}
    assert {clip.label for clip in parts["choose"]} == set(range(10))


def test_mixtures_are_of_what_is_learned_from(data: Path, tmp_path: Path) -> None:
    split.prepare(data, tmp_path, 5)
    mixed = read_table(tmp_path / "mixed.tsv")
    learned = read_table(tmp_path / "learn.tsv").column("filename")
    files, labels = mixed.column("filename"), mixed.column("labels")
    assert list(files[: len(learned)]) == list(learned)
    assert len(files) == (1 + split.MIXTURES) * len(learned)
    assert any(";" in text for text in labels[len(learned) :])
    wave, rate = soundfile.read(files[-1])
    assert (len(wave), rate) == (80_000, 16_000)


def test_a_quiet_sound_has_its_share_of_a_mixture() -> None:
    loud, quiet = np.zeros((2, 16_000), np.float32)
    time = np.arange(16_000) / 16_000
    loud[:], quiet[:] = np.sin(2 * np.pi * 100 * time), 0.01 * np.sin(2 * np.pi * 1000 * time)
    power = np.abs(np.fft.rfft(split.mix(loud, quiet, 0.25)))
    assert power[1000] / power[100] == pytest.approx(3, rel=1e-3)
    assert np.abs(split.mix(loud, loud, 0.5)).max() <= 1
    assert not split.mix(np.zeros_like(loud), np.zeros_like(loud), 0.5).any()


def test_nothing_learns_from_what_may_not_be_given_away(data: Path, tmp_path: Path) -> None:
    (last,) = set(read_table(data / "credits.tsv").column("filename")) - split.shippable(data)
    for fold in FOLDS:
        split.prepare(data, tmp_path / str(fold), fold)
    tables = {
        (fold, table): {
            Path(name).name for name in read_table(tmp_path / str(fold) / f"{table}.tsv").column("filename")
        }
        for fold in FOLDS
        for table in split.TABLES
    }
    assert [place for place, names in tables.items() if last in names] == [(5, "judge")]


def students_of(jobs: list[plan.Job]) -> list[FinetuneConfig | TrainConfig]:
    """Return the configurations of those that are judged."""
    configs = [job.config for job in jobs if job.arm]
    students = [config for config in configs if isinstance(config, FinetuneConfig | TrainConfig)]
    assert len(students) == len(configs)
    return students


def test_all_arms_of_a_table_take_the_same_steps() -> None:
    students = students_of(plan.main(1))
    brief = students_of(plan.extra(1))
    same = ("eval_data", "model", "model_args", "batch_size", "optimizer_args", "warmup_iters", "seed", "mode")
    for key in same:
        assert len({str(getattr(config, key)) for config in [*students, *brief]}) == 1
    assert {config.epochs * (config.epoch_length or 0) for config in students} == {2700}
    *shorter, longer = (config.epochs * (config.epoch_length or 0) for config in brief)
    assert set(shorter) == {2700 // plan.BRIEF}
    assert longer == 2700 * plan.LONGER
    assert {config.valid_every * (config.epoch_length or 0) for config in [*students, *brief]} == {plan.VALID}
    one, two = ({job.name for job in plan.main(seed) if job.arm} for seed in (1, 2))
    assert one.isdisjoint(two)


def test_each_job_is_done_once_a_fold_and_only_where_it_is_needed(tmp_path: Path) -> None:
    everything = esc10.tasks(tmp_path, ["main", "box", "extra"], [1, 5], seeds=2)
    places = [(task.fold, task.job.name) for task in everything]
    assert len(places) == len(set(places))
    assert places.index((1, "views_unmixed")) < places.index((1, "ced_recordings-1"))
    assert all(place[0] == 5 for place in places if place[1] in ("box-1", "short-1"))
    box = [task.job.name for task in esc10.tasks(tmp_path, ["box"], [5], seeds=1)]
    assert box == [*plan.TEACHERS, "views", "mae_box", "box-1"]


def test_the_whole_run_resumes_and_is_judged(data: Path, tmp_path: Path) -> None:
    fold = tmp_path / "fold5"
    split.prepare(data, fold, 5)
    names = [*plan.TEACHERS, "views", "labels_mixup-1", "ced-1"]
    todo = brief(tmp_path, *names)
    results = report.Results(tmp_path / report.RESULTS)
    assert esc10.run(todo, 2, results) == []
    assert {one.arm for one in results.verdicts} == {*plan.TEACHERS, ENSEMBLE, "labels_mixup", "ced"}
    assert all(0 <= one.accuracy <= 1 and len(one.per_class) == 10 for one in results.verdicts)
    written = {path: path.stat().st_mtime_ns for path in fold.rglob("*") if path.is_file()}
    again = report.Results(tmp_path / report.RESULTS)
    esc10.check_made(todo)
    assert esc10.run(todo, 2, again) == []
    assert again.verdicts == results.verdicts
    assert {path: path.stat().st_mtime_ns for path in fold.rglob("*") if path.is_file()} == written
    changed = brief(tmp_path, *names, seed=2)
    with pytest.raises(ConfigError, match=r"the plan has changed .* delete them") as stale:
        esc10.check_made(changed)
    made = [fold / "models" / f"{name}.safetensors" for name in plan.TEACHERS]
    made += [(fold / "models" / name).resolve() for name in ("views", "labels_mixup-1", "ced-1")]
    assert str(stale.value).endswith("another --work: " + " ".join(map(str, made)))
    with pytest.raises(ConfigError, match=r"--work: \S+/fold5/views/\S+ \S+/experiments/ced-1/\S+$"):
        esc10.check_made([*todo[:3], *(replace(task, stands_on=tuple(changed[:1])) for task in (todo[3], todo[5]))])


def test_a_student_that_is_trained_again_is_evaluated_again(data: Path, tmp_path: Path) -> None:
    split.prepare(data, tmp_path / "fold5", 5)
    todo = brief(tmp_path, *plan.TEACHERS, "views", "ced-1")
    results = report.Results(tmp_path / report.RESULTS)
    assert esc10.run(todo, 2, results) == []
    (first,) = results.of("ced")
    shutil.rmtree((tmp_path / "fold5/models/ced-1").resolve())  # as the message says: what the link leads to
    again = brief(tmp_path, *plan.TEACHERS, "views", "ced-1", optimizer_args={"lr": 0.05})
    todo = [*todo[:-1], again[-1]]
    esc10.check_made(todo)
    assert esc10.run(todo, 2, results) == []
    (second,) = results.of("ced")
    assert second.divergence != first.divergence


def brief(work: Path, *names: str, **changes: object) -> list[esc10.Task]:
    """Return jobs of fold 5 in one epoch of two steps."""
    return shortened(esc10.tasks(work, ["main"], [5], seeds=1), *names, **changes)


def shortened(planned: list[esc10.Task], *names: str, **changes: object) -> list[esc10.Task]:
    tasks: dict[str, esc10.Task] = {}
    for task in planned:
        if task.job.name in names:
            known = type(task.job.config).model_fields
            values = {key: value for key, value in changes.items() if key in known and task.job.command != "store"}
            dumped = {**task.job.config.model_dump(), "epochs": 1, **values}
            if hasattr(task.job.config, "epoch_length"):
                dumped["epoch_length"] = 2
            config = check(type(task.job.config), dumped, task.job.name)
            below = tuple(tasks[name] for name in task.job.needs)
            tasks[task.job.name] = replace(task, job=replace(task.job, config=config), stands_on=below)
    return list(tasks.values())


def write_random_teacher(path: Path) -> None:
    """Write a graph that takes the features of EfficientAT's mn04_as, and its settings: (b, 1, 128, n) -> (b, 527)."""
    rng = np.random.default_rng(0)
    constants = {"axes": np.array([3]), "shape": np.array([-1, 128]), "weights": rng.normal(0, 0.1, (128, 527))}
    nodes = [
        helper.make_node("ReduceMean", ["features", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["b", 1, 128, "n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 527])],
        [
            numpy_helper.from_array(value.astype(np.float32 if name == "weights" else np.int64), name)
            for name, value in constants.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    shutil.copy(esc10.ROOT / "examples" / "mn04_as.yaml", path.with_suffix(".yaml"))


@pytest.mark.slow
def test_students_of_an_outside_teacher_are_judged_by_ten_classes_and_a_probe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_teacher(tmp_path / "teacher.onnx")
    split.prepare(data, tmp_path / "fold5", 5)
    monkeypatch.setattr(outside, "FREE_MIXED", "pack/labels/free_mixed1.tsv")
    split.prepare_unlabelled(tmp_path / "fold5", 1)
    free = read_table(tmp_path / "fold5" / "free.tsv")
    assert len(free) == 30  # all recordings of the other fold
    assert len(read_table(tmp_path / "fold5" / "free_mixed1.tsv")) == 60
    arms = [outside.CED, "outside_labels_views", outside.TUNED]
    planned = esc10.outside_tasks(tmp_path, f"onnx:{tmp_path / 'teacher.onnx'}", arms, [5], seeds=1)
    network = {"embed_dim": 32, "num_heads": 1, "depth": 1, "target_length": plan.FRAMES, "pad_last": False}
    names = [task.job.name for task in planned]
    todo = shortened(planned, *names, model_args=network)
    results = report.Results(tmp_path / report.RESULTS)
    assert esc10.run(todo, 2, results) == []
    found = {one.arm: one for one in results.verdicts}
    assert set(found) == {outside.TEACHER, *arms}
    assert all(one.clips and len(one.clips.right) == 30 and len(one.per_class) == 10 for one in found.values())
    assert found[outside.CED].divergence is not None
    assert found[outside.TUNED].divergence is None  # it has other classes than the teacher
    assert all(0 <= (found[arm].probe or 0) <= 1 for arm in arms)
    assert all(one.adjusted is not None and 0 <= one.adjusted <= 1 for one in found.values())
    report.write(results, tmp_path)
    page = (tmp_path / report.PAGE).read_text()
    assert "## A teacher trained on AudioSet" in page
    assert "| `outside_ced` against `outside_labels_views` | " in page


def test_the_highest_of_the_classes_that_stand_for_one_counts() -> None:
    scores = np.zeros((2, 527), np.float32)
    names = audioset().names
    scores[0, names.index("Crowing, cock-a-doodle-doo")] = 0.9
    scores[1, names.index("Ocean")], scores[1, names.index("Rain")] = 0.5, 0.4
    found = outside.ten(scores)
    assert found.shape == (2, 10)
    assert found.argmax(1).tolist() == [8, 2]
    assert found.max(1).tolist() == pytest.approx([0.9, 0.5])


def test_adjusted_scores_of_a_class_with_low_scores_win_over_usual_ones_of_another() -> None:
    learned = np.array([[0.6, 0.02], [0.4, 0.08]])
    assert outside.adjusted(np.array([[0.3, 0.06], [0.5, 0.04]]), learned).argmax(1).tolist() == [1, 0]


def test_intervals_of_a_difference_are_drawn_over_recordings() -> None:
    sources = ("a", "a", "b", "b", "c", "d", "e", "f")
    one = Clips(sources, "11111111", divergence=(0.1,) * 8)
    other = Clips(sources, "11110000", probe="00000000", divergence=(0.2,) * 8)
    accuracy, adjusted, probe, divergence = report.bootstrapped([(one, other), (one, other)])
    assert accuracy.startswith("+50.0 [")
    low, high = (float(value) for value in accuracy[accuracy.index("[") + 1 : -1].split(", "))
    assert 0 <= low < 50 < high <= 100
    assert (adjusted, probe) == ("", "")  # one of them has none
    assert divergence == "-50.0 [-50.0, -50.0]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--folds", "1", "--parts", "box"), "the box and the extra arms are of fold 5, which is not among --folds"),
        (("--jobs", "0"), "argument --jobs: '0' is not a number from 1 on"),
        (("--seeds", "x"), "argument --seeds: 'x' is not a number from 1 on"),
        (("--folds", "6"), "argument --folds: invalid choice: 6"),
        (("--out", __file__), "File exists"),
        ((), "nothing here"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.esc10", "--data", "nothing here", "--work", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=esc10.ROOT)
    assert done.returncode
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("a.wav", "1", "0"),
            "'a.wav', fold '1', label '0'; fold and label must be numbers, and file names FOLD-SOURCE-",
        ),
        (("1-2-A-0.wav", "x", "0"), "'1-2-A-0.wav', fold 'x', label '0'; fold and label must be numbers"),
    ],
)
def test_a_table_that_is_not_of_esc10_is_refused(row: tuple[str, str, str], message: str, tmp_path: Path) -> None:
    columns = ("filename", "fold", "label", "name")
    write_table(tmp_path / "meta.tsv", dict(zip(columns, ([value] for value in (*row, "dog")), strict=True)))
    with pytest.raises(TableError, match=re.escape(message)):
        split.read_clips(tmp_path)


def test_an_interrupted_run_reports_it_and_stops_its_jobs(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.esc10", "--data", str(data), "--work", str(tmp_path), "--folds", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=esc10.ROOT) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("fold 5: pictures")
        run.send_signal(signal.SIGINT)
        _, printed = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT
    assert "interrupted; the same command resumes" in printed
    assert "Traceback" not in printed
    assert not (
        tmp_path / "fold5/models/pictures.safetensors"
    ).exists()  # it waits for its jobs: this one was cut short


GOOD = asdict(Verdict("ced", 1, 1, 0.5, 0.5, 0.1, 0.1, {"dog": 0.5}, 1000))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "{}",
        "[1]",
        *(json.dumps([row]) for row in ({"arm": "ced"}, {**GOOD, "apart": 0.1}, {**GOOD, "accuracy": "a"})),
    ],
)
def test_results_of_an_earlier_version_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / report.RESULTS).write_text(json.dumps([GOOD]))
    assert [asdict(one) for one in report.Results(tmp_path / report.RESULTS).verdicts] == [GOOD]
    (tmp_path / report.RESULTS).write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json .* earlier version; delete it"):
        report.Results(tmp_path / report.RESULTS)


def test_after_a_failure_the_other_jobs_are_still_run(data: Path, tmp_path: Path) -> None:
    fold = tmp_path / "fold5"
    split.prepare(data, fold, 5)
    series, views = plan.groundwork()[1], plan.groundwork()[-1]
    broken = replace(series, name="no_such_teacher")
    kept = replace(series, config=series.config.model_copy(update={"epochs": 1}))
    no_such, other = (esc10.Task(5, fold, job) for job in (broken, kept))
    todo = [no_such, other, esc10.Task(5, fold, views, (no_such,))]
    (failure,) = esc10.run(todo, 1, report.Results(tmp_path / report.RESULTS))
    assert "fold 5: no_such_teacher failed with 2" in failure
    assert (fold / "models/series.safetensors").exists()
    assert not (fold / "models/views").exists()


def test_scores_diverge_from_others_class_by_class() -> None:
    half, sure = np.full((2, 3), 0.5, np.float32), np.tile(np.array([1, 0, 0.5], np.float32), (2, 1))
    assert divergence(half, half) == 0
    assert divergence(half, sure) == pytest.approx(2 / 3 * np.log(2), rel=1e-4)
    assert divergence(sure, half) > 4  # what is surely wrong costs much


def test_the_page_says_what_the_numbers_say(tmp_path: Path) -> None:
    results = report.Results(tmp_path / report.RESULTS)
    for place, arm in enumerate((*report.TAUGHT, *report.ARMS)):
        for fold in (1, 2):
            right, apart = 0.5 + 0.04 * place + 0.02 * fold, 0.1 - 0.01 * place
            results.add(Verdict(arm, fold, 1, right, 0.7, apart, apart / 2, {"dog": 0.7}, 1000))
    results.add(Verdict("short", 5, 1, 0.5, 0.3, 0.2, 0.1, {"dog": 0.3}, 1000))
    results.add(Verdict("short", 5, 1, 0.4, 0.3, 0.2, 0.1, {"dog": 0.3}, 1000))  # judged again
    results.add(Verdict("longer", 5, 2, 0.9, 0.9, 0.9, 0.9, {"dog": 0.9}, 1000))  # another seed is for the main table
    results.add(Verdict("longer", 5, 1, 0.45, 0.4, 0.1, 0.05, {"dog": 0.4}, 1000))
    report.write(results, tmp_path)
    page = (tmp_path / report.PAGE).read_text()
    assert "| `labels` | labels | 69.0 ± 1.4 | 0.700 ± 0.000 | 0.060 ± 0.000 | 0.030 ± 0.000 | 68.0 | 70.0 |" in page
    assert "**Still to be run:** fold 3, 4, 5 of `pictures`, `series`, `recurrent`, `ensemble`, `labels`," in page
    assert "| against `labels_mixup` | +8.0 ± 0.0 | -0.020 ± 0.000 | +20.0 ± 0.0 | -0.050 ± 0.000 |" in page
    assert "| against `ced` |  |  | +12.0 ± 0.0 | -0.030 ± 0.000 |" in page
    changed = "| `ced` | 40.0 | 0.300 | 0.200 | 0.100 |\n| 8 times the steps | 45.0 | 0.400 | 0.100 | 0.050 |"
    assert page.count(changed) == 1
    assert "One thing changed: labels" not in page
    assert "<svg" in (tmp_path / report.PLOT).read_text()
    assert len(json.loads((tmp_path / report.RESULTS).read_text())) == 2 * len((*report.TAUGHT, *report.ARMS)) + 3
