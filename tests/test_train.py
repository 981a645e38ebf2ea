"""train.py through its command line: what it leaves, kills and resumes, and the protocol that can't flatter."""

import contextlib
import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from conftest import REPOSITORY
from PIL import Image
from run_files import assert_same_files, epoch_lines, files_of, plain

import checkpoint
import data_loader
import model
import model_file
import train

FOLDS, EPOCHS = (0, 1, 2), 3
# So high a learning rate that the best epoch is the first, in which it is low, and not the last.
TRAIN = ("--model", "AudioCNN", "--epochs", EPOCHS, "--batch_size", 8, "--learning_rate", 0.1)
KILLS = 6
EPOCH_LINE = re.compile(
    r"fold (\d)  epoch (\d)/3  train_loss \d+\.\d{4}  train_acc [01]\.\d{4}  val_loss \d+\.\d{4}  val_acc [01]\.\d{4}"
    r"  lr \d\.\d\de-0\d  \d+ examples/s  left 0:\d\d:\d\d"
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, run_train):
    """(assets folder, CompletedProcess) of one training that nothing interrupted. Read it, don't write."""
    assets = tmp_path_factory.mktemp("reference") / "assets"
    done = run_train(assets)
    assert done.returncode == 0, done.stderr
    return assets, done


@pytest.fixture(scope="module")
def run_train(scripts, data):
    """A function that trains into an assets folder: run_train(assets, "--folds", 0) -> CompletedProcess."""

    def run_train(assets, *flags):
        return scripts.run("train", *TRAIN, "--processed_dir", data, "--assets_dir", assets, *flags)

    return run_train


@pytest.fixture
def assets(reference, tmp_path):
    """A copy of the reference, to harm."""
    return shutil.copytree(reference[0], tmp_path / "assets")


