"""What training sends to a model repository, with the real client library, against a Hub on this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY
from hub_server import USER, HubServer

import demo_data
from services import cards, publisher

REPO = f"{USER}/sounds"
TRAIN = ("train.py", "--batch_size", "8")

# Adds files of a run in the folder sys.argv[1] as train.py does, and prints what it says on stderr.
CLIENT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from services import publisher
root = Path(sys.argv[1])
paths = SimpleNamespace(checkpoints=root / "checkpoints", models=root / "models", results=root / "results")
with publisher.Publisher(paths) as models:
    for epoch in (1, 2):
        models.add_epoch(SimpleNamespace(number=0, newest={"epoch": epoch}))
    models.add_best(0)
"""


@pytest.fixture
def trained(tmp_path):
    """A folder with what publisher.py takes from a training: two epochs and a model, as any bytes."""
    for name in ("checkpoints/fold_0/epoch_1", "checkpoints/fold_0/epoch_2", "models/model_fold_0_best"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    return tmp_path


def environment(server, home, **more):
    return {**os.environ, **server.environment(home), "PYTHONPATH": str(REPOSITORY), "HF_MODEL_REPO_ID": REPO, **more}


def run(scripts, server, home, script, *arguments, **more):
    """Run a script, or, with "-c", a program in a process of its own, as a client of the server."""
    env = environment(server, home, **more)
    if script == "-c":
        command = [sys.executable, script, *map(str, arguments)]
        # The time limit only ends a run in which a client waits for ever.
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    return scripts.run(script.removesuffix(".py"), *arguments, env=env)


def sent(server):
    """Return {name: bytes} of what a run has sent."""
    return {name: data for name, data in server.files(REPO).items() if name != ".gitattributes"}


def results_of(assets):
    """Return {name: bytes} of what a training leaves behind."""
    return {
        path.relative_to(assets).as_posix(): path.read_bytes()
        for folder in ("models", "results", "checkpoints/fold_0")  # .pt files have the run's own id in them
        for path in sorted((assets / folder).rglob("*"))
        if path.suffix in (".safetensors", ".csv")
    }


def test_ten_folds_in_few_commits_with_every_model_and_the_card(scripts, server, tmp_path, random_data):
    random_data(tmp_path / "data", n_folds=10, clips_per_fold=4)
    done = run(scripts, server, tmp_path, *TRAIN, "--epochs", "1", "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    files = sent(server)
    for fold in range(10):
        name = f"model_fold_{fold}_best.safetensors"
        assert files[name] == (tmp_path / "models" / name).read_bytes()
        name = f"checkpoints/fold_{fold}/epoch_1.safetensors"
        assert files[name] == (tmp_path / name).read_bytes()
    assert len(server.commits(REPO)) <= 1 + 10 + 1 + 1  # the repository's own first, each fold's end, the run's end
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    check_card(files["README.md"].decode(), results)
    assert publisher.files_left(publisher.outbox_dir(tmp_path / "checkpoints")) == []

    commits = len(server.commits(REPO))
    done = run(scripts, server, tmp_path, "services.hub", "push", "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(server.commits(REPO)) == commits  # nothing twice

    demo_data.write_clip(tmp_path / "clip.wav", np.random.default_rng(0).normal(0, 0.1, 22_050), 22_050, "PCM_16")
    (tmp_path / "elsewhere").mkdir()
    for flags in (["--from_hub", REPO], ["--model_dir", f"hf://{REPO}", "--fold_num", "7"]):
        done = run(scripts, server, tmp_path / "elsewhere", "predict.py", tmp_path / "clip.wav", *flags)
        assert done.returncode == 0, done.stderr
        assert "confidence" in done.stdout
    cached = run(
        scripts, server, tmp_path / "elsewhere", "predict.py", tmp_path / "clip.wav", *flags, HF_HUB_OFFLINE="1"
    )
    assert cached.stdout == done.stdout
    flags = ["--from_hub", REPO, "--fold_num", "all", "--quiet"]
    done = run(scripts, server, tmp_path / "elsewhere", "predict.py", tmp_path / "clip.wav", *flags)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr


def test_a_fresh_folder_trains_from_the_data_set_it_fetched(scripts, server, tmp_path, data):
    own = {"HF_REPO_ID": f"{USER}/data", "HF_MODEL_REPO_ID": ""}
    done = run(scripts, server, tmp_path, "services.hub", "push", "--processed_dir", data, **own)
    assert done.returncode == 0, done.stderr
    flags = ["--epochs", "1", "--folds", "0"]
    done = run(scripts, server, tmp_path, *TRAIN, *flags, "--assets_dir", tmp_path / "fresh", **own)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fresh" / "data" / "features.pkl").read_bytes() == (data / "features.pkl").read_bytes()
    done = run(
        scripts, server, tmp_path, *TRAIN, *flags, "--processed_dir", data, "--assets_dir", tmp_path / "local", **own
    )
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "fresh") == results_of(tmp_path / "local")


def check_card(text, results):
    """Compare a model card with the results, read as the Hub reads it."""
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert data.pipeline_tag == "audio-classification"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    wanted = {"accuracy": "accuracy_mean", "accuracy_std": "accuracy_std", "f1": "macro_f1"}
    assert values == {kind: pytest.approx(results[name], abs=1e-4) for kind, name in wanted.items()}
    assert f"{100 * results['accuracy_mean']:.1f} %" in text
    assert all(name in text for name in results["class_names"])
    assert ("optimistic" in text) == results["optimistic"]


def test_card_says_optimistic_where_it_is_and_names_a_part(scripts, random_data, tmp_path):
    random_data(tmp_path / "data")
    flags = ["--epochs", "1", "--folds", "1", "--validation", "test_fold", "--assets_dir", tmp_path]
    done = scripts.run("train", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    text = cards.model_card(results, ["900001-0-0-0.wav"], REPO)
    assert "optimistic" in text and "1 of 3 folds" in text
    assert "ynthetic" in text and "cc-by-nc" not in text
    assert "cc-by-nc" in cards.model_card(results, ["100032-3-0-0.wav"], REPO)


def test_killed_run_and_push_end_with_the_same_content(scripts, server, tmp_path, random_data):
    """The Hub takes nothing until the kill: all that the run made waits in the outbox, pruned epochs too."""
    random_data(tmp_path / "data")
    server.fail("POST .*", 503)
    command = [*TRAIN, "--epochs", "6", "--folds", "0,1", "--assets_dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment(server, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("fold 1  epoch 4/6"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    server.rules.clear()
    done = run(scripts, server, tmp_path, "services.hub", "push", "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = {(fold, epoch) for fold, last in ((0, 6), (1, 3)) for epoch in range(1, last + 1)}
    there = {f"checkpoints/fold_{fold}/epoch_{epoch}.safetensors" for fold, epoch in epochs}
    assert there | {"model_fold_0_best.safetensors"} <= set(sent(server))

    done = run(scripts, server, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    after = sent(server)
    random_data(tmp_path / "again" / "data")
    with HubServer() as other:
        whole = run(scripts, other, tmp_path, *command[:-1], tmp_path / "again")
        assert whole.returncode == 0, whole.stderr
        assert after.keys() == sent(other).keys()
        weights = [name for name in after if name.endswith(".safetensors")]
        assert len(weights) == 14
        assert {name: after[name] for name in weights} == {name: sent(other)[name] for name in weights}


def test_a_file_that_changes_while_it_waits_is_sent_once_in_its_last_state(scripts, server, trained):
    outbox = publisher.outbox_dir(trained / "checkpoints")
    path = trained / "models" / "model_fold_0_best.safetensors"
    publisher.put(outbox, path.name, path)
    publisher.put(outbox, path.name, path)  # as it was: no second entry
    assert publisher.files_left(outbox) == [path.name]
    path.rename(trained / "gone")
    path.write_bytes(b"newer")
    publisher.put(outbox, path.name, path)
    path.unlink()  # pruned
    done = run(scripts, server, trained, "-c", CLIENT.replace("models.add_best(0)", ""), trained)
    assert done.returncode == 0 and done.stderr == ""
    assert sent(server)[path.name] == b"newer"
    assert [len(files) for _, _, files in server.commits(REPO)][-1] == 4  # with .gitattributes, in one commit
    assert len(server.commits(REPO)) == 2


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("401", ["the token is not accepted"]),
        ("507", ["the storage is full"]),
        ("throttled for long", ["too many requests"]),
        ("offline", ["HF_HUB_OFFLINE is set"]),
    ],
)
def test_each_trouble_is_two_lines_and_push_sends_later(scripts, server, trained, problem, words):
    more = {"HF_HUB_OFFLINE": "1"} if problem == "offline" else {}
    if problem.isdigit():
        server.fail("POST .*", int(problem))
    elif problem != "offline":
        server.throttle("POST .*", retry_after=3000)
    done = run(scripts, server, trained, "-c", CLIENT, trained, **more)
    assert done.returncode == 0
    reason, left = done.stderr.splitlines()
    assert all(word in reason for word in words), reason
    assert reason.startswith("warning: ") and "The run goes on" in reason
    assert "3 files are not on the Hub yet" in left and "python -m services.hub push" in left
    server.rules.clear()
    flags = left.split("push", 1)[1].split()
    done = run(scripts, server, trained, "services.hub", "push", *flags)
    assert done.returncode == 0, done.stderr
    assert set(sent(server)) == {
        "checkpoints/fold_0/epoch_1.safetensors",
        "checkpoints/fold_0/epoch_2.safetensors",
        "model_fold_0_best.safetensors",
    }


def test_short_trouble_is_waited_out(scripts, server, trained):
    server.fail("POST .*", 503, times=2)
    done = run(scripts, server, trained, "-c", CLIENT, trained)
    assert done.returncode == 0
    assert len(sent(server)) == 3
    assert len(done.stderr.splitlines()) <= 1


def test_a_dead_hub_changes_nothing_in_the_run(scripts, server, tmp_path, random_data):
    outputs = []
    for name, repo_id in (("with", REPO), ("without", "")):
        random_data(tmp_path / name / "data")
        flags = ["--epochs", "2", "--folds", "0", "--assets_dir", tmp_path / name]
        dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_MODEL_REPO_ID": repo_id}
        done = run(scripts, server, tmp_path, *TRAIN, *flags, **dead)
        assert done.returncode == 0, done.stderr
        assert ("not on the Hub yet" in done.stderr) == bool(repo_id)
        outputs.append(results_of(tmp_path / name))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5


def test_ctrl_c_ends_a_run_whose_uploads_stall(server, trained):
    server.stall("PUT /lfs/.*")
    client = CLIENT.replace("models.add_best(0)", "models.add_best(0); print('added', flush=True); time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-c", client, trained],
        env=environment(server, trained),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        while not any(request.startswith("PUT /lfs/") for request in server.requests):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=60)[1]  # the client's own tries would take minutes
        finally:
            process.kill()
    assert "3 files are not on the Hub yet" in said


def test_push_goes_on_without_a_report_of_folds_that_are_gone(scripts, server, trained):
    (trained / "results").mkdir()
    (trained / "results" / "results.json").write_text('{"per_fold": [{"fold": 0}]}')
    done = run(scripts, server, trained, "services.hub", "push", "--assets_dir", trained)
    assert done.returncode == 0, done.stderr
    assert "the report and the card stay here" in done.stderr
    assert len(sent(server)) == 3 and "README.md" not in sent(server)


def test_fresh_forgets_what_waits(trained):
    outbox = publisher.outbox_dir(trained / "checkpoints")
    for fold in (0, 1):
        path = trained / "models" / "model_fold_0_best.safetensors"
        publisher.put(outbox, f"checkpoints/fold_{fold}/epoch_1.safetensors", path)
        publisher.put(outbox, f"model_fold_{fold}_best.safetensors", path)
    publisher.forget(trained / "checkpoints", [0])
    assert sorted(publisher.files_left(outbox)) == [
        "checkpoints/fold_1/epoch_1.safetensors",
        "model_fold_1_best.safetensors",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from_hub", "me/none"], ["me/none", "no such repository"]),
        (["--from_hub", REPO, "--fold_num", "4"], ["it has the folds [0]", "--fold_num"]),
        (["--model_dir", "hf://me/sounds/extra"], ["no valid repository name"]),
        (["--from_hub", "me/none", "--fold_num", "all"], ["me/none", "no such repository"]),
    ],
)
def test_models_that_are_not_there_are_one_line(scripts, server, trained, flags, words):
    server.put(REPO, {"model_fold_0_best.safetensors": b"1"})
    demo_data.write_clip(trained / "clip.wav", np.full(2000, 0.1), 22_050, "PCM_16")
    done = run(scripts, server, trained, "predict.py", trained / "clip.wav", *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_without_the_file_offline_is_one_line(scripts, server, trained):
    demo_data.write_clip(trained / "clip.wav", np.full(2000, 0.1), 22_050, "PCM_16")
    done = run(scripts, server, trained, "predict.py", trained / "clip.wav", "--from_hub", REPO, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_push_without_anything_says_so(scripts, server, tmp_path):
    done = run(scripts, server, tmp_path, "services.hub", "push", "--assets_dir", tmp_path)
    assert done.returncode == 2 and "nothing to send" in done.stderr
    done = run(scripts, server, tmp_path, "services.hub", "push", "--assets_dir", tmp_path, HF_MODEL_REPO_ID="")
    assert done.returncode == 2 and "HF_MODEL_REPO_ID" in done.stderr
