"""Stage 2 by its command line: features equal librosa's, every bad clip is named, stops and kills do no harm."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import data_loader
import preprocess_data
import utils
from audio import AudioSettings, clip_features, read_audio
from utils import UserError

SCRIPT = "preprocess_data.py"
# Loaded by every Python process of a run: no connection, and nothing of the Hub's client.
NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event == "socket.connect" or (event == "import" and arguments[0] == "huggingface_hub"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return {"PYTHONPATH": str(folder), "HF_REPO_ID": ""}


@pytest.fixture(scope="module")
def processed(miniature, tmp_path_factory, run_script, offline):
    """(folder of the miniature's processed files, what the run printed). Read it, don't write."""
    assets = tmp_path_factory.mktemp("assets")
    done = run_script(SCRIPT, "--assets_dir", assets, "--data_dir", miniature, "--workers", 2, env=offline)
    assert (done.returncode, done.stderr) == (0, "")
    return assets / "data", done.stdout


def rows_of(dataset):
    with open(dataset / "metadata" / "UrbanSound8K.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(dataset, rows):
    (dataset / "metadata").mkdir(parents=True, exist_ok=True)
    with open(dataset / "metadata" / "UrbanSound8K.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, data_loader.CLIP_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def clip_path(dataset, row):
    return dataset / "audio" / f"fold{row['fold']}" / row["slice_file_name"]


@pytest.fixture
def dataset(tmp_path, miniature):
    """A function that makes a data set of the first n clips of the miniature, to be changed: (folder, rows)."""

    def make(n, name="UrbanSound8K"):
        rows = rows_of(miniature)[:n]
        for row in rows:
            path = clip_path(tmp_path / name, row)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip_path(miniature, row), path)
        write_rows(tmp_path / name, rows)
        return tmp_path / name, rows

    return make


@pytest.fixture
def preprocess(tmp_path, run_script, offline):
    """A function that preprocesses a data set into tmp_path/processed."""

    def run(folder, *flags):
        return run_script(SCRIPT, "--data_dir", folder, "--output_dir", tmp_path / "processed", *flags, env=offline)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file() and path.name != ".lock"}


def one_line(done):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- What comes out ----------------------------------------------------------------------------------------------


def test_files_fit_the_metadata(miniature, processed):
    folder, printed = processed
    rows = rows_of(miniature)
    data = data_loader.load_processed(folder)
    assert (data.features.shape, data.features.dtype) == ((60, 128, 173), np.float16)
    assert data.labels.tolist() == [int(row["classID"]) for row in rows]
    assert data.folds.tolist() == [int(row["fold"]) for row in rows]
    assert data.clips["slice_file_name"].tolist() == [row["slice_file_name"] for row in rows]
    assert data.class_names == {int(row["classID"]): row["class"] for row in rows}
    assert (data.info["source"], data.info["left_out"]) == ("UrbanSound8K", [])
    assert re.search(r"^class +fold 1 +fold 2 +fold 3 +all$", printed, re.MULTILINE)
    assert re.search(r"^dog_bark +2 +2 +2 +6$", printed, re.MULTILINE)
    assert re.search(rf"^60 clips in [\d.]+ s \(\d+ clips/s\) -> {re.escape(str(folder))}: features", printed, re.M)
    assert sorted(contents(folder)) == sorted(data_loader.PROCESSED_FILES)


def test_features_equal_librosas(miniature, processed):
    import librosa

    features = utils.load_pickle(processed[0] / "features.pkl").astype(np.float32)
    for row, ours in zip(rows_of(miniature), features, strict=True):
        samples, rate = soundfile.read(clip_path(miniature, row), dtype="float32")
        samples = librosa.to_mono(samples.T)
        samples = librosa.resample(samples, orig_sr=rate, target_sr=22_050, fix=False)  # fix may append a zero
        samples = np.tile(samples, -(-88_200 // len(samples)))[:88_200]
        expected = librosa.power_to_db(librosa.feature.melspectrogram(y=samples, sr=22_050))
        rounding = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32) / 2
        assert (np.abs(ours - expected) <= 0.01 + rounding).all(), row["slice_file_name"]


def test_number_of_workers_does_not_change_a_bit(miniature, processed, tmp_path, preprocess):
    assert preprocess(miniature, "--workers", 1).returncode == 0
    assert contents(tmp_path / "processed") == contents(processed[0])
    audio = AudioSettings(feature_dtype="float32")  # float16 would hide most of it
    paths = [clip_path(miniature, row) for row in rows_of(miniature)]
    by_workers = [features for features, _ in preprocess_data.process_clips(paths, audio, 3)]
    alone = [clip_features(read_audio(path, audio.sample_rate), audio) for path in paths]
    assert np.array_equal(by_workers, alone)


def test_labels_are_the_tables_whatever_the_order_of_the_files(dataset, preprocess, tmp_path):
    folder, rows = dataset(12)
    order = np.random.default_rng(0).permutation(12)
    rows = [{**rows[i], "classID": 9 - int(rows[i]["classID"])} for i in order]
    rows[0]["fsID"] = rows[1]["fsID"] = "209992"
    rows[0]["fold"], rows[1]["fold"] = "1", "7"
    (folder / "audio" / "fold7").mkdir()
    os.rename(folder / "audio" / "fold1" / rows[1]["slice_file_name"], clip_path(folder, rows[1]))
    write_rows(folder, rows)
    table = folder / "metadata" / "UrbanSound8K.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # and Windows' line ends, from csv.writer
    (folder / "audio" / "fold1" / "0-0-0-0.wav").write_bytes(b"an extra file")
    done = preprocess(folder)
    assert done.returncode == 0, done.stderr
    assert "1 WAV files that the metadata does not list are ignored" in done.stdout
    assert "recordings with clips in more than one fold, as the data set has them: 209992" in done.stdout
    data = data_loader.load_processed(tmp_path / "processed")
    assert data.labels.tolist() == [row["classID"] for row in rows]
    assert list(data.class_names) == sorted(data.class_names)
    for row, features in zip(rows, data.features, strict=True):
        samples = read_audio(clip_path(folder, row), data.audio.sample_rate)
        assert np.array_equal(features, clip_features(samples, data.audio))


def test_memory_does_not_grow_with_the_data(miniature):
    path = clip_path(miniature, rows_of(miniature)[0])
    results = preprocess_data.process_clips([path] * 2000, AudioSettings(), 2)
    next(results)
    assert len(results.gi_frame.f_locals["tasks"]) == 2 * preprocess_data.TASKS_AHEAD
    results.close()


# --- Running it again --------------------------------------------------------------------------------------------


def test_second_run_has_nothing_to_do_and_reads_no_clip(miniature, processed, tmp_path, preprocess):
    shutil.copytree(processed[0], tmp_path / "processed")
    shutil.copytree(miniature / "metadata", tmp_path / "UrbanSound8K" / "metadata")  # the clips are not even there
    before = contents(tmp_path / "processed")
    done = preprocess(tmp_path / "UrbanSound8K")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"Nothing to do: {tmp_path / 'processed'} holds the features of all 60 clips (--overwrite: again)\n"
    )
    assert contents(tmp_path / "processed") == before


def test_different_clips_are_refused_until_overwrite(dataset, preprocess, tmp_path):
    folder, rows = dataset(5)
    write_rows(folder, rows[:3])
    assert preprocess(folder).returncode == 0
    old = contents(tmp_path / "processed")
    moved = [{**rows[0], "fold": 2}, *rows[1:3]]
    for changed, counts in ((rows[:2], (2, 0)), (moved, (3, 1)), ([*rows[1:3], rows[0]], (3, 0))):
        write_rows(folder, changed)
        clips = data_loader.read_clip_table(folder / "metadata" / "UrbanSound8K.csv")
        with pytest.raises(UserError, match=r"3 clips and the data set lists {}, {} of them new".format(*counts)):
            preprocess_data.clips_stored(tmp_path / "processed", clips, False)
    write_rows(folder, rows)  # two more
    line = one_line(preprocess(folder))
    assert "holds 3 clips and the data set lists 5, 2 of them new or changed: run with --overwrite" in line
    assert contents(tmp_path / "processed") == old
    assert preprocess(folder, "--overwrite").returncode == 0
    assert len(data_loader.load_processed(tmp_path / "processed").labels) == 5


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("features.json", "[]", "features.json is damaged"),
        ("features.json", "{", "features.json is not JSON"),
        ("features.json", {"sample_rate": 8000}, "sample_rate is 8000 there and 22050 in config"),
        ("features.json", {"fine_frames": 2}, "earlier version"),
        ("clips.csv", "rubbish", "clips.csv lacks the column"),
    ],
)
def test_damaged_or_earlier_set_is_named_with_the_remedy(miniature, processed, tmp_path, name, content, reason):
    shutil.copytree(processed[0], tmp_path / "processed")
    if isinstance(content, dict):
        info = data_loader.read_info(processed[0])
        content = json.dumps({**info, "audio": {**info["audio"], **content}})
    (tmp_path / "processed" / name).write_text(content)
    clips = data_loader.read_clip_table(miniature / "metadata" / "UrbanSound8K.csv")
    with pytest.raises(UserError, match=rf"{re.escape(reason)}.*(--overwrite|make it again)"):
        preprocess_data.clips_stored(tmp_path / "processed", clips, False)


# --- Clips that can't be used ------------------------------------------------------------------------------------


def test_bad_clips_are_named_and_nothing_is_written_or_they_are_left_out(dataset, preprocess, tmp_path):
    folder, rows = dataset(6)
    gone, text = rows[1]["slice_file_name"], rows[4]["slice_file_name"]
    good = clip_path(folder, rows[1]).read_bytes()
    clip_path(folder, rows[1]).unlink()
    clip_path(folder, rows[4]).write_text("not a sound")

    done = preprocess(folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"  {gone}: no such file"
    assert "error: 1 of the metadata's clips, named above, can't be used, and nothing was written" in done.stderr
    assert contents(tmp_path / "processed") == {}

    done = preprocess(folder, "--allow_missing")
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first == f"  {gone}: no such file"
    assert second.startswith(f"  {text}: ") and "can't be decoded as audio" in second
    assert "4 clips in" in done.stdout and "2 left out" in done.stdout
    data = data_loader.load_processed(tmp_path / "processed")
    kept = [row["slice_file_name"] for row in rows if row["slice_file_name"] not in (gone, text)]
    assert data.clips["slice_file_name"].tolist() == kept
    assert data.info["left_out"] == sorted([gone, text])

    before = contents(tmp_path / "processed")
    assert "holds the features of 4 of 6 clips" in preprocess(folder, "--allow_missing").stdout
    assert "holds 4 clips and the data set lists 6, 2 of them new" in one_line(preprocess(folder))
    clip_path(folder, rows[1]).write_bytes(good)
    done = preprocess(folder, "--overwrite")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(f"  {text}: ") and gone not in done.stderr
    assert contents(tmp_path / "processed") == before


def test_no_data_set_no_readable_clip_and_a_bad_row_are_named(dataset, preprocess, tmp_path):
    assert "no metadata at" in one_line(preprocess(tmp_path / "nowhere"))
    folder, rows = dataset(3)
    for row in rows:
        clip_path(folder, row).write_bytes(b"")
    assert f"error: no clip of {folder} could be read" in preprocess(folder, "--allow_missing").stderr
    write_rows(folder, [rows[0], {**rows[1], "slice_file_name": "../../secret.wav"}, rows[2]])
    line = one_line(preprocess(folder))
    assert "line 3" in line and "'../../secret.wav' is not a plain file name" in line
    assert contents(tmp_path / "processed") == {}


# --- Flags -------------------------------------------------------------------------------------------------------


# --- Stops and kills ---------------------------------------------------------------------------------------------


@pytest.fixture
def long_job(tmp_path, miniature):
    """The command to preprocess 5,000 clips, links to one file, with two workers: it takes some seconds."""
    folder = tmp_path / "UrbanSound8K"
    slowest = max(rows_of(miniature), key=lambda row: clip_path(miniature, row).stat().st_size)
    rows = [{**slowest, "slice_file_name": f"{n}.wav", "fold": 1} for n in range(5000)]
    (folder / "audio" / "fold1").mkdir(parents=True)
    shutil.copyfile(clip_path(miniature, slowest), tmp_path / "clip")
    for row in rows:
        os.link(tmp_path / "clip", clip_path(folder, row))
    write_rows(folder, rows)
    output = tmp_path / "processed"
    return [sys.executable, REPOSITORY / SCRIPT, "--data_dir", folder, "--output_dir", output, "--workers", "2"]


def processes():
    """{process: (its parent, whether it lives)}; skips where there is no ps."""
    if not shutil.which("ps"):
        pytest.skip("no ps to see the worker processes with")
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return {int(pid): (int(parent), not state.startswith("Z")) for pid, parent, state in map(str.split, lines)}


def hear_ctrl_c():
    """A shell's background jobs, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start_working(tmp_path):
    """A function that starts a run in a session of its own, and returns it with its children once it is at work."""
    started = []

    def start(command):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=hear_ctrl_c)
        while process.poll() is None and not list(tmp_path.glob("processed/features.pkl.*.tmp")):
            time.sleep(0.02)
        children = []
        while process.poll() is None and len(children) < 3:  # two workers and a tracker of theirs
            time.sleep(0.02)
            children = [pid for pid, (parent, _) in processes().items() if parent == process.pid]
        started.extend((pid, process.pid) for pid in (process.pid, *children))
        assert len(children) == 3, process.communicate()
        return process, children

    yield start
    for pid, session in started:  # what a test that failed has left
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def still_alive(pids):
    """Return the processes that are alive after ten seconds."""
    for _ in range(200):
        alive = [pid for pid in pids if processes().get(pid, (0, False))[1]]
        if not alive:
            break
        time.sleep(0.05)
    return alive