def refusal(done):
    """The one line that a run which can't be done ends with."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# --- A whole run -------------------------------------------------------------------------------------------------


def test_files_of_a_run(reference):
    assets, _ = reference
    expected = ["checkpoints/.state.lock", "checkpoints/training_state.json"]
    for fold in FOLDS:
        kept = [f"epoch_{epoch}.{ending}" for epoch in (2, 3) for ending in ("pt", "safetensors")]
        expected += [f"checkpoints/.fold_{fold}.lock"]
        expected += [f"checkpoints/fold_{fold}/{name}" for name in ("best_model_this_fold.pt", *kept)]
        expected += [f"models/model_fold_{fold}_best.safetensors"]
        expected += [f"results/{name}_fold_{fold}.csv" for name in ("predictions", "history")]
    results = "results.json report.md run.json confusion_matrix.png per_class.png reliability.png curves.png"
    assert files_of(assets) == sorted([*expected, *(f"results/{name}" for name in results.split())])
    assert_readable(assets)


def test_what_the_files_of_a_run_say(reference):
    assets, _ = reference
    state = json.loads((assets / "checkpoints" / "training_state.json").read_text())
    settings = state["settings"]
    assert (settings["epochs"], settings["batch_size"], settings["validation"]) == (EPOCHS, 8, "next_fold")
    for fold in FOLDS:
        entry = state["folds"][str(fold)]
        history = read_rows(assets / "results" / f"history_fold_{fold}.csv")
        losses = [float(row[history[0].index("validation_loss")]) for row in history[1:]]
        best = 1 + int(np.argmin(losses))
        assert len(losses) == EPOCHS
        assert (entry["epoch"], entry["best_epoch"], entry["done"]) == (EPOCHS, best, True)

        header, *rows = read_rows(assets / "results" / f"predictions_fold_{fold}.csv")
        assert header == ["slice_file_name", "classID", "dog_bark", "siren"]
        clips = range(8 * fold, 8 * fold + 8)
        assert [row[:2] for row in rows] == [[f"{clip}-{clip % 2}-0-0.wav", str(clip % 2)] for clip in clips]
        shares = np.array([row[2:] for row in rows], float)
        np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
        accuracy = float((shares.argmax(axis=1) == [int(row[1]) for row in rows]).mean())

        _, info = model_file.load_model(model_file.model_path(assets / "models", fold))
        assert info["temperature"] == entry["temperature"]
        run = json.loads((assets / "results" / "run.json").read_text())
        assert run["temperatures"][str(fold)] == entry["temperature"]
        assert info["scores"] == {"test_accuracy": accuracy, "test_clips": 8, "best_epoch": best}
        assert info["training_folds"] == [(fold + 2) % 3 + 1]
        assert info["settings"] == settings
        folder = assets / "checkpoints" / f"fold_{fold}"
        newest = checkpoint.load_newest(folder)
        assert plain(torch.load(folder / "best_model_this_fold.pt", weights_only=True)["model"]) == plain(
            checkpoint.best_weights(newest)
        )
        chosen, _ = model_file.load_model(model_file.model_path(assets / "models", fold))
        assert plain(chosen.state_dict()) == plain(checkpoint.best_weights(newest))


def network_outputs(assets, fold, clips_fold, data):
    """Return (logits, columns of the true classes) of a data set's fold by a fold's model file, computed plainly."""
    network, _ = model_file.load_model(model_file.model_path(assets / "models", fold))
    processed = data_loader.load_processed(data)
    members = processed.folds == clips_fold
    with torch.inference_mode():
        features = torch.from_numpy(processed.features[members].astype(np.float32))
        return network(features), torch.from_numpy(processed.labels[members])


def test_chosen_weights_have_the_best_validation_loss_and_gave_the_predictions(reference, data):
    assets, _ = reference
    for fold in FOLDS:
        header, *rows = read_rows(assets / "results" / f"history_fold_{fold}.csv")
        losses = [float(row[header.index("validation_loss")]) for row in rows]
        loss = torch.nn.functional.cross_entropy(*network_outputs(assets, fold, (fold + 1) % 3 + 1, data))
        assert float(loss) == pytest.approx(min(losses), rel=0.02)  # the validation may compute in bfloat16
        assert losses[-1] > 1.1 * min(losses)  # so that the last weights are not the best

        logits, _ = network_outputs(assets, fold, fold + 1, data)
        rows = read_rows(assets / "results" / f"predictions_fold_{fold}.csv")[1:]
        shares = np.array([row[2:] for row in rows], float)
        np.testing.assert_allclose(shares, logits.softmax(dim=1).numpy(), atol=1e-5)


def test_temperature_is_that_of_the_validation_clips(reference, data):
    state = json.loads((reference[0] / "checkpoints" / "training_state.json").read_text())
    differences = []  # from what the test clips would give: a fold's network may answer all clips alike
    for fold in FOLDS:
        expected = train.fit_temperature(*network_outputs(reference[0], fold, (fold + 1) % 3 + 1, data))
        assert state["folds"][str(fold)]["temperature"] == pytest.approx(expected, abs=2e-3)
        differences.append(train.fit_temperature(*network_outputs(reference[0], fold, fold + 1, data)) - expected)
    assert max(map(abs, differences)) > 1e-2


def assert_no_temperature(assets, fold):
    """Without clean validation clips there is none: for the tests below that train so."""
    _, info = model_file.load_model(model_file.model_path(assets / "models", fold))
    entry = json.loads((assets / "checkpoints" / "training_state.json").read_text())["folds"][str(fold)]
    assert "temperature" not in info and "temperature" not in entry
    assert json.loads((assets / "results" / "run.json").read_text())["temperatures"] == {}
    assert "Not every fold here has a temperature" in (assets / "results" / "report.md").read_text()


def test_every_epoch_and_every_fold_has_random_numbers_of_its_own(run_train, tmp_path):
    """With a learning rate of nothing, what differs between epochs and folds are the random numbers."""
    done = run_train(tmp_path, "--folds", "0,1", "--epochs", 2, "--learning_rate", 1e-9)
    assert done.returncode == 0, done.stderr
    weights = []
    for fold in (0, 1):
        header, *rows = read_rows(tmp_path / "results" / f"history_fold_{fold}.csv")
        losses = [float(row[header.index("train_loss")]) for row in rows]
        assert len({round(loss, 4) for loss in losses}) == len(losses)
        weights.append(model_file.load_model(model_file.model_path(tmp_path / "models", fold))[0].block1[0].weight)
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_what_a_run_prints(reference):
    done = reference[1]
    lines = done.stdout.splitlines()
    matches = [EPOCH_LINE.fullmatch(line) for line in lines if "epoch " in line and "/" in line[:20]]
    assert [(int(match[1]), int(match[2])) for match in matches] == [(f, e) for f in FOLDS for e in (1, 2, 3)]
    assert re.search(r"^3 of 3 folds, 24 of 24 clips: accuracy [\d.]+ % ± [\d.]+ \(mean ± standard", done.stdout, re.M)
    assert sum(line.startswith("| ") for line in lines) == 2 + len(FOLDS)
    assert done.stderr == ""  # no progress bar in a file


def test_learning_rate_of_each_epoch(reference):
    settings = {"learning_rate": 0.1, "warmup_share": 0.3, "schedule": "one_cycle"}
    header, *rows = read_rows(reference[0] / "results" / "history_fold_0.csv")  # one batch an epoch
    learning_rates = [float(row[header.index("learning_rate")]) for row in rows]
    assert learning_rates == [train.learning_rate_at(step, EPOCHS, settings) for step in range(EPOCHS)]


def table(text):
    return [line for line in text.splitlines() if line.startswith("| ") or line.startswith("3 of 3 folds, ")]


def test_finished_run_prints_its_table_again(reference, assets, run_train):
    written = {path: path.stat().st_mtime_ns for path in assets.glob("[cm]*/**/*.*t*") if path.suffix != ".lock"}
    done = run_train(assets)
    assert done.returncode == 0, done.stderr
    assert epoch_lines(done.stdout) == []
    assert done.stdout.count("done already") == len(FOLDS)
    assert table(done.stdout) == table(reference[1].stdout)
    assert len(written) > 10
    unchanged = {path for path in written if path.stat().st_mtime_ns == written[path]}
    assert {path.name for path in written.keys() - unchanged} <= {"training_state.json"}
    assert_same_files(assets, reference[0])


# --- Kills and interruptions -------------------------------------------------------------------------------------


def assert_readable(assets):
    """Every file of a run is whole: the half-written are called .tmp."""
    for name in files_of(assets):
        path = assets / name
        if path.suffix == ".pt":
            assert checkpoint.read_pt(path)["epoch"] in range(1, EPOCHS + 1)
        elif path.suffix == ".safetensors":
            model_file.load_model(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = read_rows(path)
            assert len(rows) > 1
            assert {len(row) for row in rows} == {len(rows[0])}
        elif path.suffix == ".png":
            Image.open(path).load()
        else:
            assert path.name == "report.md" or path.suffix in (".lock", ".tmp")


def wait_for(condition, run):
    """Wait until condition() holds, or the run has ended."""
    while not condition() and not run.ended():
        time.sleep(0.002)


def writes(folder):
    """The files below a folder that are being written, or were when a run was killed: {(path, time)}."""
    found = set()
    for path in folder.rglob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def test_killed_at_random_moments(reference, scripts, data, tmp_path):
    assets, draw = tmp_path / "assets", random.Random(0)
    epoch_seconds = 2 * 8 / float(re.search(r"(\d+) examples/s", reference[1].stdout)[1])
    flags = (*TRAIN, "--processed_dir", data, "--assets_dir", assets)
    kills = 0
    for number in range(KILLS):
        left = writes(assets)
        run = scripts.start("train", *flags)
        if number % 2:  # inside a write of checkpoints
            wait_for(lambda left=left: writes(assets / "checkpoints") - left, run)
            time.sleep(draw.choice([0, 0.002, 0.01]))
        else:
            lines = draw.choice([0, 1, 1])
            wait_for(lambda run=run, lines=lines: len(epoch_lines(run.printed())) >= lines, run)
            time.sleep(draw.uniform(0, epoch_seconds))
        kills += run.kill()
        printed = run.wait().stdout
        assert_readable(assets)
        for fold, epoch in epoch_lines(printed):  # at most one epoch is done again
            assert checkpoint.checkpoint_epochs(assets / "checkpoints" / f"fold_{fold}")[0] >= epoch
    assert kills >= 2
    done = scripts.run("train", *flags)
    assert done.returncode == 0, done.stderr
    assert len(epoch_lines(done.stdout)) < len(FOLDS) * EPOCHS
    assert_same_files(assets, reference[0])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_how_to_resume(stop, scripts, data, tmp_path):
    flags = ("--model", "AudioCNN", "--epochs", 500, "--batch_size", 8, "--folds", 0)
    run = scripts.start("train", *flags, "--processed_dir", data, "--assets_dir", tmp_path)
    wait_for(lambda: len(epoch_lines(run.printed())) >= 2, run)
    run.kill(stop)
    done = run.wait()
    assert done.returncode == 130
    assert done.stderr.strip() == "Stopped. The same command resumes after the last completed epoch."
    assert not list(tmp_path.rglob("*.tmp"))
    assert checkpoint.load_newest(tmp_path / "checkpoints" / "fold_0")["epoch"] >= 2


def test_ctrl_c_during_the_imports_is_silent(tmp_path):
    with subprocess.Popen([sys.executable, REPOSITORY / "train.py"], stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_background_job_of_a_shell_ignores_ctrl_c(tmp_path):
    """It goes on, to find that there are no data."""
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, REPOSITORY / "train.py"]
    with subprocess.Popen([*command, "--assets_dir", tmp_path], stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "run python preprocess_data.py" in process.communicate()[1] and process.returncode == 2


# --- Resuming ----------------------------------------------------------------------------------------------------


def undo_fold(assets, fold, epoch):
    """Take a fold back to the end of an epoch: checkpoints, model, predictions and history."""
    for number in range(epoch + 1, EPOCHS + 1):
        for path in (assets / "checkpoints" / f"fold_{fold}").glob(f"epoch_{number}.*"):
            path.unlink()
    model_file.model_path(assets / "models", fold).unlink()
    for name in ("predictions", "history"):
        checkpoint.result_path(assets / "results", name, fold).unlink()


def write_state(assets, **changes):
    path = assets / "checkpoints" / "training_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def harm_ahead(assets):
    """The state says that fold 2 is done, and its files are there; its newest checkpoint is damaged."""
    path = assets / "checkpoints" / "fold_2" / "epoch_3.pt"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 4
    path.write_bytes(blob)


def harm_another_run(assets):
    undo_fold(assets, 2, 2)
    state = json.loads((assets / "checkpoints" / "training_state.json").read_text())
    write_state(assets, run_id="deadbeef", settings={**state["settings"], "seed": 99})


@pytest.mark.parametrize("harm", [harm_ahead, harm_another_run])
def test_the_checkpoints_decide(harm, reference, assets, run_train):
    harm(assets)
    done = run_train(assets)
    assert done.returncode == 0, done.stderr
    assert epoch_lines(done.stdout) == [(2, 3)]
    assert "fold 2: resuming after epoch 2 of 3" in done.stdout
    assert ("epoch_3.pt can't be used" in done.stdout) == (harm is harm_ahead)
    assert_same_files(assets, reference[0])


def test_lost_files_of_a_finished_run_are_made_again(reference, assets, run_train):
    """Those of fold 0 by training, as its checkpoints are lost too; the rest from the checkpoints."""
    for fold in (0, 2):
        path = model_file.model_path(assets / "models", fold)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoint.result_path(assets / "results", "predictions", 1).unlink()
    checkpoint.result_path(assets / "results", "history", 1).write_text("epoch\n")
    shutil.rmtree(assets / "checkpoints" / "fold_0")
    done = run_train(assets)
    assert done.returncode == 0, done.stderr
    for fold in (0, 2):
        assert f"fold {fold}: its model file is not as the training wrote it: made again" in done.stdout
    assert "fold 1: its predictions file is missing: made again" in done.stdout
    assert "fold 1: its history file is not as the training wrote it: made again" in done.stdout
    assert epoch_lines(done.stdout) == [(0, 1), (0, 2), (0, 3)]
    assert_same_files(assets, reference[0])


def test_report_after_a_new_run_leaves_the_files_of_the_one_before_out(assets, run_train, scripts, data):
    shutil.rmtree(assets / "checkpoints")
    done = run_train(assets, "--folds", 0, "--learning_rate", 0.01)
    assert done.returncode == 0, done.stderr
    again = scripts.run("evaluate", "--assets_dir", assets, "--processed_dir", data)
    for printed in (done.stdout, again.stdout):
        names = "predictions_fold_1.csv, predictions_fold_2.csv"
        assert f"1 of 3 folds, 8 of 24 clips (left out, as of a different run: {names}): accuracy" in printed
    for fold in (1, 2):
        assert f"audit: the model file of fold {fold} is not of the run in run.json" in done.stderr
    assert len(json.loads((assets / "results" / "results.json").read_text())["per_fold"]) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--epochs", 5), "epochs was 3 and is 5 now"),
        (("--learning_rate", 0.2, "--seed", 4), "learning_rate was 0.1 and is 0.2 now; seed was 0 and is 4 now"),
        (("--batch_size", 4, "--folds", 1), "batch_size was 8 and is 4 now"),
        (("--validation", "none"), "validation was next_fold and is 'none' now"),
        (("--fresh", "--folds", 2, "--seed", 4), "which stays, was trained with different settings: seed was 0"),
    ],
)
def test_changed_settings_are_refused(flags, named, assets, reference, run_train):
    line = refusal(run_train(assets, *flags))
    assert named in line
    assert "--fresh" in line
    assert_same_files(assets, reference[0])


def test_changed_data_are_refused(assets, scripts, tmp_path, random_data):
    random_data(tmp_path / "data", clips_per_fold=6)
    line = refusal(scripts.run("train", *TRAIN, "--processed_dir", tmp_path / "data", "--assets_dir", assets))
    assert "data was" in line


def change_checkpoint(assets, change):
    """Take fold 0 back by an epoch and change the checkpoint that is then its newest."""
    undo_fold(assets, 0, 2)
    path = assets / "checkpoints" / "fold_0" / "epoch_2.pt"
    content = checkpoint.read_pt(path)
    change(content)
    checkpoint.write_pt(path, content)


def test_checkpoint_of_another_network_is_refused(assets, run_train):
    change_checkpoint(assets, lambda content: content["model"].update({"logits.bias": torch.zeros(7)}))
    line = refusal(run_train(assets))
    assert "--fresh" in line
    assert "logits.bias is float32 (7,), not float32 (2,)" in line


def change_moment(change):
    """Return a change of a checkpoint: of one moment of its optimizer."""

    def change_it(content):
        moments = content["optimizer"]["state"][0]
        moments["exp_avg"] = change(moments["exp_avg"])

    return change_it


def test_moments_that_share_memory_get_their_own(assets, run_train):
    change_checkpoint(assets, change_moment(lambda tensor: torch.zeros(1).expand(tensor.shape)))
    done = run_train(assets)
    assert done.returncode == 0, done.stderr
    assert epoch_lines(done.stdout) == [(0, 3)]


@pytest.mark.parametrize(
    "change",
    [
        change_moment(lambda tensor: torch.zeros(1)),
        change_moment(lambda tensor: tensor.to(torch.int8)),
        change_moment(lambda tensor: tensor.to("meta")),
        lambda content: content["optimizer"]["state"].clear(),
    ],
    ids=["shape", "type", "no memory", "none"],
)
def test_checkpoint_whose_optimizer_does_not_fit_is_refused(change, assets, run_train):
    change_checkpoint(assets, change)
    assert "fold_0 does not fit the network: --fresh starts again" in refusal(run_train(assets))


def test_fresh_of_one_fold_keeps_the_others(assets, reference, run_train):
    checkpoints = {path: path.stat().st_mtime_ns for path in assets.glob("checkpoints/fold_*/epoch_3.pt")}
    done = run_train(assets, "--fresh", "--folds", 1)
    assert done.returncode == 0, done.stderr
    assert epoch_lines(done.stdout) == [(1, 1), (1, 2), (1, 3)]
    again = {path.parent.name for path, written in checkpoints.items() if path.stat().st_mtime_ns != written}
    assert again == {"fold_1"}
    assert_same_files(assets, reference[0])


def test_fresh_with_other_settings_and_fewer_folds_starts_again(assets, scripts, random_data, tmp_path):
    random_data(tmp_path / "data", n_folds=2)
    flags = ("--fresh", "--epochs", 1, "--validation", "none", "--processed_dir", tmp_path / "data")
    done = scripts.run("train", *TRAIN, *flags, "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    assert epoch_lines(done.stdout) == [(0, 1), (1, 1)]
    assert not [name for name in files_of(assets) if "fold_2" in name and not name.endswith(".lock")]
    assert not list(assets.rglob("epoch_3.*"))
    assert model_file.load_model(model_file.model_path(assets / "models", 0))[1]["settings"]["epochs"] == 1


def test_training_on_all_clips_is_a_model_without_a_test_beside_the_folds(assets, reference, run_train, data):
    predictions = pd.concat(pd.read_csv(path) for path in (assets / "results").glob("predictions_fold_*.csv"))
    shares = predictions[["dog_bark", "siren"]].to_numpy(float)
    shares = shares / shares.sum(axis=1, keepdims=True)
    loss = sklearn.metrics.log_loss(predictions["classID"], shares)
    done = run_train(assets, "--folds", "none")
    assert done.returncode == 0, done.stderr
    assert "no test" in done.stdout and "val_loss" not in done.stdout
    network, info = model_file.load_model(model_file.model_path(assets / "models", "none"))
    mean, _ = data_loader.band_statistics(data_loader.load_processed(data).features, range(24))
    assert info["training_folds"] == [1, 2, 3] and np.allclose(network.band_mean, mean)
    scaled = shares ** (1 / info["temperature"])
    scaled = scaled / scaled.sum(axis=1, keepdims=True)
    assert sklearn.metrics.log_loss(predictions["classID"], scaled) < loss  # fitted to the folds' tests
    assert epoch_lines(run_train(assets, "--folds", "none").stdout) == []
    evaluated = run_train(assets).stdout  # the folds are as they were, and so is their report
    assert epoch_lines(evaluated) == [] and "3 of 3 folds, 24 of 24 clips" in evaluated
    assert not list((assets / "results").glob("predictions_fold_none*"))


def test_training_on_all_clips_beside_the_results_of_another_run_leaves_them(assets, run_train):
    shutil.rmtree(assets / "checkpoints")
    before = (assets / "results" / "run.json").read_bytes()
    done = run_train(assets, "--folds", "none", "--epochs", 1, "--learning_rate", 0.01)
    assert done.returncode == 0, done.stderr
    assert "temperature" not in model_file.load_model(model_file.model_path(assets / "models", "none"))[1]
    assert (assets / "results" / "run.json").read_bytes() == before


# --- The protocol ------------------------------------------------------------------------------------------------


def swap_labels(data, folder, fold):
    """Write the processed files again with the two classes swapped in one of the data set's folds."""
    processed = data_loader.load_processed(data)
    names = list(processed.class_names.values())
    labels = np.where(processed.folds == fold, 1 - processed.labels, processed.labels)
    clips = processed.clips.assign(classID=labels, **{"class": np.array(names)[labels]})
    data_loader.save_processed(folder, processed.features, clips, processed.audio, "swapped")


