"""Stage 2 by its command line: features that are librosa's, every bad clip named, stops and kills that do no harm."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import audio as audio_file
import data_loader
import preprocess_data
import utils
from utils import UserError

SCRIPT = "preprocess_data.py"
# Put in the way of every Python process of a run: no connection, and nothing of the Hub's client.
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
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
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

    def run(folder, *flags, **options):
        env = {**offline, **options.pop("env", {})}
        return run_script(
            SCRIPT, "--data_dir", folder, "--output_dir", tmp_path / "processed", *flags, env=env, **options
        )

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
    assert (data.features.shape, data.features.dtype) == ((60, 192, 173), np.float16)
    assert data.labels.tolist() == [int(row["classID"]) for row in rows]
    assert data.folds.tolist() == [int(row["fold"]) for row in rows]
    assert [clip["slice_file_name"] for clip in data.clips] == [row["slice_file_name"] for row in rows]
    assert data.class_names == {int(row["classID"]): row["class"] for row in rows}
    assert (data.info["source"], data.info["left_out"]) == ("UrbanSound8K", [])
    assert re.search(r"^class +fold 1 +fold 2 +fold 3 +all$", printed, re.MULTILINE)
    assert re.search(r"^dog_bark +2 +2 +2 +6$", printed, re.MULTILINE)
    assert re.search(
        rf"^60 clips in [\d.]+ s \(\d+ clips/s\) -> {re.escape(str(folder))}: features", printed, re.MULTILINE
    )
    assert sorted(contents(folder)) == sorted(data_loader.PROCESSED_FILES)


def test_features_are_librosas(miniature, processed):
    import librosa

    features = utils.load_pickle(processed[0] / "features.pkl").astype(np.float32)
    for row, ours in zip(rows_of(miniature), features, strict=True):
        samples, rate = soundfile.read(clip_path(miniature, row), dtype="float32")
        samples = librosa.resample(
            librosa.to_mono(samples.T), orig_sr=rate, target_sr=22_050, fix=False
        )  # else it appends a zero sample
        samples = np.tile(samples, -(-88_200 // len(samples)))[:88_200]
        power = librosa.feature.melspectrogram(y=samples, sr=22_050)
        longer = np.pad(samples, (0, 346 * 256 - 88_200 - 256))  # for two fine frames to each frame
        fine = librosa.feature.melspectrogram(y=longer, sr=22_050, n_fft=512, hop_length=256, n_mels=32)
        fine = librosa.power_to_db(fine)
        expected = np.concatenate([librosa.power_to_db(power), fine[:, ::2], fine[:, 1::2]])
        rounding = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32) / 2
        assert (np.abs(ours - expected) <= 0.01 + rounding).all(), row["slice_file_name"]


def test_one_process_writes_the_same_bytes(miniature, processed, tmp_path, preprocess):
    done = preprocess(miniature, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "processed") == contents(processed[0])


def test_last_bit_does_not_depend_on_the_number_of_processes(miniature):
    audio = data_loader.AudioSettings(feature_dtype="float32")  # float16 would hide most of it
    paths = [clip_path(miniature, row) for row in rows_of(miniature)]
    one, two = (list(preprocess_data.process_clips(paths, audio, workers)) for workers in (1, 2))
    for (features, _), (others, _) in zip(one, two, strict=True):
        assert np.array_equal(features, others)


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
    (folder / "audio" / "fold1" / "0-0-0-0.wav").write_bytes(b"a stray file")
    done = preprocess(folder)
    assert done.returncode == 0, done.stderr
    assert "1 WAV files that the metadata does not list are ignored" in done.stdout
    assert "recordings with clips in more than one fold, as the data set has them: 209992" in done.stdout
    data = data_loader.load_processed(tmp_path / "processed")
    audio = data_loader.AudioSettings()
    assert data.labels.tolist() == [row["classID"] for row in rows]
    assert list(data.class_names) == sorted(data.class_names)
    for row, features in zip(rows, data.features, strict=True):
        samples = audio_file.read_audio(clip_path(folder, row), audio.sample_rate)
        assert np.array_equal(features, audio_file.clip_features(samples, audio))


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


def test_other_clips_and_overwrite(dataset, preprocess, tmp_path):
    folder, rows = dataset(5)
    write_rows(folder, rows[:3])
    assert preprocess(folder).returncode == 0
    old = contents(tmp_path / "processed")

    other = [{**rows[0], "fold": 2}, *rows[1:3]]
    for changed, counts in ((rows[:2], (2, 0)), (other, (3, 1)), ([*rows[1:3], rows[0]], (3, 0))):
        write_rows(folder, changed)
        clips = data_loader.read_clip_table(folder / "metadata" / "UrbanSound8K.csv")
        with pytest.raises(UserError, match=r"3 clips and the data set lists {}, {} of them new".format(*counts)):
            preprocess_data.clips_stored(tmp_path / "processed", clips, False)
    write_rows(folder, rows)  # two more
    line = one_line(preprocess(folder))
    assert "holds 3 clips and the data set lists 5, 2 of them new or changed: run with --overwrite" in line
    assert contents(tmp_path / "processed") == old
    done = preprocess(folder, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert len(data_loader.load_processed(tmp_path / "processed").labels) == 5


def test_incomplete_set_is_made_again(dataset, preprocess, tmp_path):
    folder, _ = dataset(2)
    assert preprocess(folder).returncode == 0
    whole = contents(tmp_path / "processed")
    (tmp_path / "processed" / "features.json").unlink()  # as a kill in mid-write leaves it
    (tmp_path / "processed" / "features.pkl.tmp").write_bytes(b"half")
    assert preprocess(folder).returncode == 0
    assert contents(tmp_path / "processed") == whole


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("features.json", "[]", "features.json is damaged"),
        ("features.json", "{", "features.json is not JSON"),
        (
            "features.json",
            '{"audio": {}, "left_out": [], "source": ""}',
            "sample_rate is None there and 22050 in config",
        ),
        ("features.json", '{"audio": 5, "left_out": [], "source": ""}', "features.json is damaged"),
        ("clips.csv", "rubbish", "clips.csv lacks the column"),
    ],
)
def test_damaged_set_is_named_with_the_remedy(miniature, processed, tmp_path, name, content, reason):
    shutil.copytree(processed[0], tmp_path / "processed")
    (tmp_path / "processed" / name).write_text(content)
    clips = data_loader.read_clip_table(miniature / "metadata" / "UrbanSound8K.csv")
    with pytest.raises(UserError, match=rf"{re.escape(reason)}.*(--overwrite|make it again)"):
        preprocess_data.clips_stored(tmp_path / "processed", clips, False)


def test_changed_audio_settings_are_noticed(dataset, tmp_path, preprocess):
    folder, _ = dataset(2)
    assert preprocess(folder).returncode == 0
    project = tmp_path / "project"
    project.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, project)
    settings = (project / "config.py").read_text()
    (project / "config.py").write_text(settings.replace("HOP_LENGTH = 512", "HOP_LENGTH = 1024"))
    command = [sys.executable, project / SCRIPT, "--data_dir", folder, "--output_dir", tmp_path / "processed"]
    line = one_line(subprocess.run(command, capture_output=True, text=True))
    assert "hop_length is 512 there and 1024 in config.py" in line and "--overwrite" in line
    done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert utils.load_pickle(tmp_path / "processed" / "features.pkl").shape == (2, 192, 87)


# --- Clips that can't be used ------------------------------------------------------------------------------------


def test_bad_clips_are_listed_and_nothing_is_written_or_they_are_left_out(dataset, preprocess, tmp_path):
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
    kept = [row for row in rows if row["slice_file_name"] not in (gone, text)]
    assert [clip["slice_file_name"] for clip in data.clips] == [row["slice_file_name"] for row in kept]
    assert data.info["left_out"] == sorted([gone, text])

    before = contents(tmp_path / "processed")
    assert "holds the features of 4 of 6 clips" in preprocess(folder, "--allow_missing").stdout
    assert "holds 4 clips and the data set lists 6, 2 of them new" in one_line(preprocess(folder))
    clip_path(folder, rows[1]).write_bytes(good)
    done = preprocess(folder, "--overwrite")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(f"  {text}: ")
    assert gone not in done.stderr
    assert contents(tmp_path / "processed") == before


# --- In parts ----------------------------------------------------------------------------------------------------


def test_joined_parts_are_the_files_of_one_run(miniature, processed, dataset, preprocess, tmp_path):
    for part in ("2/3", "1/3", "3/3"):  # in any order
        done = preprocess(miniature, "--shard", part)
        assert done.returncode == 0, done.stderr
        assert "20 clips in" in done.stdout
    assert "Nothing to do" in preprocess(miniature, "--shard", "2/3").stdout
    done = preprocess(miniature, "--join")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^60 clips in .*features \(60, 192, 173\) float16", done.stdout, re.M)
    assert contents(tmp_path / "processed") == contents(processed[0])
    assert "Nothing to do" in preprocess(miniature).stdout


def test_parts_with_clips_left_out(dataset, preprocess, tmp_path):
    folder, rows = dataset(7)
    clip_path(folder, rows[1]).unlink()
    clip_path(folder, rows[6]).write_text("not a sound")
    assert preprocess(folder, "--allow_missing").returncode == 0
    whole = contents(tmp_path / "processed")
    shutil.rmtree(tmp_path / "processed")
    assert "1 of the metadata's clips" in preprocess(folder, "--shard", "1/2").stderr
    for part in ("1/2", "2/2"):
        assert preprocess(folder, "--shard", part, "--allow_missing").returncode == 0
    assert preprocess(folder, "--join").returncode == 0
    assert contents(tmp_path / "processed") == whole


def test_parts_that_do_not_join(dataset, preprocess, tmp_path):
    folder, _ = dataset(6)
    other, _ = dataset(6, "another")
    shards = tmp_path / "processed" / "shards"
    assert "has no parts: --join needs all parts of one number, as --shard 1/8" in one_line(
        preprocess(folder, "--join")
    )
    assert "--shard 7/7: the data set has 6 clips, fewer than parts" in one_line(preprocess(folder, "--shard", "7/7"))
    for bad in ("0/3", "4/3", "3", "a/b"):
        assert f"{bad!r} is not a part such as 3/8" in preprocess(folder, "--shard", bad).stderr
    assert preprocess(folder, "--shard", "1/2").returncode == 0
    assert "lacks 2_of_2: run python preprocess_data.py --shard 2/2 first" in one_line(preprocess(folder, "--join"))
    assert preprocess(other, "--shard", "2/2").returncode == 0
    assert "is of another and" in one_line(preprocess(folder, "--join"))
    assert preprocess(folder, "--shard", "2/2", "--overwrite").returncode == 0
    with open(shards / "2_of_2" / "features.pkl", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert "2_of_2 is not one complete set" in one_line(preprocess(folder, "--join"))
    assert contents(tmp_path / "processed") == {}


def test_no_clip_that_can_be_read(dataset, preprocess, tmp_path):
    folder, rows = dataset(2)
    for row in rows:
        clip_path(folder, row).write_bytes(b"")
    done = preprocess(folder, "--allow_missing")
    assert done.returncode == 2
    assert f"error: no clip of {folder} could be read" in done.stderr
    assert contents(tmp_path / "processed") == {}


def test_no_data_set_and_a_bad_row(dataset, preprocess, tmp_path):
    assert "no metadata at" in one_line(preprocess(tmp_path / "nowhere"))
    folder, rows = dataset(3)
    write_rows(folder, [rows[0], {**rows[1], "slice_file_name": "../../secret.wav"}, rows[2]])
    assert "line 3: '../../secret.wav' is not a plain file name" in one_line(preprocess(folder))


# --- Flags -------------------------------------------------------------------------------------------------------


def test_help_explains_every_flag(run_script):
    done = run_script(SCRIPT, "--help")
    assert done.returncode == 0
    for flag in ("--assets_dir", "--data_dir", "--output_dir", "--workers", "--overwrite", "--allow_missing"):
        assert re.search(rf"^  {flag}\b", done.stdout, re.MULTILINE), flag
    assert "python preprocess_data.py --data_dir" in done.stdout
    for flags in (["--workers", "0"], ["--over"]):
        done = run_script(SCRIPT, *flags)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and flags[0] in done.stderr


def test_relative_folders(dataset, run_script, offline, tmp_path):
    folder, _ = dataset(1, "My sounds")
    done = run_script(SCRIPT, "--data_dir", ".", "--output_dir", "../out", cwd=folder, env=offline)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "features.json").read_text())["source"] == "My sounds"


# --- Stops and kills ---------------------------------------------------------------------------------------------


def job_of(n_clips, tmp_path, miniature):
    """Return the command to preprocess a new data set of so many clips, links to one file, with two workers."""
    folder = tmp_path / "UrbanSound8K"
    rows = rows_of(miniature)
    slowest = max(rows, key=lambda row: clip_path(miniature, row).stat().st_size)
    rows = [{**slowest, "slice_file_name": f"{n}.wav", "fold": 1} for n in range(n_clips)]
    (folder / "audio" / "fold1").mkdir(parents=True)
    shutil.copyfile(clip_path(miniature, slowest), tmp_path / "clip")
    for row in rows:
        os.link(tmp_path / "clip", clip_path(folder, row))
    write_rows(folder, rows)
    output = tmp_path / "processed"
    return [sys.executable, REPOSITORY / SCRIPT, "--data_dir", folder, "--output_dir", output, "--workers", "2"]


@pytest.fixture
def long_job(tmp_path, miniature):
    """A command that takes some seconds, also on a machine that does a clip in a millisecond."""
    return job_of(5000, tmp_path, miniature)


def processes():
    """{process: (its parent, whether it lives)}; skips where there is no ps."""
    if not shutil.which("ps"):
        pytest.skip("no ps to see the worker processes with")
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return {int(pid): (int(parent), not state.startswith("Z")) for pid, parent, state in map(str.split, lines)}


def hear_ctrl_c():
    """A shell's background jobs, and what they start, are born deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start_working():
    """A function that starts a run in a session of its own, and returns it with its children once they are at work."""
    started = []

    def start(command):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
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


