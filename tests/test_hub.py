"""hub.py with the real client library, against a Hub on this machine (hub_server.py).

huggingface_hub reads its environment when it is imported, so each client is a process of its own.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import USER

import data_loader
import demo_data
from data_loader import PROCESSED_FILES
from services import cards
from utils import UserError

PROJECT = Path(data_loader.__file__).parent
REPO = f"{USER}/sounds"
KEY = f"datasets/{REPO}"

# Calls functions of hub.py as [[function, folder, repository], ...] says, and prints for each
# [what it returned or its UserError's message, the lines on stderr].
CLIENT = """
import contextlib, io, json, sys
import hub, utils
outcomes = []
for function, folder, repository in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            outcome = getattr(hub, function)(folder, repository)
        except utils.UserError as error:
            outcome = str(error)
    outcomes.append([outcome, said.getvalue().splitlines()])
print(json.dumps(outcomes))
"""


@pytest.fixture
def processed(tmp_path):
    """A folder with the processed files of twelve clips of noise."""
    make_processed(tmp_path / "processed")
    return tmp_path / "processed"


def make_processed(folder, seed=0, first_fsid=100, left_out=()):
    audio = data_loader.AudioSettings()
    features = np.random.default_rng(seed).normal(-40, 10, (12, *audio.shape)).astype(audio.feature_dtype)
    clips = [
        {
            "slice_file_name": f"{first_fsid + clip}-{clip % 3}-0-0.wav",
            "fsID": str(first_fsid + clip),
            "start": "0.0",
            "end": "4.0",
            "salience": "1",
            "fold": 1 + clip % 4,
            "classID": clip % 3,
            "class": ("air_conditioner", "car_horn", "children_playing")[clip % 3],
        }
        for clip in range(12)
    ]
    data_loader.save_processed(folder, features, clips, audio, "UrbanSound8K", left_out)


def content(folder):
    """Return {name: bytes} of the processed files in a folder."""
    return {name: (folder / name).read_bytes() for name in PROCESSED_FILES}


def run(server, home, *command, token="hf_token_of_me", **environment):
    """Run Python with a command line in the project's folder, as a client of the server."""
    environment = {**os.environ, **server.environment(home, token), "PYTHONPATH": str(PROJECT), **environment}
    command = [sys.executable, *map(str, command)]
    # The time limit only ends a run in which a client waits for ever.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def call(server, home, *calls, **options):
    """Make calls such as upload(...) in one client process and return their outcomes (see CLIENT)."""
    done = run(server, home, "-c", CLIENT, json.dumps(calls), **options)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def upload(folder, repository=REPO):
    return "upload_processed", str(folder), repository


def fetch(folder, repository=REPO):
    return "fetch_processed", str(folder), repository


UPLOADED, FETCHED = [True, []], [None, []]


# --- What works --------------------------------------------------------------------------------------------------


def test_uploaded_files_come_back_equal_and_whole(server, processed, tmp_path):
    server.put(KEY, {"extra.pkl": b"not ours", "sub/features.pkl": b"not ours"}, private=True)
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "labels.pkl").write_bytes(b"left by something else")
    assert call(server, tmp_path / "home", upload(processed), fetch(tmp_path / "fetched")) == [UPLOADED, FETCHED]
    assert server.files(KEY)["README.md"].decode() == cards.dataset_card(processed, REPO)
    assert content(tmp_path / "fetched") == content(processed)
    assert sorted(os.listdir(tmp_path / "fetched")) == sorted(PROCESSED_FILES)
    assert len(data_loader.load_processed(tmp_path / "fetched").labels) == 12
    assert server.leaks == []  # the token stays with the Hub


