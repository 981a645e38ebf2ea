"""Checkpoints: the newest readable one decides, whatever happened to the files around it."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import config
import utils
from model_file import model_path
from utils import UserError

SETTINGS = {"model": "AudioCNN", "epochs": 3, "validation": "next_fold", "learning_rate": 0.003, "data": "abc"}
INFO = {"model": "AudioCNN", "fold": 0}


def make_checkpoint(epoch, best=None, run_id="0123abcd", **changes):
    """A checkpoint as train.py makes it, with a network of two tensors that tell the epoch."""
    weights = {"weight": torch.full((64, 8), float(epoch)), "bias": torch.arange(4.0) + epoch}
    best = epoch if best is None else best
    moments = {0: {"step": torch.tensor(5.0 * epoch), "exp_avg": torch.randn(64, 8)}}
    return {
        "epoch": epoch,
        "model": weights,
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.001, "params": [0, 1]}]},
        "best": {"epoch": best, "validation_loss": 0.5},
        "best_model": None if best == epoch else {"weight": torch.full((64, 8), float(best)), "bias": torch.zeros(4)},
        "history": [{"epoch": number, "train_loss": 1 / number} for number in range(1, epoch + 1)],
        "settings": dict(SETTINGS),
        "run_id": run_id,
        **changes,
    }


def same(one, other):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save_epochs(folder, *epochs, best=None):
    for epoch in epochs:
        checkpoint.save(folder, make_checkpoint(epoch, best), INFO)


@pytest.fixture
def folder(tmp_path):
    """A fold's folder with the checkpoints of epochs 1 to 3 (KEEP_EPOCHS = 2 has removed the first)."""
    folder = tmp_path / "checkpoints" / "fold_0"
    save_epochs(folder, 1, 2, 3)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- One checkpoint ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    saved = make_checkpoint(2, best=1)
    checkpoint.save(tmp_path, saved, INFO)
    assert same(checkpoint.load_newest(tmp_path), saved)
    assert names(tmp_path) == ["best_model_this_fold.pt", "epoch_2.pt", "epoch_2.safetensors"]


def test_files_are_plain_to_other_programs(tmp_path):
    from safetensors.torch import load_file

    saved = make_checkpoint(2, best=1)
    checkpoint.save(tmp_path, saved, INFO)
    assert same(torch.load(tmp_path / "epoch_2.pt", weights_only=True), saved)
    assert same(load_file(tmp_path / "epoch_2.safetensors"), saved["model"])
    best = torch.load(tmp_path / "best_model_this_fold.pt", weights_only=True)
    assert same(best, {"epoch": 1, "validation_loss": 0.5, "model": saved["best_model"]})


def test_best_weights_are_the_newest_while_those_are_the_best():
    newest, older = make_checkpoint(3), make_checkpoint(3, best=2)
    assert checkpoint.best_weights(newest) is newest["model"]
    assert checkpoint.best_weights(older) is older["best_model"]


def test_folder_without_checkpoints(tmp_path):
    assert checkpoint.load_newest(tmp_path / "fold_0") is None


# --- Damage ------------------------------------------------------------------------------------------------------