@pytest.mark.parametrize("seconds", [0.1, 1])  # while the workers start, and while they work
def test_ctrl_c_ends_it_with_one_line_and_no_process_left(long_job, start_working, tmp_path, seconds):
    process, children = start_working(long_job)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the workers too
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, printed + errors
    assert errors == "\nStopped. Nothing was changed; the same command starts again.\n"
    assert still_alive(children) == []
    assert contents(tmp_path / "processed") == {}


def test_kill_at_a_random_moment_leaves_no_worker_and_the_old_files(long_job, start_working, processed, tmp_path):
    shutil.copytree(processed[0], tmp_path / "processed")
    for _ in range(2):
        process, children = start_working([*long_job, "--overwrite"])
        time.sleep(random.uniform(0, 1))
        process.kill()
        process.wait()
        assert still_alive(children) == []
        for leftover in tmp_path.glob("processed/features.pkl.*.tmp"):  # which the next run removes
            leftover.unlink()
        assert contents(tmp_path / "processed") == contents(processed[0])


# The script, with workers that are killed while they decode.
KILLED_WORKERS = """
import os, signal
import preprocess_data, soundfile, utils

if __name__ == '__mp_main__':
    soundfile.SoundFile = lambda path: os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    utils.run(preprocess_data.main)
"""


