"""services/hub.py with the real client library, against a Hub on this machine (hub_server.py).

huggingface_hub reads its environment when it is imported, so each client is a process of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hub_server import USER

import data_loader
import demo_data
from data_loader import PROCESSED_FILES
from services import cards, hub

PROJECT = Path(data_loader.__file__).parent
REPO = f"{USER}/sounds"
KEY = f"datasets/{REPO}"
EPOCHS = [f"checkpoints/fold_0/epoch_{epoch}.safetensors" for epoch in (1, 2)]
MODEL = "model_fold_0_best.safetensors"
RESULTS = {  # what the cards read of results.json
    "note": "optimistic: epoch chosen on the test fold",
    "protocol": "test_fold",
    "accuracy_mean": 0.8125,
    "accuracy_std": None,
    "accuracy_interval_95": None,
    "macro_f1": 0.75,
    "folds_present": 1,
    "folds_total": 10,
    "clips": 12,
    "clips_total": 40,
    "per_class": {"car_horn": {"clips": 12, "precision": 0.5, "recall": 0.75, "f1": 0.6}},
    "run": {"settings": {"model": "AudioCNN", "epochs": 80}},
}

# Calls functions of hub.py as [[function, *arguments], ...] says, and prints for each [what it returned or its error's
# message, the lines on stderr].
CALL = """
import contextlib, io, json, sys
from services import hub
outcomes = []
for function, *arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            outcome = getattr(hub, function)(*arguments)
        except hub.UserError as error:
            outcome = f"error: {error}"
    outcomes.append([str(outcome), stderr.getvalue().splitlines()])
print(json.dumps(outcomes))
"""

# What training does with a Publisher in the assets folder sys.argv[1]: two epochs, of which the first is pruned, and
# the tested model. sys.argv[2] is run before the end.
PUBLISH = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from services import hub
root = Path(sys.argv[1])
paths = SimpleNamespace(checkpoints=root / "checkpoints", models=root / "models", results=root / "results")
publisher, finished = hub.Publisher(paths), False
try:
    publisher.add_epoch(0, 1)
    (root / "checkpoints/fold_0/epoch_1.safetensors").unlink()
    publisher.add_epoch(0, 2)
    publisher.add_model(0)
    exec(sys.argv[2])
    finished = True
finally:
    publisher.close(finished)
"""


@pytest.fixture
def processed(tmp_path):
    """A folder with the processed files of twelve clips of noise."""
    make_processed(tmp_path / "processed")
    return tmp_path / "processed"


def make_processed(folder, seed=0, first_fsid=100, left_out=()):
    audio = data_loader.AudioSettings()
    features = np.random.default_rng(seed).normal(-40, 10, (12, *audio.shape)).astype(audio.feature_dtype)
    names = ("air_conditioner", "car_horn", "children_playing")
    clips = pd.DataFrame(
        {
            "slice_file_name": [f"{first_fsid + clip}-{clip % 3}-0-0.wav" for clip in range(12)],
            "fsID": [str(first_fsid + clip) for clip in range(12)],
            "start": "0.0",
            "end": "4.0",
            "salience": "1",
            "fold": [1 + clip % 4 for clip in range(12)],
            "classID": [clip % 3 for clip in range(12)],
            "class": [names[clip % 3] for clip in range(12)],
        }
    )
    data_loader.save_processed(folder, features, clips, audio, "UrbanSound8K", left_out)


