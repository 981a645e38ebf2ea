"""services/hub.py and cards.py with the real client library, against a Hub on this machine (hub_server.py).

huggingface_hub reads its environment when it is imported, so each client is a process of its own.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from hub_server import USER
from result_files import write_run

import demo_data
from data_loader import PROCESSED_FILES, load_processed, read_clip_table, save_tables
from reports import metrics
from services import cards, events, hub

REPO = f"{USER}/sounds"
KEY = f"datasets/{REPO}"
EPOCHS = [f"checkpoints/fold_0/epoch_{epoch}.safetensors" for epoch in (1, 2)]
MODEL = "model_fold_0_best.safetensors"
SENT = {".gitattributes", *EPOCHS, MODEL, "report.md", "results.json"}


@pytest.fixture
def trained(tmp_path):
    """An assets folder with the files that a Publisher takes from a training, with any bytes in them."""
    for name in (*EPOCHS, f"models/{MODEL}", "results/report.md", "results/results.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    return tmp_path


def content(folder):
    """Return {name: bytes} of the processed files in a folder."""
    return {name: (folder / name).read_bytes() for name in PROCESSED_FILES}


@pytest.fixture
def start(scripts, server, tmp_path):
    """A function that starts a script as a client of the server and returns its Run."""

    def start(script, *arguments, **environment):
        env = {**os.environ, **server.environment(tmp_path / "home"), **environment}
        return scripts.start(script, *arguments, env=env)

    return start


def outcomes(done):
    """Return what the functions that CALL called have returned, or their errors' messages."""
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def call(start):
    """A function that calls functions of hub.py in one client process."""
    return lambda *calls, **env: start("hub_client", "call", json.dumps(calls, default=str), **env).wait()


@pytest.fixture
def publish(start, trained):
    """A function that publishes what `trained` holds."""
    return lambda **env: start("hub_client", "publish", trained, 0, **{"HF_MODEL_REPO_ID": REPO, **env}).wait()


@pytest.fixture
def push(start):
    """A function that sends what a training has left, by the command for it."""

    def push(assets, repo_id=REPO):
        return start("services.hub", "push", "--assets_dir", assets, HF_MODEL_REPO_ID=repo_id).wait()

    return push


def wait_for(run, server, request):
    """Wait until a request has come to the server, or the run has ended."""
    while not run.ended() and not any(request in line for line in server.requests):
        time.sleep(0.1)


def test_processed_files_sent_twice_and_fetched_are_equal(server, call, data, tmp_path):
    calls = [["push_processed", data, REPO]] * 2 + [["fetch_processed", tmp_path / "fetched", REPO]]
    assert outcomes(call(*calls)) == ["None"] * 3
    assert content(tmp_path / "fetched") == content(data)
    assert len(load_processed(tmp_path / "fetched").labels) == 24
    assert server.files(KEY)["README.md"].decode() == cards.data_card(data, REPO)
    assert (len(server.commits[KEY]), len(server.uploads), server.private) == (2, 4, {KEY})  # the pickles, once


def test_upload_refused_or_stalled_is_one_line_with_the_command_for_later(server, call, data):
    server.answer("POST .*/me/ill/commit/", 500, "a bell \x07 and \x1b[2J")
    server.answer("POST .*/me/stalled/commit/", None)
    words = {"me/ill": "try again later [500: a bell", "me/stalled": "no connection", "else/x": "may not write"}
    calls = [["upload_processed", data, repo_id] for repo_id in (*words, "me/no name")]
    lines = call(*calls).stderr.splitlines()
    for line, expected in zip(lines, (*words.values(), "no valid name"), strict=True):
        assert expected in line and line.isprintable()
        assert line.startswith("warning: ") and line.endswith(f"services.hub push --processed_dir {data}")


def test_fetch_refused_leaves_the_folder_alone(server, call, data, tmp_path):
    whole = content(data)
    other = json.loads(whole["features.json"])
    other["audio"]["n_mels"] = 64
    server.put("datasets/me/part", {name: text for name, text in whole.items() if name != "folds.pkl"})
    server.put("datasets/me/other", {**whole, "features.json": json.dumps(other).encode()})
    server.answer("GET /api/datasets/me/proxy", 200, "<html>log in</html>")
    server.answer("GET /api/datasets/me/stalled", None)
    words = {"part": "it lacks a file", "other": "n_mels", "proxy": "log-in page", "stalled": "no connection"}
    calls = [["fetch_processed", tmp_path / "fetched", f"me/{name}"] for name in words]
    messages = outcomes(call(*calls))
    for message, (name, expected) in zip(messages, words.items(), strict=True):
        assert message.startswith(f"error: can't fetch the data set me/{name} ") and expected in message
    assert not set(PROCESSED_FILES) & set(os.listdir(tmp_path / "fetched"))


