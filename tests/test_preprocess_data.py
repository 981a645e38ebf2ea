"""Stage 2 by its command line: features equal librosa's, every bad clip is named, stops and kills do no harm."""

import contextlib
import csv
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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def processed(miniature, tmp_path_factory, scripts):
    """(folder of the miniature's processed files, what the run printed). Read it, don't write."""
    assets = tmp_path_factory.mktemp("assets")
    done = scripts.run("preprocess_data", "--assets_dir", assets, "--data_dir", miniature, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    return assets / "data", done.stdout


@pytest.fixture
def dataset(tmp_path, miniature):
    """A function that makes a data set of the first n clips of the miniature, to be changed: (folder, rows)."""

    def make(n):
        folder, rows = tmp_path / "UrbanSound8K", rows_of(miniature)[:n]
        for row in rows:
            clip_path(folder, row).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip_path(miniature, row), clip_path(folder, row))
        write_rows(folder, rows)
        return folder, rows

    return make


@pytest.fixture
def preprocess(tmp_path, monkeypatch, capsys):
    """A function that preprocesses a data set into tmp_path/processed, in this process: what it printed (.out, .err).

    With `refused`, a regular expression, it must raise a UserError of one line that matches.
    """

    def run(folder, *flags, refused=None):
        flags = ["--data_dir", str(folder), "--output_dir", str(tmp_path / "processed"), *flags]
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *flags])
        if refused:
            with pytest.raises(UserError, match=refused) as caught:
                preprocess_data.main()
            assert "\n" not in str(caught.value)
        else:
            preprocess_data.main()
        return capsys.readouterr()

    return run


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


def test_number_of_workers_does_not_change_a_bit(miniature):
    audio = AudioSettings(feature_dtype="float32")  # float16 would hide most of it
    paths = [clip_path(miniature, row) for row in rows_of(miniature)]
    found = preprocess_data.process_clips([(path, None) for path in paths], audio, 3)
    by_workers = [features for ((_, _, features),) in found]
    alone = [clip_features(read_audio(path, audio.sample_rate), audio) for path in paths]
    assert np.array_equal(by_workers, alone)


def test_labels_are_the_tables_whatever_the_order_of_the_files(dataset, preprocess, tmp_path):
    folder, rows = dataset(8)
    order = np.random.default_rng(0).permutation(8)
    rows = [{**rows[i], "classID": 9 - int(rows[i]["classID"])} for i in order]
    rows[0]["fsID"] = rows[1]["fsID"] = "209992"
    (folder / "audio" / "fold7").mkdir()
    shutil.move(clip_path(folder, rows[1]), folder / "audio" / "fold7")
    rows[1]["fold"] = "7"
    write_rows(folder, rows)
    (folder / "audio" / "fold1" / "0-0-0-0.wav").write_bytes(b"an extra file")
    printed = preprocess(folder).out
    assert "1 WAV files that the metadata does not list are ignored" in printed
    assert "recordings with clips in more than one fold, as the data set has them: 209992" in printed
    data = data_loader.load_processed(tmp_path / "processed")
    assert data.labels.tolist() == [row["classID"] for row in rows]
    assert list(data.class_names) == sorted(data.class_names)
    for row, features in zip(rows, data.features, strict=True):
        samples = read_audio(clip_path(folder, row), data.audio.sample_rate)
        assert np.array_equal(features, clip_features(samples, data.audio))


# --- Running it again --------------------------------------------------------------------------------------------


def test_kaggles_flat_layout_and_a_byte_order_mark_are_read(dataset, preprocess, tmp_path):
    folder, _ = dataset(3)
    preprocess(folder)
    official = contents(tmp_path / "processed")
    table = folder / "metadata" / "UrbanSound8K.csv"
    (folder / "UrbanSound8K.csv").write_text(table.read_text(), encoding="utf-8-sig")
    table.unlink()
    for fold in (folder / "audio").iterdir():
        fold.rename(folder / fold.name)
    preprocess(folder, "--overwrite")
    assert contents(tmp_path / "processed") == official


