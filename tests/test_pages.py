"""The commands of README and docs/, run unchanged in a copy of a checkout, with generated weights and sounds.

Only the number of epochs is reduced to one.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch.distributed.run import get_args_parser

import ced
from ced.cli import main
from ced.model import loading, weights, zoo
from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.vit import CED
from ced.sound.audio import load
from ced.sound.labels import ClassTable

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1)
SHORT = {
    "store": "--epochs 1 --batch-size 2",
    "train": "--epochs 1 --warmup-iters 0 --batch-size 2",
    "finetune": "--epochs 1 --warmup-epochs 0 --batch-size 2",
    "pretrain": "--epochs 1 --warmup-epochs 0 --batch-size 2",
}
GIVEN = ("resources", "trainconfig", "logitconfig", "pretrainconfig", "scripts")
SCORE = r" [01]\.\d{4}\b"
PROGRAMS = ("inference.py", "run.py", "save_logits.py", "export_onnx.py")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def shortened(block: str) -> str:
    """Return commands with their training reduced to one epoch."""
    lines = block.replace("\\\n", " ").splitlines()
    for place, line in enumerate(lines):
        if found := re.match(
            r"(?:ced|python3 run\.py) (store|train|finetune|pretrain) |python3 (save_logits)\.py ", line
        ):
            lines[place] = f"{line} {SHORT[found[1] or 'store']}"
    return "\n".join(lines)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of published ones, as files of Zenodo."""
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    for name in ("ced_tiny", "ced_mini", "audiotransformer_tiny", "audiotransformer_base_4740"):
        entry = zoo.MODELS[name]
        assert entry.zenodo is not None
        torch.save(CED(entry.config).state_dict(), folder / entry.zenodo.file)
    return folder


@pytest.fixture
def place(tmp_path: Path, cache: Path) -> Iterator[Path]:
    """A checkout with a user's sounds and tables beside it, and a server of sounds."""
    for name in (*GIVEN, *PROGRAMS):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for folder in ("my_sounds", "recordings/deep", "calls/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for number, name in enumerate(("my_sounds/a.wav", "my_sounds/b.wav", "recordings/deep/a.wav", "a.wav", "a.mp3")):
        wave = np.sin(np.arange(6 * 16_000) * 0.05 * (number + 1)) + 0.1 * rng.standard_normal(6 * 16_000)
        soundfile.write(tmp_path / name, 0.3 * wave, 16_000)
    soundfile.write(tmp_path / "calls/deep/b.flac", 0.3 * wave, 16_000)
    (tmp_path / "more.txt").write_text("my_sounds/b.wav\n")
    (tmp_path / "classes.tsv").write_text("index\tname\n0\tdog\n1\train\n")
    for table in ("train", "eval"):
        (tmp_path / f"{table}.tsv").write_text("filename\tlabels\nmy_sounds/a.wav\t0\nmy_sounds/b.wav\t0;1\n")
    export(weights_of(CED(SMALL).eval()), tmp_path / "student.onnx")
    serve = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "address").write_text(f"http://127.0.0.1:{server.server_port}")
        yield tmp_path
        server.shutdown()