def test_fetch_after_a_killed_one_is_done_by_one_of_two(server, start, data, tmp_path):
    server.put(KEY, content(data))
    server.answer("GET /lfs/", None)
    fetch = "hub_client", "call", json.dumps([["fetch_processed", str(tmp_path / "fetched"), REPO]])
    killed = start(*fetch)
    wait_for(killed, server, "GET /lfs/")
    assert killed.kill() and killed.wait().returncode == -signal.SIGKILL
    server.rules.clear()
    server.requests.clear()
    both = [start(*fetch) for _ in range(2)]
    assert ["None" in run.wait().stdout for run in both] == [True, True]
    assert content(tmp_path / "fetched") == content(data)
    assert set(os.listdir(tmp_path / "fetched")) == {*PROCESSED_FILES, ".hub.lock"}
    assert sum(request.startswith("GET /api/datasets/") for request in server.requests) == 1


def test_publisher_sends_pruned_epochs_and_a_resumed_run_sends_nothing_twice(server, publish, trained):
    weights = {name: (trained / name).read_bytes() for name in EPOCHS}
    done = publish()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = server.files(REPO)
    assert files.keys() == SENT
    assert {name: files[name] for name in EPOCHS} == weights
    before = len(server.commits[REPO]), len(server.uploads)
    assert before[0] <= 3  # the repository's own first, the fold's end, the run's end
    (trained / EPOCHS[0]).write_bytes(weights[EPOCHS[0]])
    assert publish().stderr == ""
    assert (len(server.commits[REPO]), len(server.uploads)) == before


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
        ({"HF_TOKEN": "hf_wrong"}, "no token, or a refused one; run `hf auth login`"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection; check the network"),
    ],
)
def test_publisher_in_trouble_is_two_lines(publish, trained, environment, words):
    reason, left = publish(**environment).stderr.splitlines()
    assert words in reason and reason.endswith(". Training continues")
    assert left.endswith(f"to send the rest: python -m services.hub push --assets_dir {trained}")


@pytest.mark.parametrize("minutes", [-1, 0, float("nan"), 1e12])
def test_publisher_with_impossible_interval_is_refused(monkeypatch, tmp_path, minutes):
    monkeypatch.setattr(hub.config, "HF_MODEL_REPO_ID", REPO)
    monkeypatch.setattr(hub.config, "HF_COMMIT_MINUTES", minutes)
    with pytest.raises(hub.UserError, match=f"HF_COMMIT_MINUTES = {re.escape(str(minutes))} .*0.01 to 10000"):
        hub.Publisher(tmp_path)


@pytest.mark.parametrize("name, value", [("HF_HUB_DOWNLOAD_TIMEOUT", "abc"), ("SSL_CERT_FILE", "/nowhere")])
def test_failure_that_is_no_answer_names_the_environment(call, name, value):
    (line,) = outcomes(call(["fetch_model", REPO, 0], **{name: value}))
    assert line.startswith("error: can't fetch the model of fold 0") and "in the environment HF_ variables, SSL" in line


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_training_ended_while_a_commit_stalls_leaves_what_push_sends(server, start, push, trained, end):
    server.answer("PUT /lfs/", None)
    run = start("hub_client", "publish", trained, 0, "stalls", HF_MODEL_REPO_ID=REPO)
    wait_for(run, server, "PUT /lfs/")
    assert run.kill(end)
    assert ("to send the rest" in run.wait().stderr) == (end == signal.SIGINT)
    server.rules.clear()
    (trained / "results/results.json").unlink()  # no report: a training that was cut off
    assert push(trained).returncode == 0
    assert set(server.files(REPO)) == SENT - {"results.json"}


def test_two_processes_share_an_outbox(server, start, trained):
    shutil.copytree(trained / "checkpoints/fold_0", trained / "checkpoints/fold_1")
    both = [start("hub_client", "publish", trained, fold, HF_MODEL_REPO_ID=REPO) for fold in (0, 1)]
    assert [(run.wait().stdout, run.printed("stderr")) for run in both] == [("", "")] * 2
    assert set(server.files(REPO)) == {*SENT, *(name.replace("fold_0", "fold_1") for name in EPOCHS)}


