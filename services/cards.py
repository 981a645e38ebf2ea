"""The README.md of a Hugging Face repository: a template (*_card.md) filled with facts. Same files, same card."""

import re
from pathlib import Path
from string import Template

import pandas as pd

import data_loader
import utils
from reports import tables
from reports.answers import CLIP_NAME

MINIATURE_FSID = 900_000  # the synthetic miniature's first Freesound id (demo_data.py); UrbanSound8K's last is 209992


def data_card(folder, repo_id):
    """Return the card of a data set repository, Markdown below a YAML header, for the processed files in a folder."""
    info = data_loader.read_info(folder)
    clips = data_loader.read_clip_table(folder / "clips.csv")
    counts = pd.crosstab(clips["class"], clips["fold"])  # (classes, folds)
    header = ["class", *(f"fold {fold}" for fold in counts), "all"]
    counts["all"] = counts.sum(axis=1)
    return _fill(
        "data_card.md",
        clips["slice_file_name"],
        info["source"],
        n_clips=f"{len(clips):,}",
        n_left_out=len(info["left_out"]),
        shape=tuple(info["shape"]),  # (clips, n_mels, n_frames)
        dtype=tables.escape(info["audio"]["feature_dtype"]),
        repo_id=repo_id,
        settings=_settings_table(info["audio"]),
        counts=tables.table(header, [*counts.itertuples(name=None), ("all", *counts.sum())]),
    )


def model_card(results, names, repo_id):
    """Return the card of a model repository. results: as results.json has them; names: file names of tested clips."""
    settings = results["run"].get("settings", {})
    return _fill(
        "model_card.md",
        names,
        results["run"].get("source", "own sounds"),
        network=tables.escape(settings.get("model", "network")),
        note=tables.titled("", results),
        coverage=f"{tables.coverage(results)}, protocol {results['protocol']}",
        accuracy=f"{results['accuracy_mean']:.4f}",
        f1=f"{results['macro_f1']:.4f}",
        summary=tables.summary_line(results),
        classes=tables.classes_table(results),
        repo_id=repo_id,
        settings=_settings_table(settings),
    )


def _fill(template, names, source, **facts):
    """Return a card, its licence that of the data set whose file names these are; source: that one's name."""
    folder = Path(__file__).parent
    if not all(CLIP_NAME.fullmatch(name) for name in names):
        kind, source, slug = "own", re.sub(r"[^\w .-]", "?", utils.one_line(source)), "own-sounds"
    elif all(int(name.split("-")[0]) >= MINIATURE_FSID for name in names):
        kind, source, slug = "miniature", "Synthetic miniature of UrbanSound8K", "urbansound8k"
    else:
        kind, source, slug = "urbansound8k", "UrbanSound8K", "urbansound8k"
    facts |= {"source": source, "slug": slug, "licence": (folder / f"{kind}_card.md").read_text(encoding="utf-8")}
    facts["licence_line"] = "license: cc-by-nc-3.0\n" if kind == "urbansound8k" else ""
    return Template((folder / template).read_text(encoding="utf-8")).substitute(facts)


def _settings_table(settings):
    return tables.table(["setting", "value"], settings.items(), left=(0, 1))
