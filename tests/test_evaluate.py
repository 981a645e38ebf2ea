"""evaluate.py as a command, and two runs side by side."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY
from result_files import CLASSES, CLIPS_A_FOLD, raw_predictions, read_rows, write_clips, write_rows, write_run

import evaluate
from reports import metrics, tables
from services import cards
from utils import UserError


def test_compare_equals_the_answers_counted_by_hand(tmp_path):
    a, b = write_run(tmp_path / "a", folds=[0, 1]), write_run(tmp_path / "b", folds=[1, 2], seed=1)
    text, values = evaluate.compare(a, b)
    true, guess_a = map(np.array, raw_predictions(a, 1))
    guess_b = np.array(raw_predictions(b, 1)[1])
    right_a, right_b = true == guess_a, true == guess_b
    assert values["clips"] == CLIPS_A_FOLD
    assert (values["only_a"], values["only_b"]) == ((right_a & ~right_b).sum(), (right_b & ~right_a).sum())
    for row in values["classes"]:
        here = true == CLASSES.index(row["class"])
        assert (row["a"], row["b"]) == (pytest.approx(right_a[here].mean()), pytest.approx(right_b[here].mean()))
    moves = [abs(row["b"] - row["a"]) for row in values["classes"]]
    assert moves == sorted(moves, reverse=True)
    assert f"p = {values['p_value']:.2g}" in text and "2 folds, 60 clips" in text


def test_mcnemar_equals_the_binomial_sum():
    right = np.repeat([(True, True), (True, False), (False, True), (False, False)], [100, 6, 16, 8], axis=0)
    values = evaluate.mcnemar(right[:, 0], right[:, 1])
    assert (values["only_a"], values["only_b"]) == (6, 16)
    assert values["p_value"] == pytest.approx(2 * sum(math.comb(22, k) for k in range(7)) / 2**22)
    assert evaluate.mcnemar(right[:, 0], right[:, 0])["p_value"] == 1.0


def test_compare_takes_classes_by_name(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for path in b.glob("predictions_fold_*.csv"):  # the same answers, with columns and classIDs in reverse order
        rows = [[row[0], str(2 - int(row[1])) if row[1].isdigit() else row[1], *row[:1:-1]] for row in read_rows(path)]
        write_rows(path, rows)
    values = evaluate.compare(a, b)[1]
    assert values["only_a"] == values["only_b"] == 0 and values["p_value"] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows[0].__setitem__(2, "cat"), "different classes"),
        (lambda rows: rows[1].__setitem__(1, "1"), "clip0_0.wav is siren in .* and dog_bark in"),
        (lambda rows: [row.__setitem__(0, "x" + row[0]) for row in rows[1:]], "no test clip in common"),
    ],
)
def test_compare_of_runs_that_do_not_fit_is_refused(tmp_path, change, named):
    a, b = write_run(tmp_path / "a", folds=[0]), write_run(tmp_path / "b", folds=[0])
    rows = read_rows(b / "predictions_fold_0.csv")
    change(rows)
    write_rows(b / "predictions_fold_0.csv", rows)
    with pytest.raises(UserError, match=named):
        evaluate.compare(a, b)


def test_command_reports_whatever_matplotlibrc_says(tmp_path):
    write_run(tmp_path / "results")
    write_clips(tmp_path / "data")
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: true\nfigure.dpi: 7\n\xff\xfe")
    env = {**os.environ, "MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "no such backend"}
    command = [sys.executable, REPOSITORY / "evaluate.py", "--assets_dir", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert f"accuracy {100 * results['accuracy_mean']:.1f} % ± {100 * results['accuracy_std']:.1f}" in done.stdout
    assert len(results["files"]) == 6
    for name in results["files"]:
        assert str(tmp_path / "results" / name) in done.stdout and (tmp_path / "results" / name).is_file()


def test_command_compares_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    output = tmp_path / "new" / "comparison.md"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", str(a), str(b), "--output", f"{output.parent}/"])
    evaluate.main()
    text = output.read_text(encoding="utf-8")
    assert "McNemar" in text and capsys.readouterr().out.startswith(text)
    assert not (a / "results.json").exists()


def test_class_numbers_without_clips_csv_are_run_jsons(tmp_path):
    expected = metrics.read_results(write_run(tmp_path))["accuracy_mean"]
    class_ids = {"siren": 3, "dog_bark": 4, "drilling": 7}
    for path in write_run(tmp_path, class_ids=class_ids).glob("predictions_fold_*.csv"):
        header, *rows = read_rows(path)
        numbers = dict(zip("012", class_ids.values(), strict=True))
        write_rows(path, [header, *([name, numbers[class_id], *shares] for name, class_id, *shares in rows)])
    assert metrics.read_results(tmp_path)["accuracy_mean"] == expected


ODD = [None, True, -1, 0, 1e400, "x", "\x1b[2J\n# Title", [], [[1]], {}, {"0": None}, {"0": {"predictions": 1}}]


def places(value):
    """Yield (container, key) of every value within a nested one."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(item)


