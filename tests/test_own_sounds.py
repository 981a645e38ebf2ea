"""Own recordings: every kind of data set from plain commands, folds that keep groups together, and what is refused."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile

import config
import data_loader
import play_and_predict_random
from audio import AudioSettings
from services import cards
from utils import UserError

RATE = 22_050  # Hz
SOUNDS = {"beep": 2000, "hum": 150, "background": None}  # Hz; None is noise


def sound(class_name, seconds, seed, rate=RATE):
    """Return a sound of a class, (n,) float32: a wavering tone with noise, or noise alone."""
    rng, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    noise = rng.normal(0, 0.05, len(time))
    frequency = SOUNDS[class_name]
    if frequency is None:
        return noise.astype(np.float32)
    tone = np.sin(2 * np.pi * frequency * rng.uniform(0.9, 1.1) * time + np.cumsum(rng.normal(0, 0.03, len(time))))
    return (0.3 * tone * rng.uniform(0.3, 1) + noise).astype(np.float32)


def write(path, class_name, seconds=4, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(class_name, seconds, seed, rate), rate)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder for each of two classes, six files each, of several formats, with names as people give them."""
    names = ["Küche.wav", "at home/b.flac", "phone.mp3", "street.ogg", "x.WAV", "yard 1st.wav"]
    for class_name in ("beep", "hum"):
        for seed, name in enumerate(names):
            rate = 48_000 if name == "x.WAV" else RATE
            write(tmp_path / "my sounds" / class_name / name, class_name, 2, seed + 10 * (class_name == "hum"), rate)
    return tmp_path / "my sounds"


@pytest.fixture
def preprocess(scripts, tmp_path):
    """A function that preprocesses a data set into tmp_path."""
    flags = ("--assets_dir", tmp_path, "--workers", 1)
    return lambda folder, *more: scripts.run("preprocess_data", "--data_dir", folder, *flags, *more)


# --- From plain commands -----------------------------------------------------------------------------------------


def test_folder_for_each_class_is_trained_reported_and_predicts(folder, preprocess, scripts, tmp_path):
    write(folder / "beep" / "long.wav", "beep", 13, 99)
    done = preprocess(folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: a folder for each class, 13 recordings, 2 classes, 5 folds" in done.stdout
    again = preprocess(folder)
    assert "Nothing to do" in again.stdout
    flags = (
        "--folds",
        "0,1",
        "--epochs",
        4,
        "--batch_size",
        4,
        "--class_weights",
        "balanced",
        "--assets_dir",
        tmp_path,
    )
    done = scripts.run("train", *flags, "--assets_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2 of 5 folds, \d+ of 18 clips: accuracy", done.stdout, re.M) and "macro F1" in done.stdout
    assert "audit: nothing found in 18 clips of my sounds" in done.stdout
    report = (tmp_path / "results" / "report.md").read_text()
    assert "with every recording counted once, by the mean of its clips," in report and "| beep " in report
    assert "# Results on my sounds" in report and "UrbanSound8K" not in report and "foreground" not in report
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    for card in (
        cards.data_card(tmp_path / "data", "me/mine"),
        cards.model_card(results, ["beep/a.wav@0.00"], "me/mine"),
    ):
        assert "my sounds" in card and "urbansound" not in card.lower() and "license:" not in card
    new = write(tmp_path / "new.wav", "hum", 3, 77)
    done = scripts.run("predict", new, "--assets_dir", tmp_path, "--fold_num", "all", "--quiet")
    assert done.stdout == "hum\n", done.stderr
    stored = data_loader.read_clip_table(tmp_path / "data" / "clips.csv")
    _, clips = data_loader.read_dataset(folder, group_by="file")
    folds = play_and_predict_random.folds_in_use(clips.assign(fold=9), tmp_path / "data" / "clips.csv")
    assert dict(zip(clips["recording"], folds, strict=True)) == dict(
        zip(stored["recording"], stored["fold"], strict=True)
    )


def test_esc50_has_its_own_folds_and_numbers(tmp_path, preprocess):
    rows = []
    for fold in range(1, 6):
        for target, class_name in ((14, "beep"), (40, "hum")):
            name = f"{fold}-{1000 * fold + target}-A-{target}.wav"
            write(tmp_path / "ESC-50" / "audio" / name, class_name, 5, fold)
            rows.append([name, fold, target, class_name, False, 1000 * fold + target, "A"])
    (tmp_path / "ESC-50" / "meta").mkdir()
    columns = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "ESC-50" / "meta" / "esc50.csv", index=False)
    done = preprocess(tmp_path / "ESC-50")
    assert "ESC-50, the first 4 s of each clip (CLIP_SECONDS), 10 recordings, 2 classes, 5 folds" in done.stdout, (
        done.stderr
    )
    data = data_loader.load_processed(tmp_path / "data")
    assert data.class_names == {14: "beep", 40: "hum"}
    assert [int(name[0]) for name in data.clips["slice_file_name"]] == data.folds.tolist()