@pytest.fixture
def trained(tmp_path):
    """An assets folder with the files that a Publisher takes from a training, with any bytes in them."""
    for name in (*EPOCHS, f"models/{MODEL}"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    for name in hub.RESULT_FILES:
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text(json.dumps(RESULTS))
    return tmp_path


def content(folder):
    """Return {name: bytes} of the processed files in a folder."""
    return {name: (folder / name).read_bytes() for name in PROCESSED_FILES}


def start(server, home, *command, token="hf_token_of_me", **environment):
    """Start Python with a command line in the project's folder, as a client of the server."""
    environment = {**os.environ, **server.environment(home, token), "PYTHONPATH": str(PROJECT), **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(server, home, *command, **options):
    """Run Python to its end. The time limit only ends a client that waits for ever."""
    process = start(server, home, *command, **options)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def call(server, home, *calls, **options):
    """Call functions of hub.py in one client process and return [what it returned, lines on stderr] for each."""
    done = run(server, home, "-c", CALL, json.dumps([list(map(str, call)) for call in calls]), **options)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def publish(server, assets, then="", **options):
    return run(server, assets / "home", "-c", PUBLISH, assets, then, **{"HF_MODEL_REPO_ID": REPO, **options})


def push(server, assets, **options):
    return run(server, assets / "home", "-m", "services.hub", "push", "--assets_dir", assets, **options)


def wait_for(process, server, request):
    """Wait until a request has come to the server, or the process has ended."""
    while process.poll() is None and not any(request in line for line in server.requests):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)


# --- The processed files -----------------------------------------------------------------------------------------


def test_processed_files_sent_and_fetched_are_equal(server, processed, tmp_path):
    calls = ("upload_processed", processed, REPO), ("fetch_processed", tmp_path / "fetched", REPO)
    assert call(server, tmp_path / "home", *calls) == [["True", []], ["None", []]]
    assert content(tmp_path / "fetched") == content(processed)
    assert len(data_loader.load_processed(tmp_path / "fetched").labels) == 12
    assert server.files(KEY)["README.md"].decode() == cards.data_card(processed, REPO)
    assert KEY in server.private


def test_processed_files_sent_again_only_what_changed(server, processed, tmp_path):
    calls = [("upload_processed", processed, REPO)] * 2
    assert call(server, tmp_path, *calls) == [["True", []]] * 2
    assert [title for _, title, _ in server.commits[KEY]] == ["initial commit", "Processed files"]
    assert len(server.uploads) == 4  # the pickles, once; the texts are in the commit
    make_processed(processed, seed=1)
    assert call(server, tmp_path, *calls[:1]) == [["True", []]]
    assert (len(server.commits[KEY]), len(server.uploads)) == (3, 5)  # features.pkl alone


def test_upload_refused_is_one_line_each(server, processed, tmp_path):
    expected = {
        "me/full": (403, "Private repository storage limit reached", "the storage is full; make room"),
        "me/gone": (404, "Repository not found", "no such repository"),
        "me/often": (429, "", "too many requests; try again later [429]"),
        "me/ill": (500, "a bell \x07 and \x1b[2J", "the Hub is in trouble; try again later [500: a bell ? and ?[2J]"),
        "me/disk": (507, "", "the storage is full"),
        "someone/else": (None, "", "the token has no right to it"),
        "me/no such name": (None, "", 'no valid name; set it in config.py as "owner/name"'),
    }
    for repo_id, (status, message, _) in expected.items():
        if status:
            server.fail(f"POST .*/{repo_id}/commit/", status, message)
    outcomes = call(server, tmp_path, *(("upload_processed", processed, repo_id) for repo_id in expected))
    for (returned, lines), (repo_id, (*_, words)) in zip(outcomes, expected.items(), strict=True):
        assert returned == "False" and len(lines) == 1
        for part in (f"warning: the data set {repo_id}", words, f"services.hub push --processed_dir {processed}"):
            assert part in lines[0]
        assert lines[0].isprintable()


WRONG_ENVIRONMENTS = {
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
    "no token": ({"token": None}, "there is no token; run `hf auth login`"),
    "wrong token": ({"token": "hf_wrong"}, "the token is refused"),
    "no network": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection (ConnectError"),
}


@pytest.mark.parametrize("name", WRONG_ENVIRONMENTS)
def test_wrong_environment_is_one_line(server, processed, tmp_path, name):
    options, words = WRONG_ENVIRONMENTS[name]
    server.put("datasets/me/there", content(processed))
    server.private.add("datasets/me/there")
    calls = ("upload_processed", processed, REPO), ("fetch_processed", tmp_path / "fetched", "me/there")
    (returned, lines), (message, _) = call(server, tmp_path / "home", *calls, **options)
    assert returned == "False" and len(lines) == 1 and words in lines[0]
    assert message.startswith("error: can't fetch the data set me/there") and words in message
    assert server.uploads == []


def test_upload_that_stalls_is_left_behind(server, processed, tmp_path):
    server.stall("PUT /lfs/")
    program = f"from services import hub; hub.UPLOAD_SECONDS = 3; hub.upload_processed({str(processed)!r}, {REPO!r})"
    done = run(server, tmp_path, "-c", program)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1 and "not updated after 3 s" in done.stderr


def test_fetch_refused_is_one_line_each_and_leaves_the_folder_alone(server, processed, tmp_path):
    whole = content(processed)
    settings = json.loads(whole["features.json"])
    settings["audio"]["n_mels"] = 64
    server.put("datasets/me/part", {name: data for name, data in whole.items() if name != "folds.pkl"})
    server.put("datasets/me/other", {**whole, "features.json": json.dumps(settings).encode()})
    server.put("datasets/me/list", {**whole, "features.json": b"[]"})
    server.fail("GET /api/datasets/me/proxy", 200, body=b"<html>log in</html>")
    server.stall("GET /api/datasets/me/stalled")
    expected = {
        "me/nothing": "no such repository that your token may see; check HF_REPO_ID",
        "me/part": "it lacks folds.pkl; send it again: python -m services.hub push",
        "me/other": "n_mels",
        "me/list": "features.json",
        "me/proxy": "the answer is not the Hub's; check the network (a proxy or log-in page?)",
        "me/stalled": "no connection (ReadTimeout",
    }
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "clips.csv").write_text("mine")
    program = CALL.replace("outcomes = []", "hub.ANSWER_SECONDS = 1; outcomes = []")
    calls = [("fetch_processed", str(tmp_path / "fetched"), repo_id) for repo_id in expected]
    done = run(server, tmp_path / "home", "-c", program, json.dumps(calls))
    for (message, lines), (repo_id, words) in zip(json.loads(done.stdout), expected.items(), strict=True):
        assert message.startswith(f"error: can't fetch the data set {repo_id}") and words in message
        assert message.isprintable() and lines == []
    assert (tmp_path / "fetched" / "clips.csv").read_text() == "mine"
    assert set(os.listdir(tmp_path / "fetched")) == {"clips.csv", ".hub.lock"}


def test_fetch_takes_no_other_file_whatever_its_name(server, processed, tmp_path):
    hostile = ("../escaped.pkl", "/escaped.pkl", "sub/features.pkl", "features.json/x", "a\x1b[2J\n.pkl", ".hub.lock")
    server.put(KEY, {**dict.fromkeys(hostile, b"not ours"), **content(processed)})
    assert call(server, tmp_path / "home", ("fetch_processed", tmp_path / "fetched", REPO)) == [["None", []]]
    assert content(tmp_path / "fetched") == content(processed)
    assert set(os.listdir(tmp_path / "fetched")) == {*PROCESSED_FILES, ".hub.lock"}
    assert not (tmp_path / "escaped.pkl").exists()


def test_fetch_killed_leaves_nothing_to_the_next_two_of_which_one_fetches(server, processed, tmp_path):
    server.put(KEY, content(processed))
    server.stall("GET /lfs/")
    fetch = "-c", CALL, json.dumps([("fetch_processed", str(tmp_path / "fetched"), REPO)])
    with start(server, tmp_path / "home", *fetch) as killed:
        wait_for(killed, server, "GET /lfs/")
        killed.kill()
    assert list((tmp_path / "fetched").glob("fetching_*/features.json"))
    server.rules.clear()
    server.requests.clear()
    both = [start(server, tmp_path / "home", *fetch) for _ in range(2)]
    assert [json.loads(process.communicate(timeout=300)[0]) for process in both] == [[["None", []]]] * 2
    assert content(tmp_path / "fetched") == content(processed)
    assert set(os.listdir(tmp_path / "fetched")) == {*PROCESSED_FILES, ".hub.lock"}
    assert sum(request.startswith("GET /api/datasets/") for request in server.requests) == 1


# --- Models ------------------------------------------------------------------------------------------------------


def test_publisher_sends_pruned_epochs_and_a_resumed_run_sends_nothing_twice(server, trained):
    weights = {name: (trained / name).read_bytes() for name in EPOCHS}
    done = publish(server, trained, f"publisher.add_results({RESULTS!r}, ['100032-3-0-0.wav'])")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = server.files(REPO)
    assert {name: files[name] for name in EPOCHS} == weights
    assert files[MODEL] == (trained / "models" / MODEL).read_bytes()
    assert files["README.md"].decode() == cards.model_card(RESULTS, ["100032-3-0-0.wav"], REPO)
    assert files.keys() == {".gitattributes", *EPOCHS, MODEL, "README.md", *hub.RESULT_FILES}
    assert len(server.commits[REPO]) <= 3  # the repository's own first, the fold's end, the run's end
    assert hub.waiting(trained / "checkpoints" / "outbox") == {}
    before = len(server.commits[REPO]), len(server.uploads)
    (trained / EPOCHS[0]).write_bytes(weights[EPOCHS[0]])
    assert publish(server, trained).stderr == ""
    assert push(server, trained, HF_MODEL_REPO_ID=REPO).returncode == 0
    assert (len(server.commits[REPO]), len(server.uploads)) == before


@pytest.mark.parametrize("trouble", ["offline", "wrong token", "no network", "full"])
def test_publisher_in_trouble_is_two_lines_and_push_sends_later(server, trained, trouble):
    options, words = {**WRONG_ENVIRONMENTS, "full": ({}, "the storage is full")}[trouble]
    if trouble == "full":
        server.fail("POST .*", 507)
    done = publish(server, trained, **options)
    assert done.returncode == 0
    reason, left = done.stderr.splitlines()
    assert reason.startswith("warning: ") and words in reason and reason.endswith(". Training continues")
    assert left.startswith("warning: 3 files are not on the Hub yet") and "python -m services.hub push" in left
    assert REPO not in server.commits
    server.rules.clear()
    done = run(server, trained / "home", "-m", *left.partition("python -m ")[2].split(), HF_MODEL_REPO_ID=REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(server.files(REPO)) == {".gitattributes", *EPOCHS, MODEL}


def test_killed_training_leaves_what_push_sends(server, trained):
    server.stall("PUT /lfs/")
    publisher = "-c", PUBLISH, trained, "time.sleep(600)"
    with start(server, trained / "home", *publisher, HF_MODEL_REPO_ID=REPO) as process:
        wait_for(process, server, "PUT /lfs/")
        process.kill()
    server.rules.clear()
    assert push(server, trained, HF_MODEL_REPO_ID=REPO).returncode == 0
    assert set(server.files(REPO)) == {".gitattributes", *EPOCHS, MODEL}


def test_interrupted_training_with_a_stalled_upload_ends(server, trained):
    server.stall("PUT /lfs/")
    publisher = "-c", PUBLISH, trained, "time.sleep(600)"
    with start(server, trained / "home", *publisher, HF_MODEL_REPO_ID=REPO) as process:
        wait_for(process, server, "PUT /lfs/")
        process.send_signal(signal.SIGINT)
        try:
            stderr = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert "3 files are not on the Hub yet" in stderr


def test_two_processes_share_an_outbox(server, trained):
    program = PUBLISH.replace('    (root / "checkpoints/fold_0/epoch_1.safetensors").unlink()\n', "")
    programs = [program, program.replace("(0, ", "(1, ").replace("model(0)", "model(1)")]
    for name in (*EPOCHS, f"models/{MODEL}"):
        path = trained / name.replace("fold_0", "fold_1")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"fold 1, " + name.encode())
    both = [start(server, trained / "home", "-c", text, trained, "", HF_MODEL_REPO_ID=REPO) for text in programs]
    assert [process.communicate(timeout=300) for process in both] == [("", "")] * 2
    names = {*EPOCHS, MODEL, *(name.replace("fold_0", "fold_1") for name in (*EPOCHS, MODEL))}
    assert set(server.files(REPO)) == {".gitattributes", *names}


def test_publisher_without_a_repository_does_nothing(server, trained):
    done = publish(server, trained, HF_MODEL_REPO_ID="")
    assert (done.returncode, done.stderr, server.requests) == (0, "", [])
    assert not (trained / "checkpoints" / "outbox").exists()


def test_forget_removes_what_waits_of_these_folds(trained):
    outbox = trained / "checkpoints" / "outbox"
    for name in ("README.md", *EPOCHS, MODEL, EPOCHS[0].replace("fold_0", "fold_1")):
        hub.put(outbox, name, trained / EPOCHS[0])
    hub.forget(trained / "checkpoints", [0])
    assert list(hub.waiting(outbox)) == [EPOCHS[0].replace("fold_0", "fold_1")]


def test_models_are_fetched_and_found_in_the_cache_offline(server, trained):
    server.put(REPO, {MODEL: b"weights", f"{MODEL}/../model_fold_1_best.safetensors": b"", "model_fold_x": b""})
    calls = ("model_folds", REPO), ("fetch_model", REPO, 0), ("fetch_model", REPO, 4), ("model_folds", "me/none")
    folds, fetched, absent, none = (outcome for outcome, _ in call(server, trained / "home", *calls))
    assert folds == "[0]" and Path(fetched).read_bytes() == b"weights"
    assert absent.endswith("it has the folds [0]; choose one with --fold_num")
    assert "me/none" in none and "no such repository" in none
    offline = call(server, trained / "home", *calls, HF_HUB_OFFLINE="1")
    assert [outcome for outcome, _ in offline[:2]] == [folds, fetched]
    assert all("HF_HUB_OFFLINE is set" in outcome for outcome, _ in offline[2:])


def test_push_without_anything_to_send_is_one_line(server, tmp_path):
    for repo_id, words in ((REPO, "nothing to send"), ("", "HF_MODEL_REPO_ID")):
        done = push(server, tmp_path, HF_MODEL_REPO_ID=repo_id)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


# --- Cards -------------------------------------------------------------------------------------------------------


def test_data_card_states_counts_licence_and_what_is_missing(processed):
    make_processed(processed, left_out=["100-0-0-1.wav"])
    _, header, text = cards.data_card(processed, REPO).split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc-by-nc-3.0" and header["size_categories"] == ["n<1K"]
    text = re.sub(r"[ -]+\|", " |", " ".join(text.split()))  # whatever the width of a table's columns
    text = re.sub(r"\|[ ]+", "| ", text)
    for words in (
        "12 of its 8,732 clips of 3 classes",
        "| sample_rate | 22050 |",
        "| car_horn | 1 | 1 | 1 | 1 | 4 |",
        "| all | 3 | 3 | 3 | 3 | 12 |",
        "1 left out as missing or unreadable: 100-0-0-1.wav",
        "J. Salamon, C. Jacoby and J. P. Bello",
        f'HF_REPO_ID = "{REPO}"',
    ):
        assert words in text


def test_cards_of_the_miniature_claim_no_urbansound(processed):
    make_processed(processed, first_fsid=demo_data.FIRST_FSID)
    names = [f"{demo_data.FIRST_FSID + 1}-0-0-0.wav"]
    for card in (cards.data_card(processed, REPO), cards.model_card(RESULTS, names, REPO)):
        assert "license" not in yaml.safe_load(card.split("---\n")[1])
        assert "synthetic" in card and "Salamon" not in card


def test_model_card_has_scores_for_the_hub_and_says_optimistic():
    card = cards.model_card(RESULTS, ["100032-3-0-0.wav"], REPO)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc-by-nc-3.0" and header["pipeline_tag"] == "audio-classification"
    (result,) = header["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"accuracy": 0.8125, "f1": 0.75}
    assert all("optimistic" in metric["name"] for metric in result["metrics"])
    for words in ("81.2 %", "1 of 10 folds", "car_horn", "AudioCNN", f"hf://{REPO}"):
        assert words in card


# --- Through train.py --------------------------------------------------------------------------------------------


def test_training_fetches_its_data_and_publishes_models_and_card(run_script, server, processed, tmp_path):
    server.put(KEY, content(processed))
    env = {**server.environment(tmp_path / "home"), "HF_REPO_ID": REPO, "HF_MODEL_REPO_ID": f"{USER}/models"}
    flags = ["--epochs", "1", "--folds", "0,1", "--batch_size", "8", "--assets_dir", tmp_path / "assets"]
    done = run_script("train.py", *flags, env=env)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert content(tmp_path / "assets" / "data") == content(processed)
    files = server.files(f"{USER}/models")
    for fold in (0, 1):
        name = f"model_fold_{fold}_best.safetensors"
        assert files[name] == (tmp_path / "assets" / "models" / name).read_bytes()
        assert f"checkpoints/fold_{fold}/epoch_1.safetensors" in files
    results = json.loads((tmp_path / "assets" / "results" / "results.json").read_text())
    assert json.loads(files["results.json"]) == results
    assert f"{100 * results['accuracy_mean']:.1f} %" in files["README.md"].decode()
    assert len(server.commits[f"{USER}/models"]) <= 1 + 2 + 1  # the repository's own first, each fold's end, the run's