def test_killed_worker_is_named_with_the_remedy(long_job, tmp_path):
    (tmp_path / "run.py").write_text(KILLED_WORKERS)
    command = [sys.executable, tmp_path / "run.py", *long_job[2:]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert one_line(done) == ("error: a worker process was killed, out of memory perhaps: try fewer than --workers 2\n")
    assert contents(tmp_path / "processed") == {}


def test_kill_while_writing_leaves_old_files_new_files_or_none(dataset, preprocess, tmp_path):
    """Killed at a rename of the six files: what is there is whole, or is not taken for a set."""
    folder, rows = dataset(2)
    write_rows(folder, rows[:1])
    assert preprocess(folder).returncode == 0
    write_rows(folder, rows)
    code = (
        "import os, signal, sys\nimport preprocess_data, utils\nreplace, left = os.replace, [int(sys.argv.pop(1))]\n"
        "def kill_at(*names):\n  left[0] -= 1\n  left[0] or os.kill(os.getpid(), signal.SIGKILL)\n  replace(*names)\n"
        "os.replace = kill_at\nutils.run(preprocess_data.main)"
    )
    flags = ["--data_dir", folder, "--output_dir", tmp_path / "processed"]
    for moment in (2, 6):
        command = [sys.executable, "-c", code, str(moment), *flags, "--overwrite"]
        assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == -signal.SIGKILL
        with pytest.raises(UserError, match=r"lacks features\.json"):
            data_loader.load_processed(tmp_path / "processed")
    assert list((tmp_path / "processed").glob("*.tmp"))
    assert preprocess(folder).returncode == 0
    assert len(data_loader.load_processed(tmp_path / "processed").labels) == 2
    assert not list((tmp_path / "processed").glob("*.tmp"))