def test_table_with_groups_parts_and_folds(folder, preprocess, tmp_path):
    write(folder / "day.wav", "beep", 20, 5)
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / "hum").rglob("*.*"))
    rows = [[name, " hum", index % 2 + 1, f"room {index % 2}{' ' * index}", "", ""] for index, name in enumerate(files)]
    rows += [
        ["day.wav", "beep", 1, "day", 0, 9],
        ["beep/x.WAV", "beep", 2, "", "", ""],
        ["day.wav", "hum", 1, "day", 12, ""],
    ]
    table = pd.DataFrame(rows, columns=["File_name", " label", " Fold", "group ", "start", "end"])
    table.to_csv(folder / "metadata.csv", index=False)
    done = preprocess(folder)
    assert "a table, metadata.csv, 9 recordings, 2 classes, 2 folds" in done.stdout, done.stderr
    clips = data_loader.load_processed(tmp_path / "data").clips
    day = clips[clips["recording"] == "day.wav"].astype({"start": float, "end": float})
    assert day["start"].tolist() == [0, 2, 4, 5, 12, 14, 16] and day["end"].max() == 20
    assert day["class"].tolist() == ["beep"] * 4 + ["hum"] * 3 and set(day["fold"]) == {1}
    assert clips.groupby("group")["fold"].nunique().max() == 1


@pytest.mark.parametrize("second", ["beep/x.WAV,beep,1,4,", "beep/x.WAV,beep,1,,"])
def test_parts_that_give_the_same_clip_are_named_before_anything_is_written(second, folder, preprocess, tmp_path):
    write(folder / "beep" / "x.WAV", "beep", 12)
    header, hum = "file_name,label,fold,start,end", [f"hum/{name},hum,1,," for name in ("x.WAV", "Küche.wav")]
    write_table(folder, "beep/x.WAV,beep,1,0,8", second, "beep/Küche.wav,beep,2,,", *hum, header=header)
    done = preprocess(folder)
    assert done.returncode == 2 and not (tmp_path / "data" / "clips.csv").exists()
    assert "beep/x.WAV@" in done.stderr and "is in two parts of a recording" in done.stderr