def flip_bit(path, bit):
    blob = bytearray(path.read_bytes())
    blob[bit // 8] ^= 1 << bit % 8
    path.write_bytes(blob)


def rewrite(path, **changes):
    checkpoint.write_pt(path, {**checkpoint.read_pt(path), **changes})


def without(path, key):
    content = checkpoint.read_pt(path)
    del content[key]
    checkpoint.write_pt(path, content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed at its end": lambda path: path.write_bytes(path.read_bytes()[:-512] + bytes(512)),
    "a bit of a weight": lambda path: flip_bit(path, 8 * (path.read_bytes().index(torch.full((9,), 3.0).numpy()) + 3)),
    "of another epoch": lambda path: path.write_bytes(path.with_name("epoch_2.pt").read_bytes()),
    "without its optimizer": lambda path: without(path, "optimizer"),
    "a number": lambda path: checkpoint.write_pt(path, 5),
    "best that is a list": lambda path: rewrite(path, best=[1]),
    "best without a loss": lambda path: rewrite(path, best={"epoch": 3}),
    "history of other epochs": lambda path: rewrite(path, history=[{"epoch": 3}]),
    "history of different columns": lambda path: rewrite(path, history=[{"epoch": n, str(n): 1.0} for n in (1, 2, 3)]),
    "settings without names": lambda path: rewrite(path, settings={1: 2}),
    "settings that are tensors": lambda path: rewrite(path, settings={"seed": torch.ones(3)}),
    "weights that are numbers": lambda path: rewrite(path, model={"weight": 3}),
    "weights without memory": lambda path: rewrite(path, best_model={"weight": torch.ones(3, device="meta")}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_checkpoint_that_unpacks_to_more_than_its_size_is_not_unpacked(folder, capsys):
    path, packed = folder / "epoch_3.pt", io.BytesIO()
    rewrite(path, bomb=torch.zeros(10_000_000))
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    path.write_bytes(packed.getvalue() + checkpoint.checksum(packed.getvalue()))
    assert checkpoint.load_newest(folder)["epoch"] == 2
    assert "it unpacks to more than its size" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_one_before_taken(damage, folder, capsys):
    DAMAGES[damage](folder / "epoch_3.pt")
    assert checkpoint.load_newest(folder)["epoch"] == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder / 'epoch_3.pt'} can't be used (")


def test_load_newest_every_one_damaged_names_each_with_its_reason(folder, capsys):
    rewrite(folder / "epoch_3.pt", epoch=7)
    rewrite(folder / "epoch_2.pt", epoch=torch.zeros(1).expand(100))  # of gigabytes, in a forged one
    without(shutil.copy(folder / "epoch_2.pt", folder / "epoch_1.pt"), "history")
    assert checkpoint.load_newest(folder) is None
    text = capsys.readouterr().out
    assert "epoch_3.pt can't be used (it is of epoch 7)" in text
    assert "epoch_2.pt can't be used (its epoch is no number)" in text
    assert "epoch_1.pt can't be used (it lacks history)" in text


def test_any_flipped_bit_is_noticed(folder):
    path = folder / "epoch_3.pt"
    sound = path.read_bytes()
    draw = random.Random(0)
    ends = [*range(0, 800, 7), *range(8 * len(sound) - 3000, 8 * len(sound), 7)]
    for bit in [*ends, *(draw.randrange(8 * len(sound)) for _ in range(300))]:
        path.write_bytes(sound)
        flip_bit(path, bit)
        with pytest.raises(ValueError, match="checksum"):
            checkpoint.load_checkpoint(path, 3)


class Program:
    """A pickle that makes a folder when it is opened carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["as torch saves it", "a bare pickle", "inside a checkpoint"])
def test_a_checkpoint_with_a_program_runs_nothing(form, folder, tmp_path, capsys):
    path, marker = folder / "epoch_3.pt", tmp_path / "it ran"
    if form == "a bare pickle":
        blob = pickle.dumps(Program(marker))
        path.write_bytes(blob + checkpoint.checksum(blob))
    else:
        inside = {**make_checkpoint(3), "settings": Program(marker)}
        checkpoint.write_pt(path, inside if form == "inside a checkpoint" else Program(marker))
    assert checkpoint.load_newest(folder)["epoch"] == 2
    assert "epoch_3.pt can't be used" in capsys.readouterr().out
    assert not marker.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert marker.exists()  # it does run where it is let


# --- Pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [5, 4]), (None, [5, 4, 3, 2, 1])])
def test_pruning_keeps_the_newest(keep, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "KEEP_EPOCHS", keep)
    save_epochs(tmp_path, 1, 2, 3, 4, 5)
    assert checkpoint.checkpoint_epochs(tmp_path) == kept
    files = [f"epoch_{epoch}.{ending}" for epoch in kept for ending in ("pt", "safetensors")]
    assert names(tmp_path) == sorted([*files, "best_model_this_fold.pt"])


@pytest.mark.parametrize("last_removed", ["nothing", "epoch_1.safetensors"])
def test_pruning_that_a_kill_cut_short_is_finished_by_the_next_call(last_removed, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "KEEP_EPOCHS", 2)
    save_epochs(tmp_path, 1, 2)
    monkeypatch.setattr(config, "KEEP_EPOCHS", None)
    save_epochs(tmp_path, 3)  # the kill: epoch 3 is there, and epoch 1 still
    (tmp_path / last_removed).unlink(missing_ok=True)
    monkeypatch.setattr(config, "KEEP_EPOCHS", 2)
    newest = checkpoint.load_newest(tmp_path)
    checkpoint.follow_up(tmp_path, newest, INFO)
    assert not [name for name in names(tmp_path) if name.startswith("epoch_1.")]


def test_a_file_of_a_later_epoch_does_not_push_out_the_good_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "KEEP_EPOCHS", 1)
    (tmp_path / "epoch_9.pt").write_bytes(b"damaged")
    (tmp_path / "epoch_8.pt").write_bytes(b"damaged")
    save_epochs(tmp_path, 1, 2)
    assert checkpoint.load_newest(tmp_path)["epoch"] == 2
    assert checkpoint.checkpoint_epochs(tmp_path) == [9, 8, 2]


def test_files_with_other_names_are_left_alone(folder):
    others = ["epoch_03.pt", "epoch_.pt", "epoch_1.pt.tmp", "epoch_-1.pt", "epoch_4.pt.bak", "epoch_٣.pt", "epoch_0.pt"]
    for name in others:
        (folder / name).write_bytes(b"something else")
    assert checkpoint.load_newest(folder)["epoch"] == 3
    save_epochs(folder, 4, 5)
    assert checkpoint.checkpoint_epochs(folder) == [5, 4]
    assert set(others) <= set(names(folder))


# --- training_state.json -----------------------------------------------------------------------------------------

FILES = dict.fromkeys(["predictions", "history", "model"], hashlib.blake2b(b"results", digest_size=8).hexdigest())
DONE = {"epoch": 3, "best_epoch": 2, "done": True, "files": FILES}
STATE = {
    "folds": {"0": DONE},
    "settings": SETTINGS,
    "run_id": "0123abcd",
}


def state_with(*keys, value):
    """STATE with the value at a path of keys replaced."""
    state = copy.deepcopy(STATE)
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return state


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        '{"folds": {}}',
        "\x00" * 400,
        "[" * 100_000,
        json.dumps(state_with("folds", "0", "done", value="yes")),
        json.dumps(state_with("folds", "0", "best_epoch", value=-1)),
        json.dumps(state_with("folds", "0", "temperature", value="x")),
        json.dumps(state_with("folds", "0", "note", value=float("nan"))),
        json.dumps(state_with("folds", "0", "note", value="\ud800")),
        json.dumps(state_with("folds", "01", value=STATE["folds"]["0"])),
    ],
    ids=lambda text: text[:20],
)
def test_load_state_damaged_is_named_and_ignored(text, tmp_path, capsys):
    path = tmp_path / "training_state.json"
    path.write_text(text)
    assert checkpoint.load_state(path)["folds"] == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line
    assert line.endswith("the checkpoints decide")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.text(max_size=3) | st.sampled_from(["0", "done", "epoch"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "done", "epoch"]), inner),
    max_leaves=8,
)


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(st.sampled_from([("folds",), ("folds", "0"), ("folds", "0", "done"), ("settings",), ("run_id",)]), JSON)
def test_fuzzed_state_is_used_or_ignored(keys, value):
    with tempfile.TemporaryDirectory() as folder:
        paths = folders(Path(folder))
        state = state_with(*keys, value=value)
        write_state(paths, state)
        try:
            run = checkpoint.Run(paths, SETTINGS, [0, 1])
        except UserError:
            assert state["settings"] != SETTINGS
            return
        assert checkpoint.is_state(utils.load_json(run.path))
        assert [run.is_done(fold) for fold in run.folds] == [False, False]  # nothing was trained here


def folders(tmp_path):
    return SimpleNamespace(**{name: tmp_path / name for name in ("checkpoints", "models", "results")})


def write_state(paths, state):
    utils.save_json(paths.checkpoints / "training_state.json", state)


@pytest.fixture
def paths(tmp_path):
    """The folders of a run whose folds 0 and 1 are trained; fold 0 is tested."""
    paths = folders(tmp_path)
    save_epochs(checkpoint.fold_dir(paths.checkpoints, 0), 1, 2, 3, best=1)
    save_epochs(checkpoint.fold_dir(paths.checkpoints, 1), 1, 2)
    touch_results(paths, 0)
    write_state(paths, state_with("folds", "1", value={"epoch": 2, "best_epoch": 2, "done": False}))
    return paths


def touch_results(paths, *folds):
    for fold in folds:
        for path in (
            model_path(paths.models, fold),
            checkpoint.result_path(paths.results, "predictions", fold),
            checkpoint.result_path(paths.results, "history", fold),
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text("results")


def run_of(paths, **changes):
    return checkpoint.Run(paths, {**SETTINGS, **changes}, [0, 1, 2])


def done_folds(run):
    return [fold for fold in run.folds if run.is_done(fold)]


def test_run_takes_its_state_where_the_checkpoints_agree(paths, capsys):
    run = run_of(paths)
    assert done_folds(run) == [0]
    assert run.run_id == "0123abcd"
    assert utils.load_json(run.path)["folds"]["0"] == STATE["folds"]["0"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("res")])
@pytest.mark.parametrize(
    "name",
    [
        "models/model_fold_0_best.safetensors",
        "checkpoints/fold_0/best_model_this_fold.pt",
        "checkpoints/fold_0/epoch_3.safetensors",
    ],
)
def test_fold_whose_files_are_lost_is_not_done(name, harm, paths):
    harm(paths.models.parent / name)
    assert done_folds(run_of(paths)) == []


def test_state_missing_run_id_comes_from_the_checkpoints(paths):
    (paths.checkpoints / "training_state.json").unlink()
    run = run_of(paths)
    assert done_folds(run) == []
    assert run.run_id == "0123abcd"


def test_state_ahead_of_the_checkpoints_is_not_believed(paths):
    touch_results(paths, 1)
    write_state(paths, state_with("folds", "1", value=DONE))
    assert done_folds(run_of(paths)) == [0]


@pytest.mark.parametrize("difference", [{"run_id": "another"}, {"settings": {**SETTINGS, "epochs": 90}}])
def test_state_of_a_different_run_is_ignored(difference, paths, capsys):
    write_state(paths, {**STATE, **difference})
    run = run_of(paths)
    assert "the checkpoints decide" in capsys.readouterr().out
    assert done_folds(run) == []
    assert run.run_id == "0123abcd"


def test_finished_fold_whose_checkpoints_were_removed_stays_done(paths):
    for path in checkpoint.fold_dir(paths.checkpoints, 0).iterdir():
        path.unlink()
    assert done_folds(run_of(paths)) == [0]


def test_checkpoints_of_two_machines_put_together_are_one_run(paths):
    checkpoint.save(checkpoint.fold_dir(paths.checkpoints, 2), make_checkpoint(3, run_id="elsewhere"), INFO)
    run = run_of(paths)
    assert done_folds(run) == [0]
    assert run.run_id == "0123abcd"


# --- Folds as jobs -----------------------------------------------------------------------------------------------


def test_claim_gives_each_free_fold_to_one_process(paths):
    ours, theirs = run_of(paths), run_of(paths)
    our_folds, their_folds = ours.claim(), theirs.claim()
    assert (next(our_folds), next(their_folds)) == (1, 2)
    touch_results(paths, 1, 2)
    with ours.state() as state:
        state["folds"]["1"] = state["folds"]["2"] = DONE
    assert list(our_folds) == list(their_folds) == []


def test_claim_takes_the_fold_of_a_process_that_died(paths):
    ours = run_of(paths).claim()
    with utils.try_lock(checkpoint.lock_path(paths.checkpoints, 1)):
        assert next(ours) == 2
    assert next(ours) == 1


def test_record_says_to_one_process_alone_that_its_fold_was_the_last(paths):
    one, other = run_of(paths), run_of(paths)
    assert not one.record(SimpleNamespace(number=1, newest=make_checkpoint(3)), done=True)
    assert one.epochs_left == 3
    assert other.record(SimpleNamespace(number=2, newest=make_checkpoint(3)), done=True)


# --- Settings ----------------------------------------------------------------------------------------------------


def test_check_settings_names_every_difference():
    checkpoint.check_settings(SETTINGS, dict(SETTINGS), "it")
    with pytest.raises(UserError) as caught:
        checkpoint.check_settings({**SETTINGS, "epochs": 5, "old": 1}, {**SETTINGS, "new": "x"}, "the run in somewhere")
    message = str(caught.value)
    assert message.startswith("the run in somewhere was trained with different settings: ")
    for part in ("epochs was 5 and is 3 now", "old was 1 and is None now", "new was None and is 'x' now", "--fresh"):
        assert part in message


@pytest.mark.parametrize("evidence", ["checkpoints and state", "checkpoints", "state"])
def test_different_settings_are_refused_whatever_is_left(evidence, paths):
    if "state" not in evidence:
        (paths.checkpoints / "training_state.json").unlink()
    if "checkpoints" not in evidence:
        for path in paths.checkpoints.glob("fold_*/*"):
            path.unlink()
    with pytest.raises(UserError, match="trained with different settings: epochs was 3 and is 4 now"):
        run_of(paths, epochs=4)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_remove_folds_removes_theirs_alone(paths):
    touch_results(paths, 1)
    (paths.results / "report.md").touch()
    checkpoint.remove_folds(paths, [1], SETTINGS)
    assert files(paths.checkpoints) == ["fold_0", "training_state.json"]
    assert files(paths.models) == ["model_fold_0_best.safetensors"]
    assert files(paths.results) == ["history_fold_0.csv", "predictions_fold_0.csv", "report.md"]
    assert done_folds(run_of(paths)) == [0]
    checkpoint.remove_folds(paths, [0, 1, 5], {**SETTINGS, "epochs": 9})
    assert files(paths.checkpoints) == files(paths.models) == files(paths.results) == []


def test_remove_folds_of_a_fold_on_another_disk_removes_the_link_alone(paths, tmp_path):
    link = checkpoint.fold_dir(paths.checkpoints, 1)
    shutil.move(link, tmp_path / "other_disk")
    link.symlink_to(tmp_path / "other_disk")
    checkpoint.remove_folds(paths, [1], SETTINGS)
    assert not link.is_symlink() and list((tmp_path / "other_disk").iterdir())


def test_remove_folds_beside_different_settings_removes_nothing(paths):
    with pytest.raises(UserError, match=r"fold 1 in .* stays, was trained with different settings: epochs was 3"):
        checkpoint.remove_folds(paths, [0], {**SETTINGS, "epochs": 9})
    assert done_folds(run_of(paths)) == [0]


def test_remove_folds_that_another_process_trains_is_refused(paths):
    with (
        utils.try_lock(checkpoint.lock_path(paths.checkpoints, 1)),
        pytest.raises(UserError, match="another process trains fold 1"),
    ):
        checkpoint.remove_folds(paths, [0, 1, 2], SETTINGS)
    assert done_folds(run_of(paths)) == [0]
