"""answers.py: timelines out of overlapping windows, what is printed and written of them, and clips of the data set."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_loader
from reports import answers
from reports.answers import Answer

NAMES = ["dog_bark", "siren"]


def answer(starts, ends, sirens, notes=(), levels=None):
    """An Answer whose windows give the siren these probabilities; None is silence."""
    levels = np.ones(len(sirens)) if levels is None else np.array(levels)
    rows = [[np.nan, np.nan] if siren is None else [1 - siren, siren] for siren in sirens]
    return Answer(
        NAMES, float(max(ends)), np.array(starts, float), np.array(ends, float), np.array(rows), levels, list(notes)
    )


@pytest.mark.parametrize(
    ("starts", "ends", "sirens", "timeline"),
    [
        # 0-2: 0.9; 2-4: 0.8; 4-6: 0.45; 6-8: 0.1; 8-10: 0
        ([0, 2, 4, 6], [4, 6, 8, 10], [0.9, 0.7, 0.2, 0], [(0, 4, "siren", 0.85), (4, 10, "dog_bark", 2.45 / 3)]),
        # parts of 2, 1, 1, 2 and 1 s count by their length
        ([0, 2, 3], [4, 6, 7], [0.6, 0.8, 1.0], [(0, 7, "siren", (2 * 0.6 + 0.7 + 0.8 + 2 * 0.9 + 1) / 7)]),
        ([0], [1.5], [0.25], [(0, 1.5, "dog_bark", 0.75)]),
        (
            [0, 2, 4, 6, 8],
            [4, 6, 8, 10, 12],
            [0.8, None, None, None, 0.6],
            [(0, 4, "siren", 0.8), (4, 8, "silence", 1.0), (8, 12, "siren", 0.6)],
        ),
    ],
)
def test_overlapping_windows_are_averaged_and_parts_of_one_class_merged(starts, ends, sirens, timeline):
    found = answer(starts, ends, sirens).timeline
    assert [row[:3] for row in found] == [row[:3] for row in timeline]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in timeline])


def test_answer_is_of_the_windows_that_are_sure_and_loud():
    starts = np.arange(20.0)
    shares, levels = np.full(20, 0.3), np.full(20, 0.1)
    levels[[3, 4, 5]], shares[[3, 4, 5]] = 1, (0.9, 0.8, 0.5)
    shares[8] = np.nan  # silence
    levels[8] = 0
    found = answer(starts, starts + 4, [None if np.isnan(share) else share for share in shares], levels=levels)
    assert found.overall.tolist() == pytest.approx([0.15, 0.85])  # of a tenth, two windows
    assert (found.label, found.confidence) == ("siren", pytest.approx(0.85))
    assert found.probabilities == pytest.approx({"siren": 0.85, "dog_bark": 0.15})


def test_silence_is_in_no_answer():
    assert answer([0, 2, 4], [4, 6, 8], [0.8, None, 0.6], levels=[0.1, 0, 0.1]).confidence == pytest.approx(0.8)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=12), st.integers(1, 4))
def test_a_timeline_covers_the_recording_once(sirens, hop):
    starts = np.arange(len(sirens)) * hop
    timeline = answer(starts, starts + 4, sirens).timeline
    assert timeline[0][0] == 0 and timeline[-1][1] == starts[-1] + 4
    for (_, end, name, _), (start, _, next_name, _) in itertools.pairwise(timeline):
        assert end == start and name != next_name
    for start, end, name, confidence in timeline:
        assert start < end and name in [*NAMES, "silence"] and 0.5 <= confidence <= 1


def test_text_of_a_long_recording(capsys):
    answers.print_answer("a.wav", answer([0, 3598], [4, 3602], [0.9, 0.2], ["think twice"]), ["m.safetensors"])
    assert capsys.readouterr().out.splitlines() == [
        "a.wav (3602.00 s), m.safetensors",
        "siren, confidence 90.0% (of 2 windows)",
        "note: think twice",
        f"  siren      90.0%  {36 * '█'}",
        f"  dog_bark   10.0%  {4 * '█'}",
        "timeline:",
        "  0:00:00.0 - 0:00:04.0  siren      90.0%",
        "  0:00:04.0 - 0:59:58.0  silence   100.0%",
        "  0:59:58.0 - 1:00:02.0  dog_bark   80.0%",
    ]


def test_json_csv_and_labels_say_the_same(tmp_path):
    long = answer([0, 2], [4, 6], [0.9, 0.05])
    value = json.loads(answers.as_json("a,b.wav", long, ["x", "y"], top_k=1))
    assert value["file"] == "a,b.wav" and value["models"] == ["x", "y"] and value["windows"] == 2
    assert (value["class"], value["confidence"]) == ("dog_bark", 0.95)
    assert value["probabilities"] == {"dog_bark": 0.95}
    expected = [(0, 2, "siren", 0.9), (2, 6, "dog_bark", 0.7375)]
    assert [tuple(part[column] for column in answers.COLUMNS) for part in value["timeline"]] == expected
    answers.save_csv(tmp_path / "a.csv", {"a,b.wav": long.timeline})
    header, *rows = csv.reader((tmp_path / "a.csv").open(newline=""))
    assert header == ["file", "start", "end", "class", "confidence"]
    assert [(name, float(a), float(b), c, float(d)) for name, a, b, c, d in rows] == [("a,b.wav", *e) for e in expected]
    answers.save_labels(tmp_path / "a.txt", long.timeline)
    assert (tmp_path / "a.txt").read_text() == ("0.000000\t2.000000\tsiren 90%\n2.000000\t6.000000\tdog_bark 74%\n")


def test_csv_has_no_cell_that_a_spreadsheet_takes_for_a_formula(tmp_path):
    part = [(0.0, 4.0, "siren", 1.0)]
    answers.save_csv(tmp_path / "a.csv", {"=cmd.wav": part, "@a.wav": part, "b=.wav": part})
    files = [line.split(",")[0] for line in (tmp_path / "a.csv").read_text().splitlines()]
    assert files == ["file", "./=cmd.wav", "./@a.wav", "b=.wav"]


def test_name_that_is_no_text_is_escaped_in_every_output(tmp_path, capsys):
    name, siren = "kr\udcffhe\n.wav", answer([0], [4], [0.9])
    answers.print_answer(name, siren, ["m"])
    assert capsys.readouterr().out.splitlines()[0] == "kr?he .wav (4.00 s), m"
    line = answers.as_json(name, siren, ["m"])
    assert line.isascii() and json.loads(line)["file"] == name
    answers.save_csv(tmp_path / "a.csv", {name: siren.timeline})
    assert list(csv.reader((tmp_path / "a.csv").open(newline="", encoding="utf-8")))[1][0] == "kr\\udcffhe\n.wav"


# --- Clips of the data set ---------------------------------------------------------------------------------------


def info(fold, *training_folds):
    return {"fold": fold, "training_folds": list(training_folds)}


@pytest.fixture
def assets(tmp_path, miniature):
    """Assets with the table of the miniature where preprocessing puts it."""
    (tmp_path / "data").mkdir()
    shutil.copy(miniature / "metadata" / "UrbanSound8K.csv", tmp_path / "data" / "clips.csv")
    return tmp_path


def clip(assets, fold):
    clips = data_loader.read_clip_table(assets / "data" / "clips.csv")
    return Path(clips.loc[clips["fold"] == fold, "slice_file_name"].iloc[0])


def test_clip_is_known_in_any_folder_by_its_name(tmp_path, assets):
    assert "fold 2" in answers.known_clip_note(tmp_path / clip(assets, 2), [info(0, 3, 4)], assets)
    no_assets = tmp_path / "empty"
    assert "fold 2" in answers.known_clip_note(clip(assets, 2), [info(0, 3, 4)], no_assets, assets / "data")
    for name in ("dog.wav", "1-2-3.wav", "999-1-0-0.wav"):
        assert answers.known_clip_note(tmp_path / name, [info(0, 3, 4)], assets) is None


@pytest.mark.parametrize("table", [None, b"\xff\x00,\n"])
def test_clip_is_not_known_without_a_readable_table(assets, table):
    path, name = assets / "data" / "clips.csv", clip(assets, 1)
    path.unlink() if table is None else path.write_bytes(table)
    assert answers.known_clip_note(name, [info(0, 3, 4)], assets) is None


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([info(1, 3, 4)], "fold 2, which this model has not trained on"),
        ([info(0, 2, 3)], "this model trained on it, so the answer is too good; --fold_num 1 has never heard it"),
        ([info(0, 3, 4)], "this model has chosen its epoch with it, so the answer is too good"),
        ([info(0, 2, 3), info(1, 1, 4), info(2, 1, 2)], "2 of 3 models trained on it"),
        ([{}], "does not say on which folds"),
        ([{"fold": "0", "training_folds": 3}], "does not say on which folds"),
    ],
)
def test_note_says_what_an_answer_to_a_known_clip_is_worth(assets, infos, words):
    assert words in answers.known_clip_note(clip(assets, 2), infos, assets)
