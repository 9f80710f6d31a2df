"""The guides, run as they stand, on weights and sounds that are made here."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ced.cli import main
from ced.model import checkpoints
from ced.model.vit import CED, ModelConfig
from ced.sound.audio import load
from ced.sound.labels import ClassTable

DOCS = Path(__file__).parents[1] / "docs"
SMALL = ModelConfig(embed_dim=64, num_heads=1, depth=1)


def blocks(page: str, language: str) -> list[str]:
    """Return what stands between fences of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


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
    checkpoints.save(tmp_path / "made.safetensors", network)
    monkeypatch.chdir(tmp_path)
    (command,) = blocks("probe.md", "")[:1]
    monkeypatch.setattr(sys, "argv", command.replace("ced_tiny", "made.safetensors").split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert np.load("vectors.npy").shape == (48, 64)
    capsys.readouterr()
    probe, encoder = blocks("probe.md", "python")
    exec(probe, {})
    accuracy = re.match(r"accuracy (0\.\d+), folds \[0\.\d+, 0\.\d+\]\n$", capsys.readouterr().out)
    assert accuracy
    assert float(accuracy[1]) > 0.6  # chance is a third
    names: dict[str, Any] = {}
    exec(encoder.replace("ced_tiny", "made.safetensors"), names)
    assert names["encoder"](torch.zeros(1, 16_000)).shape == (1, 6, 64)


def test_transformers_from_the_pipeline_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from ced.model.hf import CedFeatureExtractor, CedForAudioClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = CED(SMALL).eval()
    CedForAudioClassification.from_network(network).save_pretrained("published")
    CedFeatureExtractor().save_pretrained("published")
    checkpoints.save(Path("experiments/mine/averaged.safetensors"), network)
    rng = np.random.default_rng(0)
    clips = [
        {"wave": rng.uniform(-loud, loud, 8_000 + 800 * loud).astype(np.float32), "label": int(loud > 1)}
        for loud in (1, 2, 1, 2)
    ]
    names: dict[str, Any] = {"clips": clips}
    for block in blocks("hf.md", "python"):
        code = block.replace("mispeech/ced-mini", "published").replace('"run",', '"run", use_cpu=True,')
        code = code.replace('classify("a.wav"', 'found = classify(clips[0]["wave"]')
        exec(code, names)
    assert len(names["found"]) == 3
    again = checkpoints.build(checkpoints.read(Path("mine.safetensors")))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())
    tuned = checkpoints.read(Path("dog_or_rain"))
    assert (tuned.labels, tuned.config.activation) == (ClassTable(("dog", "rain")), "softmax")