def wait_for_end(pids):
    """Return the processes that are still alive after ten seconds."""
    for _ in range(200):
        alive = [pid for pid in pids if processes().get(pid, (0, False))[1]]
        if not alive:
            break
        time.sleep(0.05)
    return alive


@pytest.mark.parametrize("seconds", [0, 0.7])
def test_ctrl_c_ends_it_with_one_line_and_no_process_left(long_job, start_working, tmp_path, seconds):
    process, children = start_working(long_job)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the workers too
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, printed + errors
    assert errors == "\nStopped. Nothing was changed; the same command starts again.\n"
    assert wait_for_end(children) == []
    assert contents(tmp_path / "processed") == {}


# Ctrl-C at the moment when the twentieth clip's features are taken over, which a signal from outside rarely meets.
CTRL_C_BETWEEN_CLIPS = """
import os, signal, sys
import preprocess_data, utils

def trace(frame, event, argument):
    if frame.f_code.co_name != "extract_features":
        return None
    if frame.f_locals.get("position") == 20:
        sys.settrace(None)
        os.kill(os.getpid(), signal.SIGINT)
    return trace

if __name__ == "__main__":
    sys.settrace(trace)
    utils.run(preprocess_data.main)
"""


def test_ctrl_c_between_two_clips_does_not_work_off_the_others(miniature, tmp_path):
    command = job_of(400, tmp_path, miniature)
    clips = sorted((tmp_path / "UrbanSound8K" / "audio" / "fold1").iterdir())
    for path in clips:  # links become files of their own, which were last read in 1970
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (0, time.time()))
    clips[0].read_bytes()
    if clips[0].stat().st_atime == 0:
        pytest.skip("this file system does not record when a file was read")
    command = [sys.executable, "-c", CTRL_C_BETWEEN_CLIPS, *command[2:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, preexec_fn=hear_ctrl_c)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\nStopped. Nothing was changed; the same command starts again.\n"
    assert 20 <= sum(path.stat().st_atime > 0 for path in clips) < 300


def test_kill_leaves_no_worker_and_the_old_files(long_job, start_working, processed, tmp_path):
    shutil.copytree(processed[0], tmp_path / "processed")
    process, children = start_working([*long_job, "--overwrite"])
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert wait_for_end(children) == []
    (tmp_path / "processed" / "features.pkl.tmp").unlink()  # which the next run takes over
    assert contents(tmp_path / "processed") == contents(processed[0])


def test_killed_worker_is_told(long_job, start_working, tmp_path):
    process, children = start_working(long_job)
    tracker, *workers = sorted(children)  # the first that was started
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == "error: a worker process was killed (out of memory?): try fewer than --workers 2\n"
    assert wait_for_end([tracker, *workers]) == []
    assert contents(tmp_path / "processed") == {}


def worked_seconds(pid):
    """Return the processor time of a process; skips where /proc does not tell."""
    path = Path("/proc") / str(pid) / "stat"
    if not path.is_file():
        pytest.skip("no /proc to see a process work in")
    return sum(map(int, path.read_text().rpartition(")")[2].split()[11:13]))


def test_workers_killed_in_the_middle_of_a_result_are_told(long_job, start_working, tmp_path):
    """Nobody reads, so the pipes are full: a worker has sent a part of its result when it is killed."""
    process, children = start_working(long_job)
    _, *workers = sorted(children)
    while not all(map(worked_seconds, workers)) or not list(tmp_path.glob("processed/*.tmp")):
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGSTOP)
    before = None
    while (now := [worked_seconds(worker) for worker in workers]) != before:  # they end their tasks, and wait
        before = now
        time.sleep(0.5)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == "error: a worker process was killed (out of memory?): try fewer than --workers 2\n"
    assert wait_for_end(children) == []