def test_users_own_folder_in_the_output_folder_stays(dataset, preprocess, tmp_path):
    folder, _ = dataset(2)
    for name in ("new", "fetching"):
        (tmp_path / "processed" / name).mkdir(parents=True)
        (tmp_path / "processed" / name / "mine.txt").write_text("precious")
    preprocess(folder)
    preprocess(folder, "--overwrite")
    assert (tmp_path / "processed" / "new" / "mine.txt").read_text() == "precious"
    assert (tmp_path / "processed" / "fetching" / "mine.txt").is_file()


def test_clip_is_read_no_further_than_its_length(tmp_path):
    """Hours of FLAC as a clip cost a second: what lies behind 4 s, damaged here, is not decoded."""
    path, rate = tmp_path / "a.flac", AudioSettings().sample_rate
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 80 * rate), rate)
    whole = preprocess_data.cut_recording(path, None, AudioSettings())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="can't be decoded"):
        read_audio(path, rate)
    ((_, _, features),) = preprocess_data.cut_recording(path, None, AudioSettings())
    assert np.array_equal(features, whole[0][2])


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
def test_offset_of_the_converter_is_no_sound(rate, tmp_path):
    samples = np.full(24 * rate, 0.1)
    soundfile.write(tmp_path / "a.wav", samples, rate)
    with pytest.raises(UserError, match=r"a\.wav is silent: its samples are all the same"):
        preprocess_data.cut_recording(tmp_path / "a.wav", ("", ""), AudioSettings())
    samples[10 * rate : 14 * rate] += np.random.default_rng(0).normal(0, 0.02, 4 * rate)
    soundfile.write(tmp_path / "a.wav", samples, rate)
    clips = preprocess_data.cut_recording(tmp_path / "a.wav", ("", ""), AudioSettings())
    assert [start for start, _, _ in clips] == [8, 10, 12]


def test_part_of_a_recording_must_be_in_it_and_no_longer_than_memory_allows(tmp_path, monkeypatch):
    path, audio = tmp_path / "a.wav", AudioSettings()
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 14 * 22_050 + 99), 22_050)
    for part, starts in ((("0", "14"), 6), (("0", "14.9"), 6), (("4", "10.0"), 2)):
        assert len(preprocess_data.cut_recording(path, part, audio)) == starts
    for part in (("0", "15.5"), ("10", "99")):
        refused = rf"a\.wav ends at 14\.0 s: correct its end in metadata\.csv, {part[1]}, or leave that empty"
        with pytest.raises(UserError, match=refused):
            preprocess_data.cut_recording(path, part, audio)
    monkeypatch.setattr(preprocess_data, "MAX_HOURS", 10 / 3600)
    assert len(preprocess_data.cut_recording(path, ("4", "14"), audio)) == 4
    with pytest.raises(UserError, match=r"a\.wav is longer than .* h: cut it, or give a start and end in metadata"):
        preprocess_data.cut_recording(path, ("", ""), audio)


def test_number_of_workers_in_config_is_checked(dataset, preprocess, monkeypatch, capsys):
    monkeypatch.setattr(preprocess_data.config, "WORKERS", 0)
    with pytest.raises(SystemExit, match="2"):
        preprocess(dataset(1)[0])
    assert "--workers: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_data_set_is_no_folder_for_the_output(dataset, preprocess):
    folder, _ = dataset(1)
    (folder / "clips.csv").write_text("mine")
    refused = "is the data set itself: name another folder with --output_dir"
    preprocess(folder, "--output_dir", str(folder), refused=refused)
    assert (folder / "clips.csv").read_text() == "mine"


@pytest.mark.parametrize("count", [b'"clips": 60,', b'"clips": "\\u001b[2J",', b""])  # which is not relied on
def test_second_run_has_nothing_to_do_and_reads_no_clip(count, miniature, processed, tmp_path, preprocess):
    shutil.copytree(processed[0], tmp_path / "processed")
    info = tmp_path / "processed" / "features.json"
    assert info.read_bytes().count(b'"clips": 60,') == 1
    info.write_bytes(info.read_bytes().replace(b'"clips": 60,', count))
    shutil.copytree(miniature / "metadata", tmp_path / "UrbanSound8K" / "metadata")  # the clips are not even there
    before = contents(tmp_path / "processed")
    printed = preprocess(tmp_path / "UrbanSound8K").out
    assert printed.endswith(
        f"Nothing to do: {tmp_path / 'processed'} holds the features of 60 clips (--overwrite: again)\n"
    )
    assert contents(tmp_path / "processed") == before