def test_only_what_changed_is_sent_and_in_one_commit(server, processed, tmp_path):
    assert call(server, tmp_path, upload(processed), upload(processed)) == [UPLOADED, UPLOADED]
    assert [title for _, title, _ in server.commits(KEY)] == ["initial commit", "Processed files"]
    assert len(server.uploads) == 4  # the pickles, once; the texts are in the commit
    make_processed(processed, seed=1)
    assert call(server, tmp_path, upload(processed)) == [UPLOADED]
    assert len(server.commits(KEY)) == 3
    assert len(server.uploads) == 5  # features.pkl alone
    stored = server.files(KEY)
    assert {name: stored[name] for name in PROCESSED_FILES} == content(processed)


def test_public_if_config_says_so(server, processed, tmp_path):
    public = f"import config; config.HF_PRIVATE = False; import hub; hub.upload_processed({str(processed)!r}, {REPO!r})"
    assert run(server, tmp_path, "-c", public).returncode == 0
    assert [body["visibility"] for body in server.created] == ["public"]
    assert not server.repos[KEY].private


def test_card_says_what_it_is(processed):
    make_processed(processed, left_out=["100-0-0-1.wav"])
    _, header, text = cards.dataset_card(processed, REPO).split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc-by-nc-3.0"
    assert header["size_categories"] == ["n<1K"]
    assert "audio" in header["tags"]
    for words in (
        "12 of its 8,732 clips of 3 classes",
        "| `sample_rate` | 22050 |",
        "| class | fold 1 | fold 2 | fold 3 | fold 4 | all |",
        "| car_horn | 1 | 1 | 1 | 1 | 4 |",
        "| all | 3 | 3 | 3 | 3 | 12 |",
        "1 left out as missing or unreadable: 100-0-0-1.wav",
        "binds the derived files",
        "J. Salamon, C. Jacoby and J. P. Bello",
        f'HF_REPO_ID = "{REPO}"',
    ):
        assert words in text


def test_card_of_the_miniature_claims_no_urbansound(processed):
    make_processed(processed, first_fsid=demo_data.FIRST_FSID)
    card = cards.dataset_card(processed, REPO)
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "synthetic" in card
    assert "Salamon" not in card


def test_throttling_and_a_broken_connection_are_waited_out(server, processed, tmp_path):
    server.throttle("POST .*/preupload/", times=1, retry_after=0)
    server.cut("GET /lfs/", times=1)
    assert call(server, tmp_path / "home", upload(processed), fetch(tmp_path / "fetched")) == [UPLOADED, FETCHED]
    assert content(tmp_path / "fetched") == content(processed)
    assert all(rule.left == 0 for rule in server.rules)


def test_fetch_takes_one_commit_whatever_comes_in_between(server, processed, tmp_path):
    before = content(processed)
    make_processed(processed, seed=1)
    server.put(KEY, before)
    server.when("HEAD .*/labels.pkl", lambda: server.put(KEY, content(processed)))
    assert call(server, tmp_path / "home", fetch(tmp_path / "fetched")) == [FETCHED]
    assert content(tmp_path / "fetched") == before
    assert server.files(KEY)["features.pkl"] != before["features.pkl"]