def test_killed_while_writing_is_old_new_or_made_again(dataset, preprocess, offline, tmp_path):
    """Killed at each rename of the six files in turn: what is there is whole, or is not taken for a set."""
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
    done = preprocess(folder)
    assert done.returncode == 0, done.stderr
    assert len(data_loader.load_processed(tmp_path / "processed").labels) == 2
    assert not list((tmp_path / "processed").glob("*.tmp"))


# --- Worker processes --------------------------------------------------------------------------------------------


def slow_at_first(number):
    time.sleep(0.3 if number == 0 else 0)
    return number * number, os.getpid()


def test_results_come_in_the_order_of_the_tasks():
    results = list(preprocess_data.map_in_order(slow_at_first, list(range(40)), 2))
    assert [value for value, _ in results] == [number * number for number in range(40)]
    assert len({process for _, process in results}) == 2
    assert os.getpid() not in {process for _, process in results}
    assert multiprocessing.active_children() == []


def test_no_task_and_fewer_tasks_than_workers():
    assert list(preprocess_data.map_in_order(slow_at_first, [], 2)) == []
    assert [value for value, _ in preprocess_data.map_in_order(slow_at_first, [3], 2)] == [9]


class Noted(list):
    """Tasks that know how many of them were asked for."""

    asked = 0

    def __getitem__(self, number):
        self.asked = max(self.asked, number + 1)
        return super().__getitem__(number)


def test_workers_do_not_run_away_from_the_reader():
    tasks = Noted(range(200))
    results = preprocess_data.map_in_order(abs, tasks, 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert 10 <= tasks.asked <= 10 + 2 * preprocess_data.TASKS_AHEAD
    results.close()
    assert multiprocessing.active_children() == []


def fail_at_three(number):
    return 1 / (number - 3)


def test_an_error_in_a_worker_ends_the_run(capfd):
    with pytest.raises(UserError, match="failed"):
        list(preprocess_data.map_in_order(fail_at_three, list(range(10)), 2))
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert multiprocessing.active_children() == []


def leave(number):
    os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(UserError, match="was killed"):
        list(preprocess_data.map_in_order(leave, list(range(10)), 2))
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no signal masks")
def test_ctrl_c_is_held_though_another_thread_hears_it():
    """A thread of BLAS has no mask: an interrupt in a start left a worker that said 'EOFError: Ran out of input'."""
    ending, held = threading.Event(), False
    threading.Thread(target=ending.wait).start()
    try:
        with pytest.raises(KeyboardInterrupt), preprocess_data.interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            held = True
    finally:
        ending.set()
    assert held
    with pytest.raises(KeyboardInterrupt):  # and is heard again
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