def test_different_clips_are_refused_until_overwrite(dataset, preprocess, tmp_path):
    folder, rows = dataset(5)
    write_rows(folder, rows[:3])
    preprocess(folder)
    old = contents(tmp_path / "processed")
    moved = [{**rows[0], "fold": 2}, *rows[1:3]]
    swapped = [*rows[1:3], rows[0]]
    refusal = "holds 3 clips of a different list of files, classes and folds: run with --overwrite"
    for changed in (rows[:2], moved, swapped, rows):
        write_rows(folder, changed)
        preprocess(folder, refused=refusal)
    assert contents(tmp_path / "processed") == old
    preprocess(folder, "--overwrite")
    assert len(data_loader.load_processed(tmp_path / "processed").labels) == 5


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("features.json", b'"left_out": []', b'"left_out": 0', "features.json is damaged"),
        ("features.json", b'"sample_rate": 22050', b'"sample_rate": 8000', "sample_rate is 8000 there and 22050"),
        ("clips.csv", b"dog_bark", b"\xff", "clips.csv is not a table"),
    ],
)
def test_damaged_or_different_set_is_named_with_the_remedy(
    processed, miniature, preprocess, name, old, new, reason, tmp_path
):
    shutil.copytree(processed[0], tmp_path / "processed")
    changed = (tmp_path / "processed" / name).read_bytes().replace(old, new)
    (tmp_path / "processed" / name).write_bytes(changed)
    preprocess(miniature, refused=reason)


# --- Clips that can't be used ------------------------------------------------------------------------------------


def test_bad_clips_are_named_and_nothing_is_written_or_they_are_left_out(dataset, preprocess, tmp_path):
    folder, rows = dataset(6)
    gone, text = rows[1]["slice_file_name"], rows[4]["slice_file_name"]
    good = clip_path(folder, rows[1]).read_bytes()
    clip_path(folder, rows[1]).unlink()
    clip_path(folder, rows[4]).write_text("not a sound")

    refusal = "^1 of the metadata's clips, named above, can't be used, and nothing was written"
    assert preprocess(folder, refused=refusal).err == f"  {gone}: no such file\n"
    assert contents(tmp_path / "processed") == {}

    printed = preprocess(folder, "--allow_missing")
    first, second = printed.err.splitlines()
    assert first == f"  {gone}: no such file"
    assert second.startswith(f"  {text}: ") and "can't be decoded as audio" in second
    assert "4 clips in" in printed.out and "2 left out" in printed.out
    data = data_loader.load_processed(tmp_path / "processed")
    kept = [row["slice_file_name"] for row in rows if row["slice_file_name"] not in (gone, text)]
    assert data.clips["slice_file_name"].tolist() == kept
    assert data.info["left_out"] == sorted([gone, text])

    before = contents(tmp_path / "processed")
    assert "holds the features of 4 clips" in preprocess(folder, "--allow_missing").out
    preprocess(folder, refused="lacks 2 clips that could not be read")
    clip_path(folder, rows[1]).write_bytes(good)
    assert preprocess(folder, "--overwrite", refused=refusal).err.startswith(f"  {text}: ")
    assert contents(tmp_path / "processed") == before


def test_no_data_set_no_readable_clip_and_a_bad_row_are_named(dataset, preprocess, tmp_path):
    preprocess(tmp_path / "nowhere", refused="no metadata at")
    folder, rows = dataset(3)
    for spoil in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        for row in rows:
            spoil(clip_path(folder, row))
        preprocess(folder, "--allow_missing", refused=f"no clip of {folder} could be read")
    write_rows(folder, [rows[0], {**rows[1], "slice_file_name": "../../secret.wav"}, rows[2]])
    preprocess(folder, refused=r"line 3: slice_file_name '\.\./\.\./secret\.wav' is no path within the folder")
    assert contents(tmp_path / "processed") == {}