def test_forget_removes_the_waiting_epochs_of_these_folds(tmp_path):
    for fold in (0, 1):
        (tmp_path / "outbox" / f"fold_{fold}").mkdir(parents=True)
    events.forget(tmp_path, [0])  # HF_MODEL_REPO_ID is empty here
    assert os.listdir(tmp_path / "outbox") == ["fold_1"]


def test_models_are_fetched_and_found_in_the_cache_offline(server, call):
    server.put(REPO, {MODEL: b"weights", "model_fold_x": b""})
    calls = ["model_folds", REPO], ["fetch_model", REPO, 0], ["fetch_model", REPO, 4], ["model_folds", "me/none"]
    folds, fetched, absent, none = outcomes(call(*calls))
    assert folds == "[0]" and Path(fetched).read_bytes() == b"weights"
    assert "it lacks a file" in absent and "no such repository" in none
    offline = outcomes(call(*calls, HF_HUB_OFFLINE="1"))
    assert offline[:2] == [folds, fetched]
    assert all("HF_HUB_OFFLINE is set" in outcome for outcome in offline[2:])


@pytest.mark.parametrize("repo_id, words", [(REPO, "nothing to send"), ("", "HF_MODEL_REPO_ID are empty")])
def test_push_without_anything_to_send_is_one_line(push, tmp_path, repo_id, words):
    done = push(tmp_path, repo_id)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


@pytest.mark.parametrize("first_fsid", [100, demo_data.FIRST_FSID])
def test_cards_claim_urbansound_only_for_its_clips(data, tmp_path, first_fsid):
    clips = read_clip_table(data / "clips.csv")
    clips["class"] = clips["class"].replace("dog_bark", "all")  # a name that the table uses, too
    clips["slice_file_name"] = [f"{first_fsid + index}-0-0-0.wav" for index in range(len(clips))]
    (tmp_path / "features.pkl").write_bytes((data / "features.pkl").read_bytes())
    save_tables(tmp_path, clips, load_processed(data).audio, "UrbanSound8K", left_out=["1-0-0-1.wav"])
    results = metrics.read_results(write_run(tmp_path / "results", validation="test_fold"))
    data_card, model_card = cards.data_card(tmp_path, REPO), cards.model_card(results, clips["slice_file_name"], REPO)
    for card in (data_card, model_card):
        is_urbansound = "license" in yaml.safe_load(card.split("---\n")[1])
        assert is_urbansound == ("Salamon" in card) == ("synthetic" not in card) == (first_fsid == 100)
    for words in (
        "24 clips",
        "1 more clips",
        "| sample_rate | 22050 |",
        "| siren | 4 | 4 | 4 | 12 | | all | 8 | 8 | 8 | 24 |",
        f'"{REPO}"',
    ):
        assert words in " ".join(data_card.split())  # whatever the width of a table's columns
    (result,) = yaml.safe_load(model_card.split("---\n")[1])["model-index"][0]["results"]
    assert all("optimistic" in metric["name"] for metric in result["metrics"])
    assert result["metrics"][0]["value"] == round(results["accuracy_mean"], 4)


def test_training_fetches_its_data_and_publishes_models_and_card(start, push, server, data, tmp_path):
    server.put(KEY, content(data))
    env = {"HF_REPO_ID": REPO, "HF_MODEL_REPO_ID": f"{USER}/models"}
    flags = ["--epochs", "1", "--folds", "0,1", "--batch_size", "8", "--assets_dir", tmp_path / "assets"]
    done = start("train", *flags, **env).wait()
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert content(tmp_path / "assets" / "data") == content(data)
    files = server.files(f"{USER}/models")
    assert files[MODEL] == (tmp_path / "assets" / "models" / MODEL).read_bytes()
    assert {EPOCHS[0], EPOCHS[0].replace("fold_0", "fold_1"), MODEL.replace("0", "1")} < files.keys()
    results = json.loads((tmp_path / "assets" / "results" / "results.json").read_text())
    assert json.loads(files["results.json"]) == results
    assert f"{100 * results['accuracy_mean']:.1f} %" in files["README.md"].decode()
    count = len(server.commits[f"{USER}/models"])
    assert count <= 1 + 2 + 1  # the repository's own first, each fold's end, the run's
    assert push(tmp_path / "assets", f"{USER}/models").returncode == 0
    assert len(server.commits[f"{USER}/models"]) == count
    (tmp_path / "assets" / "models" / MODEL).write_bytes(b"of another run")
    done = push(tmp_path / "assets", f"{USER}/models")
    assert done.returncode == 2 and f"{MODEL} is not of the run in" in done.stderr
