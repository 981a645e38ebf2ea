"""answers.py: a clip of the data set is recognised, and what an answer to it is worth."""

import shutil

import pytest

from reports import answers


@pytest.fixture(scope="module")
def assets(tmp_path_factory, miniature, run_script):
    """Assets with the miniature as data set, and its processed files."""
    assets = tmp_path_factory.mktemp("known")
    shutil.copytree(miniature, assets / "data" / "UrbanSound8K")
    done = run_script("preprocess_data.py", "--assets_dir", assets)
    assert done.returncode == 0, done.stderr
    return assets


def clips(assets, fold):
    return sorted((assets / "data" / "UrbanSound8K" / "audio" / f"fold{fold}").glob("*.wav"))


def test_a_clip_is_known_wherever_it_lies(assets, tmp_path):
    for fold in (1, 2, 3):
        clip = clips(assets, fold)[0]
        copy = shutil.copy(clip, tmp_path)
        assert answers.find_fold(clip, assets) == fold
        assert answers.find_fold(tmp_path / clip.name, assets) == fold, copy
        assert answers.find_fold(tmp_path / clip.name, tmp_path, processed_dir=assets / "data") == fold


def test_another_content_or_name_is_another_recording(assets, tmp_path):
    one, other = clips(assets, 1)[:2]
    shutil.copy(other, tmp_path / one.name)
    assert answers.find_fold(tmp_path / one.name, assets) is None
    for name in ("dog.wav", "1-2-3.wav", "999-1-0-0.wav"):
        shutil.copy(one, tmp_path / name)
        assert answers.find_fold(tmp_path / name, assets) is None


def test_without_or_with_a_damaged_table_nothing_is_known(assets, tmp_path):
    clip = clips(assets, 1)[0]
    assert answers.find_fold(clip, tmp_path) is None
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "clips.csv").write_bytes(b"\xff\x00,\n")
    assert answers.find_fold(clip, tmp_path, processed_dir=tmp_path / "damaged") is None


def info(fold, *training_folds):
    return {"fold": fold, "training_folds": list(training_folds)}


def test_what_an_answer_is_worth():
    tested = answers.note(1, [info(0, 3, 4)])
    assert "fold 1" in tested and "not trained on" in tested and "too good" not in tested
    trained = answers.note(3, [info(0, 3, 4)])
    assert "trained on it" in trained and "--fold_num 2 has never heard it" in trained
    assert "chosen its epoch" in answers.note(2, [info(0, 3, 4)])
    of_all = answers.note(3, [info(0, 3, 4), info(1, 1, 4), info(2, 1, 2), info(3, 1, 2, 3)])
    assert "2 of 4 models trained on it" in of_all and "--fold_num 2" in of_all


@pytest.mark.parametrize("info", [{}, {"fold": 0}, {"training_folds": [3]}, {"fold": "0", "training_folds": 3}])
def test_a_strangers_model_may_not_say_what_it_has_trained_on(info):
    assert "does not say" in answers.note(3, [info])
