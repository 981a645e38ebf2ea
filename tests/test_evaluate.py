"""evaluate.py as a command, and two runs side by side."""

import json
import math

import numpy as np
import pytest
from result_files import CLASSES, CLIPS_A_FOLD, raw_predictions, read_rows, write_clips, write_rows, write_run

import evaluate
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


def test_command_reports_whatever_matplotlibrc_says(tmp_path, run_script):
    write_run(tmp_path / "results")
    write_clips(tmp_path / "data")
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nbackend: TkAgg\nfigure.dpi: 7\n")
    done = run_script("evaluate.py", "--assets_dir", tmp_path, env={"MATPLOTLIBRC": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert f"accuracy {100 * results['accuracy_mean']:.1f} % ± {100 * results['accuracy_std']:.1f}" in done.stdout
    assert len(results["files"]) == 6
    for name in results["files"]:
        assert str(tmp_path / "results" / name) in done.stdout and (tmp_path / "results" / name).is_file()


def test_command_compares_and_writes_what_it_prints(tmp_path, run_script):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    output = tmp_path / "comparison.md"
    done = run_script("evaluate.py", "--assets_dir", tmp_path, "--compare", a, b, "--output", output)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "McNemar" in text and done.stdout.startswith(text)
    assert not (a / "results.json").exists()


def test_command_without_predictions_says_what_to_do(tmp_path, run_script):
    done = run_script("evaluate.py", "--assets_dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no predictions in {tmp_path / 'results'}: run python train.py first\n"
    folder = write_run(tmp_path / "results")
    done = run_script("evaluate.py", "--results_dir", folder, "--processed_dir", tmp_path)
    assert done.returncode == 2 and "no clips.csv" in done.stderr