def test_name_of_a_group_is_printed_without_its_escapes(folder, preprocess, tmp_path):
    rows = [f"{name}/{file}.wav,{name},1,a\x1b[31mb" for name in ("hum", "beep") for file in ("x", "y")]
    write_table(folder, *rows, header="file_name,label,fold,group")
    done = preprocess(folder)
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("seconds", [1, 10])
def test_clips_of_other_lengths(seconds, tmp_path, monkeypatch, folder):
    import preprocess_data

    monkeypatch.setattr(
        AudioSettings.__init__, "__defaults__", (RATE, float(seconds), *AudioSettings.__init__.__defaults__[2:])
    )
    write(folder / "hum" / "long.wav", "hum", 2.5 * seconds, 3)
    monkeypatch.setattr("sys.argv", ["x", "--data_dir", str(folder), "--assets_dir", str(tmp_path), "--workers", "1"])
    preprocess_data.main()
    data = data_loader.load_processed(tmp_path / "data")
    assert data.features.shape[1:] == (128, 1 + seconds * RATE // 512)
    long = data.clips[data.clips["recording"] == "hum/long.wav"]
    assert long["start"].astype(float).tolist() == [0, 0.5 * seconds, seconds, 1.5 * seconds]


# --- Folds and duplicates ----------------------------------------------------------------------------------------


def test_pieces_of_one_recording_are_in_one_fold(tmp_path):
    for class_name in SOUNDS:
        for recording in range(8):
            for piece in range(3):
                path = tmp_path / class_name / f"{chr(97 + recording)}-{piece:02d}.wav"
                path.parent.mkdir(exist_ok=True)
                path.touch()
    _, clips = data_loader.read_dataset(tmp_path)
    assert clips.groupby("group").size().tolist() == [3] * 24
    assert clips.groupby("group")["fold"].nunique().max() == 1
    counts = pd.crosstab(clips["class"], clips["fold"])
    assert counts.shape == (3, 5) and counts.to_numpy().min() >= 3
    assert clips.equals(data_loader.read_dataset(tmp_path)[1])  # the same every time
    assert data_loader.read_dataset(tmp_path, group_by="file")[1].groupby("group").size().max() == 1


def test_same_sound_in_two_groups_is_named(folder, preprocess, tmp_path):
    shutil.copyfile(folder / "hum" / "x.WAV", folder / "hum" / "copy of it.wav")
    louder, rate = soundfile.read(folder / "beep" / "Küche.wav")
    soundfile.write(folder / "beep" / "exported.flac", 2 * louder, rate)
    done = preprocess(folder)
    assert done.returncode == 0
    first, second, remedy = done.stderr.splitlines()
    assert first.startswith("warning: beep/Küche.wav@0.00 and beep/exported.flac@0.00 sound the same")
    assert second.startswith("warning: hum/copy of it.wav@0.00 and hum/x.WAV@0.00 sound the same")
    assert "give both the same group in metadata.csv" in remedy


def test_silence_at_the_ends_makes_no_clips(folder, preprocess, tmp_path):
    silence = np.zeros(10 * RATE, np.float32)
    samples = np.concatenate([silence, sound("hum", 4, 1), silence, sound("hum", 4, 2), silence])
    soundfile.write(folder / "hum" / "night.wav", samples, RATE)
    preprocess(folder)
    clips = data_loader.load_processed(tmp_path / "data").clips
    starts = clips[clips["recording"] == "hum/night.wav"]["start"].astype(float).tolist()
    assert starts == [*range(8, 28, 2)]  # the silence between stays


# --- What is refused ---------------------------------------------------------------------------------------------


def write_table(folder, *rows, header="file_name,label"):
    (folder / "metadata.csv").write_text("\n".join([header, *rows]))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: shutil.rmtree(f / "beep"), "has one class, 'hum'"),
        (lambda f: [path.unlink() for path in (f / "hum").rglob("*.*")], "hum holds no recording"),
        (lambda f: write(f / "cat" / "a.wav", "hum"), "the class 'cat' has one file"),
        (lambda f: shutil.copytree(f / "hum", f / "Hum "), "'Hum ' and 'hum': is it one class in two spellings"),
        (lambda f: [(f / n).rename(f / m) for n, m in (("hum", "\xe9"), ("beep", "e\u0301"))], "one class in two"),
        (lambda f: [shutil.rmtree(f / name) for name in ("beep", "hum")], "is no data set: it needs metadata"),
        (
            lambda f: write_table(f, "beep/x.WAV,beep", "../x.wav,hum"),
            r"line 3: file_name '../x.wav' is no path within",
        ),
        (
            lambda f: write_table(f, "beep/x.WAV,hum", "hum/x.WAV,beep"),
            r"line 2: file_name 'beep/x.WAV' is in the folder",
        ),
        (lambda f: write_table(f, "beep/x.WAV,", "hum/x.WAV,hum"), r"line 2: file_name 'beep/x.WAV' has no label"),
        (lambda f: write_table(f, "a.wav,one", header="file_name,fold"), "line 2: file_name 'a.wav' has no label"),
        (
            lambda f: write_table(f, "a.wav,a,one", header="file_name,label,fold"),
            "line 2: fold 'one' is not a whole number",
        ),
        (
            lambda f: write_table(f, "a.wav,a,x", header="file_name,label,start"),
            "line 2: start 'x' is no time in s",
        ),
        (
            lambda f: write_table(f, "a.wav,a,inf", header="file_name,label,start"),
            "line 2: start 'inf' is no time in s",
        ),
        (
            lambda f: write_table(f, "a.wav,a,3,1", header="file_name,label,start,end"),
            "line 2: end '1' is no time in s after the start",
        ),
        (lambda f: (f / "hum").rename(f / "h\x1bm"), r"'h\?m' is no name of a class: rename it"),
        (lambda f: (f / "hum").rename(f / "classID"), "'classID' is no name of a class: rename it"),
        (lambda f: (f / "hum" / "x.WAV").rename(f / "hum" / f"{'x' * 250}.wav"), "no name of a file here: rename it"),
        (lambda f: (f / "hum" / "x.WAV").rename(f / "hum" / "x\udcff.wav"), r"'hum/x\?.wav' is no name of a file here"),
        (
            lambda f: write_table(
                f, "a.wav,a,1,g", "b.wav,a,2,g", "c.wav,b,1,h", "d.wav,b,2,i", header="file_name,label,fold,group"
            ),
            "the group 'g' is in several folds",
        ),
    ],
)
def test_what_can_not_be_a_data_set_is_named_with_the_remedy(spoil, named, folder):
    spoil(folder)
    with pytest.raises(UserError, match=named):
        data_loader.read_dataset(folder)


def test_class_of_few_groups_is_named_with_what_that_means(tmp_path, capsys, monkeypatch):
    for class_name, names in {"a": "cdefgh", "b": "cd", "c": [f"dog{n}" for n in range(9)]}.items():
        for name in names:
            path = tmp_path / class_name / f"{name}.wav"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    with pytest.raises(UserError, match=r"the files of class 'c' are one group.* --group_by file"):
        data_loader.read_dataset(tmp_path)
    data_loader.read_dataset(tmp_path, group_by="file")
    assert "note: b: fewer groups than the 5 folds, so some folds do not test them" in capsys.readouterr().out
    monkeypatch.setattr(config, "N_FOLDS", 11)
    with pytest.raises(UserError, match=r"N_FOLDS is 11 in config\.py: it must be from 2 to 10"):
        data_loader.read_dataset(tmp_path, group_by="file")
    monkeypatch.setattr(config, "N_FOLDS", 10)
    with pytest.raises(UserError, match="no class has as many groups as there are folds, 10: lower N_FOLDS"):
        data_loader.read_dataset(tmp_path, group_by="file")


def test_file_that_is_no_audio_is_named_or_left_out(folder, preprocess, tmp_path):
    (folder / "hum" / "note.wav").write_text("no sound")
    done = preprocess(folder)
    assert done.returncode == 2 and "hum/note.wav" in done.stderr and "can't be decoded as audio" in done.stderr
    done = preprocess(folder, "--allow_missing")
    assert done.returncode == 0 and len(data_loader.load_processed(tmp_path / "data").labels) == 12