def test_tampered_run_json_is_refused_or_reported(tmp_path):
    folder, settings = tmp_path / "results", {"model": "AudioCNN", "seed": 1}
    run = {
        "settings": settings,
        "n_folds": 3,
        "temperatures": {"0": 1.5},
        "files": {"0": {}},
        "class_ids": {"siren": 0},
    }
    write_run(folder, **run)
    text = (folder / "run.json").read_text()
    n_refused = 0
    for number in range(len(list(places(json.loads(text))))):
        for odd in ODD:
            value = json.loads(text)
            container, key = list(places(value))[number]
            container[key] = odd
            (folder / "run.json").write_text(json.dumps(value))
            try:
                results = metrics.read_results(folder)
            except UserError as error:
                assert "\n" not in str(error)
                n_refused += 1
                continue
            for written in (
                tables.report_text({**results, "files": []}),
                cards.model_card(results, ["1-0-0-0.wav"], "a/b"),
            ):
                assert "\x1b" not in written and "\n# Title" not in written
    assert n_refused > 50


@pytest.mark.parametrize("name", ["predictions_fold_1.csv", "history_fold_1.csv"])
def test_tampered_table_is_refused_or_reported(name, tmp_path):
    folder, draw = write_run(tmp_path / "results"), random.Random(0)
    rows = read_rows(folder / name)
    n_refused = 0
    for _ in range(50):
        changed = [list(row) for row in rows]
        row = draw.choice(changed)
        row[draw.randrange(len(row))] = draw.choice(
            ["", "x", "-1", "nan", "inf", "1e999", "9" * 400, "\x00", "\x1b[2J"]
        )
        write_rows(folder / name, changed)
        try:
            results = metrics.read_results(folder)
            metrics.read_history(folder, 1)
            tables.report_text({**results, "files": []})
        except UserError as error:
            n_refused += 1
            assert name in str(error) and "\x1b" not in str(error)
    assert n_refused > 15


def test_numbers_are_written_before_the_first_picture(tmp_path, scripts):
    folder = write_run(tmp_path / "results")
    run = scripts.start("evaluate", "--assets_dir", tmp_path)
    while not list(folder.glob("confusion_matrix.png*")):
        assert not run.ended()
        time.sleep(0.002)
    assert run.kill() and run.wait().returncode == -signal.SIGKILL
    assert len(json.loads((folder / "results.json").read_text())["per_fold"]) == 3
    assert "accuracy" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "named"),
    [([], "no predictions in .*results: run python train.py first"), (["--processed_dir", "x"], "no clips.csv in x")],
)
def test_command_without_its_files_says_what_to_do(tmp_path, monkeypatch, flags, named):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--assets_dir", str(tmp_path), *flags])
    with pytest.raises(UserError, match=named):
        evaluate.main()