@pytest.mark.parametrize(("fold", "role"), [(1, "test"), (3, "training")])
def test_labels_of_test_clips_change_no_weight_and_no_choice(fold, role, reference, data, scripts, tmp_path):
    swap_labels(data, tmp_path / "data", fold)
    done = scripts.run("train", *TRAIN, "--folds", 0, "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        {
            "weights": plain(model_file.load_model(model_file.model_path(assets / "models", 0))[0].state_dict()),
            "history": read_rows(assets / "results" / "history_fold_0.csv"),
            "predictions": [row[2:] for row in read_rows(assets / "results" / "predictions_fold_0.csv")],
            "choice": {
                name: json.loads((assets / "checkpoints" / "training_state.json").read_text())["folds"]["0"][name]
                for name in ("best_epoch", "temperature")
            },
        }
        for assets in (tmp_path, reference[0])
    )
    if role == "test":
        assert ours == theirs
        labels = [
            [row[1] for row in read_rows(a / "results" / "predictions_fold_0.csv")] for a in (tmp_path, reference[0])
        ]
        assert labels[0] != labels[1]
    else:
        assert ours["weights"] != theirs["weights"]


def test_odd_folds_a_missing_class_and_one_clip_over(data, scripts, tmp_path):
    """Folds 2, 5 and 9; one without the second class; 13 training clips in batches of 4; chosen on the test fold."""
    processed = data_loader.load_processed(data)
    keep = np.array([*range(5), *range(8, 24)])  # 5, 8 and 8 clips
    folds = np.array([2, 5, 9])[processed.folds[keep] - 1]
    labels = np.where(folds == 2, 0, processed.labels[keep])
    clips = processed.clips.iloc[keep].assign(fold=folds, classID=labels)
    clips["class"] = np.array(["dog_bark", "siren"])[labels]
    data_loader.save_processed(tmp_path / "data", processed.features[keep], clips, processed.audio, "odd")
    flags = ("--model", "AudioCNN", "--folds", 8, "--epochs", 1, "--batch_size", 4, "--validation", "test_fold")
    done = scripts.run("train", *flags, "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimistic: epoch chosen on the test fold" in done.stdout
    header, *rows = read_rows(tmp_path / "results" / "predictions_fold_8.csv")
    assert header[2:] == ["dog_bark", "siren"]
    assert len(rows) == 8
    assert_no_temperature(tmp_path, 8)
    line = refusal(scripts.run("train", "--folds", "0,4", "--assets_dir", tmp_path))
    assert "--folds [0] have no clips" in line
    assert "the folds present are [1, 4, 8]" in line


# --- What can't be trained ---------------------------------------------------------------------------------------


def test_missing_processed_files_name_the_command(scripts, data, tmp_path):
    line = refusal(scripts.run("train", "--assets_dir", tmp_path))
    assert "python preprocess_data.py" in line
    assert str(tmp_path / "data") in line
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "labels.pkl").unlink()
    line = refusal(scripts.run("train", "--assets_dir", tmp_path))
    assert "lacks labels.pkl: run python preprocess_data.py" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--epochs", "0"), "epochs is 0: it must be from 1 to 100000"),
        (("--learning_rate", "nan"), "learning_rate is nan: it must be from 1e-09 to 1000000.0"),
        (("--folds", "5-3"), "'5-3' is not a fold; folds are 0 to 9"),
        (("--folds", "7"), "--folds [7] have no clips"),
        (("--validation", "sometimes"), "'sometimes'"),
        (("--device", "toaster"), "device 'toaster' can't be used here"),
        (("--model", "SharedAudioCNN", "--crop_frames", "20"), "SharedAudioCNN can't take 128 mel bands, 20 frames ("),
    ],
)
def test_bad_flags_are_named(flags, named, run_train, tmp_path):
    done = run_train(tmp_path, *flags)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert files_of(tmp_path) == []