def test_push_by_hand(server, processed, tmp_path):
    command = "-m", "services.hub", "push", "--processed_dir", processed
    done = run(server, tmp_path, *command, HF_REPO_ID=REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{server.endpoint}/{KEY}" in done.stdout
    assert {name: server.files(KEY)[name] for name in PROCESSED_FILES} == content(processed)
    assert server.repos[KEY].private
    (processed / "folds.pkl").unlink()
    done = run(server, tmp_path, *command, HF_REPO_ID=REPO)
    assert done.returncode == 2
    assert done.stderr.endswith("lacks folds.pkl; run python preprocess_data.py\n")
    assert len(done.stderr.splitlines()) == 1


# --- What fails --------------------------------------------------------------------------------------------------


def check_upload_warning(outcome, folder, *words):
    """Assert that an upload returned False and said one line: the reason, the remedy, and how to send it later."""
    returned, lines = outcome
    assert returned is False
    assert len(lines) == 1
    for part in ("warning: ", *words, f"python -m services.hub push --processed_dir {folder}"):
        assert part in lines[0]


def test_upload_refused_by_the_hub_is_one_line_each(server, processed, tmp_path):
    def commit_to(name):
        return f"POST .*/me/{name}/commit/"

    server.fail(commit_to("bad"), 400, "words of the Hub")
    server.fail(commit_to("unpaid"), 402)
    server.fail(commit_to("full"), 403, "Private repository storage limit reached")
    server.fail(commit_to("gone"), 404, "Repository not found")
    server.fail(commit_to("large"), 413)
    server.throttle(commit_to("often"), retry_after=3500)
    server.throttle("POST .*/me/hourly/preupload/", retry_after=3500)
    server.fail(commit_to("ill"), 500)
    server.fail(commit_to("disk"), 507)
    server.stall(commit_to("stalled"))
    server.cut(commit_to("cut"))
    expected = {
        "me/bad": ["the Hub refuses the request", "[400: words of the Hub]"],
        "me/unpaid": ["the storage is full; make room", "[402]"],
        "me/full": ["the storage is full; make room", "[403: Private repository storage limit reached]"],
        "me/gone": ["no such repository", "check HF_REPO_ID", "[404"],
        "me/large": ["the storage is full; make room", "[413]"],
        "me/often": ["too many requests; try again in 3500 s", "[429"],
        "me/hourly": ["too many requests; try again in 3500 s", "[429"],
        "me/ill": ["the Hub is in trouble; try again later", "[500]"],
        "me/disk": ["the storage is full; make room", "[507]"],
        "me/stalled": ["no answer for 1 s; check the network"],
        "me/cut": ["no connection (Server disconnected", "check the network"],
        "someone/else": ["the token has no right to it", "take one that may write", "[403"],
        "me/no such name": ["no valid repository name", '"owner/name"'],
    }
    calls = [upload(processed, repository) for repository in expected]
    outcomes = call(server, tmp_path, *calls, HF_HUB_DOWNLOAD_TIMEOUT="1")
    for outcome, (repository, words) in zip(outcomes, expected.items(), strict=True):
        check_upload_warning(outcome, processed, repository, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "unset it"]),
        ({"token": None}, ["there is no token", "hf auth login", "HF_TOKEN", "[401"]),
        ({"token": "hf_wrong"}, ["the token is not accepted", "HF_TOKEN", "[401"]),
        ({"dead": True}, ["no connection", "check the network"]),
    ],
    ids=["offline", "no token", "wrong token", "dead server"],
)
def test_wrong_environment_is_one_line(server, processed, tmp_path, options, words):
    server.put("datasets/me/there", content(processed), private=True)
    if options.get("dead"):
        server.die()
        options = {}
    calls = upload(processed), fetch(tmp_path / "fetched", "me/there")
    uploaded, fetched = call(server, tmp_path / "home", *calls, **options)
    check_upload_warning(uploaded, processed, *words)
    check_fetch_error(fetched, "me/there", *words, "; or run python preprocess_data.py")
    assert not (tmp_path / "fetched").exists()
    assert server.uploads == []


def test_server_without_xet_is_one_line(server, processed, tmp_path):
    (uploaded,) = call(server, tmp_path, upload(processed), HF_HUB_DISABLE_XET="0")
    check_upload_warning(uploaded, processed, "no Xet storage", "HF_HUB_DISABLE_XET=1")


def check_fetch_error(outcome, *words):
    """Assert that a fetch raised a UserError of one line with these words in it, and said nothing else."""
    message, lines = outcome
    assert lines == []
    assert "\n" not in message
    for part in ("can't fetch the data set ", *words):
        assert part in message


