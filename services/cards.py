"""The README.md of a Hugging Face repository: a template (*_card.md) filled with facts. Same files, same card."""

from pathlib import Path
from string import Template

import pandas as pd

import data_loader
from reports import tables

MINIATURE_FSID = 900_000  # the synthetic miniature's first Freesound id (demo_data.py); UrbanSound8K's last is 209992


def data_card(folder, repo_id):
    """Return the card of a data set repository, Markdown below a YAML header, for the processed files in a folder."""
    info = data_loader.read_info(folder)
    clips = data_loader.read_clip_table(folder / "clips.csv")
    counts = pd.crosstab(clips["class"], clips["fold"], margins=True, margins_name="all")  # (classes + 1, folds + 1)
    header = ["class", *(f"fold {fold}" for fold in counts.columns[:-1]), "all"]
    return _fill(
        "data_card.md",
        clips["slice_file_name"],
        n_clips=f"{len(clips):,}",
        n_left_out=len(info["left_out"]),
        shape=tuple(info["shape"]),  # (clips, n_mels, n_frames)
        dtype=info["audio"]["feature_dtype"],
        repo_id=repo_id,
        settings=_settings_table(info["audio"]),
        counts=tables.table(header, counts.itertuples(name=None)),
    )


def model_card(results, names, repo_id):
    """Return the card of a model repository. results: as results.json has them; names: file names of tested clips."""
    settings = results["run"].get("settings", {})
    return _fill(
        "model_card.md",
        names,
        network=settings.get("model", "network"),
        note=tables.titled("", results),
        coverage=f"{tables.coverage(results)}, protocol {results['protocol']}",
        accuracy=f"{results['accuracy_mean']:.4f}",
        f1=f"{results['macro_f1']:.4f}",
        summary=tables.summary_line(results),
        classes=tables.classes_table(results),
        repo_id=repo_id,
        settings=_settings_table(settings),
    )


def _fill(template, names, **facts):
    """Return a card, its licence that of the data set whose file names these are."""
    is_miniature, folder = _is_miniature(names), Path(__file__).parent
    source = "Synthetic miniature of UrbanSound8K" if is_miniature else "UrbanSound8K"
    licence = folder / ("miniature_card.md" if is_miniature else "urbansound8k_card.md")
    facts |= {"source": source, "licence": licence.read_text(encoding="utf-8")}
    facts["licence_line"] = "" if is_miniature else "license: cc-by-nc-3.0\n"
    return Template((folder / template).read_text(encoding="utf-8")).substitute(facts)


def _is_miniature(names):
    """Return whether all these file names, which begin with a Freesound id, are the synthetic miniature's."""
    first_parts = [name.split("-")[0] for name in names]
    return all(part.isdigit() and int(part) >= MINIATURE_FSID for part in first_parts)


def _settings_table(settings):
    return tables.table(["setting", "value"], settings.items(), left=(0, 1))