def run(words: list[str], place: Path, cache: Path) -> str:
    """Run a command as a user would, and return what it printed."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CED_CACHE": str(cache),
        "CED_OFFLINE": "1",
    }
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words[-1]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tag.md", "docs/distil.md", "docs/finetune.md", "docs/deploy.md"])
def test_the_commands_of_a_page(page: str, place: Path, cache: Path) -> None:
    commands = [block for block in blocks(ROOT / page, "sh") if "make " not in block]
    assert commands
    for block in commands:
        block = block.replace("https://example.org", (place / "address").read_text())
        run(["bash", "-euo", "pipefail", "-c", shortened(block)], place, cache)
    for block in blocks(ROOT / page, "python"):
        run([sys.executable, "-c", block], place, cache)


@pytest.mark.parametrize("page", ["README.md", "resources/README.md", "docs/tag.md"])
def test_printed_output_equals_that_of_the_page(page: str, place: Path, cache: Path) -> None:
    shown = blocks(ROOT / page, "console")
    assert shown
    for block in shown:
        command, _, expected = block.removeprefix("$ ").partition("\n")
        printed = run(["bash", "-c", command], place, cache)
        assert re.sub(SCORE, "", printed).strip() == re.sub(SCORE, "", expected).strip()
        # Processors may round products of 8 bits differently.
        assert [float(found) for found in re.findall(SCORE, printed)] == pytest.approx(
            [float(found) for found in re.findall(SCORE, expected)], abs=0.02
        )


def test_scripts_and_manifests_for_several_machines() -> None:
    """Scripts are valid bash, manifests name each other, and torchrun and ced have all options that are given."""
    page = DOCS / "several-machines.md"
    scripts = blocks(page, "bash")
    commands = []
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "torchrun" in words:
                commands.append(words[words.index("torchrun") + 1 :])
            elif words[:1] == ["run"]:  # the function of the script
                commands.append([*commands[-1][: commands[-1].index("ced") + 1], *words[1:]])
    service, job = yaml.safe_load_all("".join(blocks(page, "yaml")))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    commands.append(container["args"])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29400" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert len(commands) == 6
    for command in commands:
        given = get_args_parser().parse_args(["2" if word == "$SLURM_JOB_NUM_NODES" else word for word in command])
        assert (given.module, given.training_script, given.rdzv_backend) == (True, "ced", "c10d")
        assert given.rdzv_id
        assert given.max_restarts > 0
        for word in given.training_script_args:
            assert word in ("store", "train", "$@") or (ROOT / word).is_file()


def test_recordings_are_small_and_credited() -> None:
    files = sorted(path for path in (ROOT / "resources").iterdir() if path.name != "README.md")
    rows = re.findall(r"^\| `(\S+)` \|.*\| (.+) \| .+ \|$", (ROOT / "resources" / "README.md").read_text(), re.M)
    assert {path.name for path in files} == {name for name, _ in rows}
    for name, licence in rows:
        assert (ROOT / "resources" / name).stat().st_size <= 100_000
        assert licence == "public domain" or licence.startswith("[CC BY ")
        assert load(ROOT / "resources" / name).std() > 0.005


def test_the_citation_is_the_same_everywhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    (entry,) = blocks(ROOT / "README.md", "bibtex")
    fields = dict(re.findall(r"^  (\w+) += \{(.*)\},$", entry, re.M))
    assert fields["author"].split(" and ") == [
        f"{each['family-names']}, {each['given-names']}" for each in cited["authors"]
    ]
    assert fields["title"].replace("{", "").replace("}", "") == cited["title"]
    assert (fields["booktitle"], int(fields["year"])) == (cited["collection-title"], cited["year"])
    assert fields["pages"] == f"{cited['start']}--{cited['end']}"
    for author in cited["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in readme
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert {cited["url"], cited["repository-code"]} <= set(urls.values())


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    others = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "resources/README.md", "examples/README.md")]
    pages = [ROOT / "README.md", *others, *sorted((ROOT / "docs").glob("*.md"))]
    linked = set()
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                linked.add((page.parent / target).resolve())
    assert {page.resolve() for page in pages[1:]} <= linked


def test_the_version_is_the_same_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changes, re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert releases[0] == (ced.__version__, str(cited["date-released"]))
    assert cited["version"] == ced.__version__
    assert [date for _, date in releases] == sorted((date for _, date in releases), reverse=True)


def test_the_file_map_has_all_modules() -> None:
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## File map\n```text\n(.*?)^```$", page, re.M | re.S)
    named: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        assert len(line) <= 120, line
        found = re.match(r"( *)(\S+)(?: +\S.*)?$", line)
        assert found, line
        folders = folders[: len(found[1]) // 2]
        if found[2].endswith("/"):
            folders.append(found[2])
        else:
            named.add("".join(folders) + found[2])
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ced").rglob("*.py")}
    left_out = {name for name in modules if name.endswith(("/__init__.py", "/__main__.py"))} - {"ced/__init__.py"}
    assert named == modules - left_out


def test_every_error_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name in ced.__all__:
        if name.endswith("Error") and name != "CedError":
            assert re.search(rf"^\| `{name}` \|", page, re.M), name


@pytest.mark.skipif("CED_ESC10" not in os.environ, reason="CED_ESC10 names no copy of ESC-10")
def test_a_linear_probe_on_esc10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path(os.environ["CED_ESC10"])
    header, *rows = (whole / "meta.tsv").read_text().splitlines()
    chosen = [
        row for row in rows if row.split("\t")[1] in "12" and row.split("\t")[3] in ("Rain", "Dog bark", "Rooster")
    ]
    (tmp_path / "esc10" / "audio").mkdir(parents=True)
    (tmp_path / "esc10" / "meta.tsv").write_text("\n".join([header, *chosen]) + "\n")
    for row in chosen:
        name = row.split("\t")[0]
        (tmp_path / "esc10" / "audio" / name).symlink_to(whole / "audio" / name)
    torch.manual_seed(0)
    network = CED(SMALL)
    network.init_bn.train()  # random weights, but statistics of sounds, without which they see nothing
    statistics = network.init_bn.get_submodule("1")
    assert isinstance(statistics, torch.nn.BatchNorm1d)
    statistics.momentum = 0.5
    for row in chosen[::4]:
        network.init_bn(network.front_end(torch.from_numpy(load(whole / "audio" / row.split("\t")[0]))[None]))
    loading.save(tmp_path / "made.safetensors", network)
    monkeypatch.chdir(tmp_path)
    (command,) = blocks(DOCS / "probe.md", "")[:1]
    monkeypatch.setattr(sys, "argv", command.replace("ced_tiny", "made.safetensors").split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert np.load("vectors.npy").shape == (48, 64)
    capsys.readouterr()
    probe, encoder = blocks(DOCS / "probe.md", "python")
    exec(probe, {})
    accuracy = re.match(r"accuracy (0\.\d+), folds \[0\.\d+, 0\.\d+\]\n$", capsys.readouterr().out)
    assert accuracy
    assert float(accuracy[1]) > 0.6  # chance is a third
    names: dict[str, Any] = {}
    exec(encoder.replace("ced_tiny", "made.safetensors"), names)
    assert names["encoder"](torch.zeros(1, 16_000)).shape == (1, 6, 64)


def test_transformers_from_the_pipeline_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from ced.integrations.transformers import CedFeatureExtractor, CedForAudioClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = CED(SMALL).eval()
    CedForAudioClassification.from_network(network).save_pretrained("published")
    CedFeatureExtractor().save_pretrained("published")
    loading.save(Path("experiments/mine/averaged.safetensors"), network)
    rng = np.random.default_rng(0)
    clips = [
        {"wave": rng.uniform(-loud, loud, 8_000 + 800 * loud).astype(np.float32), "label": int(loud > 1)}
        for loud in (1, 2, 1, 2)
    ]
    names: dict[str, Any] = {"clips": clips}
    for block in blocks(DOCS / "hf.md", "python"):
        code = block.replace("mispeech/ced-mini", "published").replace('"run",', '"run", use_cpu=True,')
        code = code.replace('classify("a.wav"', 'found = classify(clips[0]["wave"]')
        exec(code, names)
    assert len(names["found"]) == 3
    again = loading.load_model(Path("mine.safetensors"))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())
    tuned = weights.read(Path("dog_or_rain"))
    assert (tuned.labels, tuned.config.activation) == (ClassTable(("dog", "rain")), "softmax")