def test_fetch_refused_is_one_line_each_and_leaves_the_folder_alone(server, processed, tmp_path):
    whole = content(processed)
    settings = json.loads(whole["features.json"])
    settings["audio"]["n_mels"] = 64
    for name in ("forbidden", "often", "ill", "stalled"):
        server.put(f"datasets/me/{name}", whole)
    server.put("datasets/me/part", {**whole, "folds.pkl": None})
    server.put("datasets/me/other", {**whole, "features.json": json.dumps(settings).encode()})
    server.put("datasets/me/list", {**whole, "features.json": b"[]"})
    server.put("datasets/me/broken", whole)
    server.fail("GET /api/datasets/me/forbidden$", 403, "words of the Hub")
    server.throttle("GET /api/datasets/me/often$", retry_after=300)
    server.fail("GET /api/datasets/me/ill$", 500)
    server.stall("GET /api/datasets/me/stalled$")
    server.fail("HEAD /datasets/me/broken/resolve/.*/features.pkl", 404, headers={"X-Error-Code": "EntryNotFound"})
    expected = {
        "me/nothing": ["no such repository", "check HF_REPO_ID", "[404"],
        "me/forbidden": ["the token has no right to it", "[403: words of the Hub]"],
        "me/often": ["too many requests; try again in 300 s", "[429"],
        "me/ill": ["the Hub is in trouble; try again later", "[500]"],
        "me/stalled": ["no answer for 1 s"],
        "me/part": ["it lacks folds.pkl", "python -m services.hub push"],
        "me/other": ["n_mels is 64 there and 128 in config.py"],
        "me/list": ["features.json has no audio settings"],
        "me/broken": ["[404"],
    }
    folder = tmp_path / "fetched"
    folder.mkdir()
    (folder / "clips.csv").write_text("mine")
    calls = [fetch(folder, repository) for repository in expected]
    outcomes = call(server, tmp_path / "home", *calls, HF_HUB_DOWNLOAD_TIMEOUT="1")
    for outcome, (repository, words) in zip(outcomes, expected.items(), strict=True):
        check_fetch_error(outcome, repository, *words)
    assert os.listdir(folder) == ["clips.csv"]
    assert (folder / "clips.csv").read_text() == "mine"


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickle_with_code_in_it_is_refused_and_runs_nothing(server, processed, tmp_path):
    marker = tmp_path / "the pickle ran"
    server.put(KEY, {**content(processed), "labels.pkl": pickle.dumps(RunsCode(marker))})
    assert call(server, tmp_path / "home", fetch(tmp_path / "fetched")) == [FETCHED]
    with pytest.raises(UserError, match=r"labels\.pkl is refused: it holds posix\.mkdir"):
        data_loader.load_processed(tmp_path / "fetched")
    assert not marker.exists()
    pickle.loads((tmp_path / "fetched" / "labels.pkl").read_bytes())  # the plain way would have run it
    assert marker.exists()


# --- The server itself, as a model repository needs it -----------------------------------------------------------

MODEL_CLIENT = """
import json, pathlib, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
api = HfApi()
repository = api.whoami()["name"] + "/model"
api.create_repo(repository, private=True)
api.upload_file(repo_id=repository, path_or_fileobj=b"w" * 999, path_in_repo="models/old.safetensors")
api.create_commit(repository, commit_message="two for one", operations=[
    CommitOperationAdd("models/new.safetensors", b"v" * 999),
    CommitOperationAdd("README.md", b"---\\ntags: [audio]\\n---\\n"),
    CommitOperationDelete("models/old.safetensors"),
])
print(json.dumps({
    "tree": {file.path: file.size for file in api.list_repo_tree(repository, recursive=True)},
    "paths": [file.path for file in api.get_paths_info(repository, ["README.md", "models/old.safetensors"])],
    "exists": [api.repo_exists(repository), api.repo_exists("me/other"), api.file_exists(repository, "README.md")],
    "new": pathlib.Path(snapshot_download(repository), "models", "new.safetensors").read_text(),
}))
"""


def test_the_server_keeps_models_too(server, tmp_path):
    done = run(server, tmp_path, "-c", MODEL_CLIENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "tree": {".gitattributes": 17, "README.md": 22, "models/new.safetensors": 999},
        "paths": ["README.md"],
        "exists": [True, False, True],
        "new": "v" * 999,
    }
    assert [title for _, title, _ in server.commits("me/model")][2] == "two for one"
    assert server.repos["me/model"].private
    assert server.leaks == []