def test_loss_that_is_no_number_is_named_and_the_last_checkpoint_kept(run_train, tmp_path):
    flags = ("--folds", 0, "--epochs", 6, "--validation", "none", "--learning_rate", 1e4)
    line = refusal(run_train(tmp_path, *flags))
    # Where the last step of an epoch is the one too many, its losses are still numbers and its weights are not.
    loss = r"the loss is (?:nan|inf) in fold 0, epoch (\d), batch \d, at learning rate \d\.\d\de\+0\d"
    match = re.search(rf"{loss}|the weights are not finite after fold 0, epoch (\d)", line)
    assert match, line
    assert "--learning_rate" in line
    kept = int(match[1] or match[2]) - 1
    assert kept >= 1
    assert checkpoint.load_newest(tmp_path / "checkpoints" / "fold_0")["epoch"] == kept
    assert refusal(run_train(tmp_path, *flags)) == line


# --- Recipes -----------------------------------------------------------------------------------------------------


def test_recipe_by_flags(data, scripts, tmp_path):
    flags = ("--folds", 0, "--processed_dir", data, "--assets_dir", tmp_path, "--validation", "none", "--epochs", 2)
    recipe = {"schedule": "constant", "learning_rate": 0.001, "weight_decay": 0, "label_smoothing": 0, "mixup_alpha": 0}
    given = [text for name, value in recipe.items() for text in (f"--{name}", value)]
    done = scripts.run("train", *flags, *given)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert run["settings"].items() >= {**recipe, "model": "SharedAudioCNN", "epochs": 2}.items()
    header, *rows = read_rows(tmp_path / "results" / "history_fold_0.csv")
    assert {float(row[header.index("learning_rate")]) for row in rows} == {0.001}
    assert_no_temperature(tmp_path, 0)
    network, info = model_file.load_model(model_file.model_path(tmp_path / "models", 0))
    assert isinstance(network, model.SharedAudioCNN) and info["model"] == "SharedAudioCNN"
    done = scripts.run("train", *flags, "--model", "AudioNet")
    assert done.returncode == 2 and "SharedAudioCNN" in done.stderr


EDIT = """
import runpy, sys
from torch import nn
import model
class Edited(model.AudioCNN):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.block1[3] = nn.GELU()
model.MODELS["AudioCNN"] = Edited
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_run_of_an_edited_network_is_not_resumed(assets, data):
    command = [sys.executable, "-c", EDIT, *TRAIN, "--processed_dir", data, "--assets_dir", assets]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=REPOSITORY)
    assert "network was " in refusal(done)
