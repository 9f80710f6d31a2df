import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from ced.config import FinetuneConfig, TrainConfig, check
from ced.distill.experiment import (
    State,
    as_tagger,
    create_folder,
    find_folder,
    load_state,
    logging_to,
    remove_unkept,
    save_state,
)
from ced.errors import TrainingError
from ced.model.vit import CED


def test_runs_begun_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    values = {"train_data": "t", "logitspath": "l", "model": "ced_tiny", "outputpath": tmp_path}
    folders = {create_folder(check(TrainConfig, values, "test"), "student") for _ in range(3)}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "student"}


def test_a_job_is_not_resumed_from_unfinished_folders_or_other_commands(tmp_path: Path) -> None:
    config = check(
        TrainConfig, {"outputpath": tmp_path, "train_data": "a.tsv", "logitspath": "b", "model": "ced_tiny"}, "test"
    )
    other = check(FinetuneConfig, {"outputpath": tmp_path, "train_data": "a.tsv", "model": "ced_tiny"}, "test")
    begun = create_folder(config, "run", ["7"])
    create_folder(other, "run", ["7"])
    begun.rename(tmp_path / "run" / f".{begun.name}.0123abcd.partial")  # killed before it got its name
    assert find_folder(config, "run", ["7"]) is None
    begun = create_folder(config, "run", ["7"])
    assert find_folder(config, "run", ["7"]) == begun
    assert find_folder(config, "run", []) is None


def test_the_best_networks_are_kept_and_of_equals_the_earlier() -> None:
    state = State()
    files = [
        state.add_validation(map, epoch, n_saved=2) for epoch, map in enumerate([0.3, 0.5, 0.2, 0.5, 0.6], start=1)
    ]
    assert files == [
        "best_ep001_mAP_0.3000.safetensors",
        "best_ep002_mAP_0.5000.safetensors",
        None,
        "best_ep004_mAP_0.5000.safetensors",
        "best_ep005_mAP_0.6000.safetensors",
    ]
    assert [epoch for _, epoch, _ in state.kept] == [5, 2]
    assert state.stale == 0


def test_validations_without_gain_are_counted() -> None:
    state = State()
    stale = []
    for epoch, map in enumerate([0.3, 0.3, 0.2, 0.4, 0.1], start=1):
        state.add_validation(map, epoch, n_saved=1)
        stale.append(state.stale)
    assert stale == [0, 1, 2, 0, 1]


def test_networks_that_are_not_kept_are_removed(tmp_path: Path) -> None:
    names = ["best_ep001_mAP_0.3000.safetensors", "best_ep002_mAP_0.4000.safetensors", "last.safetensors"]
    for name in [*names, "resume.pt.partial"]:
        (tmp_path / name).touch()
    remove_unkept(tmp_path, State(kept=[(0.4, 2, names[1])]))
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


def test_a_state_is_read_back_without_executing_anything(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    state = State(3, [{"epoch": 1, "loss": 0.5}], [(0.5, 1, "best")], 2, 1, False, {"network": {"w": torch.ones(2)}})
    save_state(tmp_path, state)
    read = load_state(tmp_path)
    assert read is not None
    assert torch.equal(read.stepper["network"]["w"], torch.ones(2))
    assert (read.epoch, read.history, read.kept, read.stale) == (3, state.history, state.kept, 2)
    torch.save({"epoch": print}, tmp_path / "resume.pt")
    with pytest.raises(TrainingError, match="damaged"):
        load_state(tmp_path)


def test_a_network_is_saved_as_a_tagger_of_the_same_weights(small_network: CED) -> None:
    network = copy.copy(small_network)
    network.config = dataclasses.replace(network.config, pooling="logit")
    mel = torch.randn(2, 64, 40)
    with torch.no_grad():
        torch.testing.assert_close(as_tagger(network).forward_mel(mel), network.forward_mel(mel).sigmoid())
    assert network.config.pooling == "logit"


def test_messages_are_logged_only_within_the_context(tmp_path: Path) -> None:
    logger = logging.getLogger("ced.somewhere")
    with logging_to(tmp_path / "train.log"):
        logger.info("inside")
    logger.warning("outside")
    assert (tmp_path / "train.log").read_text().endswith(" INFO inside\n")