# --- Stops and kills ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_clips(tmp_path_factory, miniature):
    """The folder of a data set of 5,000 clips, links to one file: two workers need some seconds for them."""
    folder = tmp_path_factory.mktemp("many") / "UrbanSound8K"
    slowest = max(rows_of(miniature), key=lambda row: clip_path(miniature, row).stat().st_size)
    rows = [{**slowest, "slice_file_name": f"{n}.wav", "fold": 1} for n in range(5000)]
    (folder / "audio" / "fold1").mkdir(parents=True)
    shutil.copyfile(clip_path(miniature, slowest), folder / "clip")
    for row in rows:
        os.link(folder / "clip", clip_path(folder, row))
    write_rows(folder, rows)
    return folder


@pytest.fixture
def flags(many_clips, tmp_path):
    """The command line to preprocess them with two workers."""
    return ["--data_dir", many_clips, "--output_dir", tmp_path / "processed", "--workers", "2", "--overwrite"]


@contextlib.contextmanager
def at_work(flags, folder):
    """A run in a session of its own, once it writes to `folder`; what is left of it at the end is killed.

    Its workers share its output, so that communicate() returns once they have ended too.
    """
    command = [sys.executable, REPOSITORY / "preprocess_data.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            while process.poll() is None and not (folder / data_loader.NEW_FILES).is_dir():
                time.sleep(0.02)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("seconds", [0.1, 1])  # while the workers start, and while they work
def test_ctrl_c_ends_it_with_one_line_and_no_process_left(flags, tmp_path, seconds):
    with at_work(flags, tmp_path / "processed") as process:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the workers too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "\nStopped. Nothing was changed; the same command starts again.\n"
    assert contents(tmp_path / "processed") == {}


def test_kill_at_a_random_moment_leaves_no_worker_and_the_old_files(flags, processed, tmp_path):
    shutil.copytree(processed[0], tmp_path / "processed")
    for _ in range(2):
        with at_work(flags, tmp_path / "processed") as process:
            time.sleep(random.uniform(0, 1))
            process.kill()
            process.communicate(timeout=60)
        assert contents(tmp_path / "processed") == contents(processed[0])


# The script, with workers that are killed while they decode.
KILLED_WORKERS = """
import os, signal
import preprocess_data, soundfile, utils

if __name__ == '__mp_main__':
    soundfile.SoundFile = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    utils.run(preprocess_data.main)
"""


def test_killed_worker_is_named_with_the_remedy(flags, tmp_path):
    (tmp_path / "run.py").write_text(KILLED_WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", *flags], capture_output=True, text=True, env=environment
    )
    assert done.stderr == "error: a worker process was killed, out of memory perhaps: try fewer than --workers 2\n"
    assert done.returncode == 2
    assert contents(tmp_path / "processed") == {}


# The script, killed when it has written a file and is about to rename it: argv[1], to a folder: argv[2].
KILLED_AT = """
import os, signal, sys
import preprocess_data, utils

replace, last, folder = os.replace, sys.argv.pop(1), sys.argv.pop(1)

def replace_or_die(source, target):
    if target.name == last and target.parent.name == folder:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
utils.run(preprocess_data.main)
"""


@pytest.mark.parametrize("name", ["features.pkl", "labels.pkl", "features.json"])
def test_kill_while_writing_leaves_the_old_set_or_one_that_the_next_run_completes(name, dataset, preprocess, tmp_path):
    folder, rows = dataset(2)
    output = tmp_path / "processed"
    write_rows(folder, rows[:1])
    preprocess(folder)
    write_rows(folder, rows)
    for place in (data_loader.NEW_FILES, "processed"):
        command = [sys.executable, "-c", KILLED_AT, name, place, "--data_dir", folder, "--output_dir", output]
        done = subprocess.run([*command, "--overwrite"], cwd=REPOSITORY, capture_output=True)
        assert done.returncode == -signal.SIGKILL
        if place != "processed" or name == "features.pkl":
            assert len(data_loader.load_processed(output).labels) == 1
        else:
            with pytest.raises(UserError, match="is not one complete set"):
                data_loader.load_processed(output)
    assert "Nothing to do" in preprocess(folder).out
    assert len(data_loader.load_processed(output).labels) == 2
    assert not (output / data_loader.NEW_FILES).exists()
