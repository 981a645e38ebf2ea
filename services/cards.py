"""The README.md of a Hugging Face repository: data_card.md and model_card.md, filled with facts from the files.

A card has no date: the same files give the same card, and nothing to send.
"""

from pathlib import Path
from string import Template

import data_loader
from reports import tables

URBANSOUND_CLIPS = 8732
MINIATURE_FSID = 900_000  # the synthetic miniature's first Freesound id (demo_data.py); UrbanSound8K's last is 209992
LEFT_OUT_LISTED = 20

URBANSOUND_LICENCE = """\
The recordings are those of UrbanSound8K (https://urbansounddataset.weebly.com/urbansound8k.html): excerpts from
Freesound.org, published for non-commercial use under CC BY-NC 3.0 (https://creativecommons.org/licenses/by-nc/3.0/).
The licence binds the derived files too, and so these: pass on the attribution, and make no commercial use of them.

Cross-validate with the ten folds as they are: clips of one recording share a fold. Publications cite

> J. Salamon, C. Jacoby and J. P. Bello, "A Dataset and Taxonomy for Urban Sound Research", 22nd ACM International
> Conference on Multimedia, Orlando, USA, Nov. 2014. https://doi.org/10.1145/2647868.2655045"""

MINIATURE_LICENCE = """\
The clips are synthetic, made by `python download_data.py --demo` in UrbanSound8K's layout. None of its recordings is
among them, and no score on them says anything about it."""


def data_card(folder, repo_id):
    """Return the card of a data set repository, Markdown below a YAML header, for the processed files in a folder."""
    info = data_loader.read_info(Path(folder))
    clips = data_loader.read_clip_table(Path(folder) / "clips.csv")
    is_synthetic = _is_miniature(clips["slice_file_name"])
    counts = clips.groupby(["class", "fold"]).size().unstack(fill_value=0)  # (classes, folds) clips
    rows = [[name, *row, sum(row)] for name, row in zip(counts.index, counts.to_numpy().tolist(), strict=True)]
    rows.append(["all", *counts.sum().tolist(), len(clips)])
    is_part = not is_synthetic and len(clips) < URBANSOUND_CLIPS
    left_out = ", ".join(info["left_out"][:LEFT_OUT_LISTED]) + (", ..." * (len(info["left_out"]) > LEFT_OUT_LISTED))
    return _fill(
        "data_card.md",
        is_synthetic,
        title=f"{'Synthetic miniature' if is_synthetic else 'UrbanSound8K'}: log-mel spectrograms",
        source="the project's synthetic miniature" if is_synthetic else "UrbanSound8K",
        size_category="n<1K" if len(clips) < 1000 else "1K<n<10K" if len(clips) < 10_000 else "10K<n<100K",
        n_clips=f"{len(clips):,}" + f" of its {URBANSOUND_CLIPS:,}" * is_part,
        n_classes=len(counts),
        n_folds=len(counts.columns),
        shape=" × ".join(f"{length:,}" for length in info["shape"]),
        dtype=info["audio"]["feature_dtype"],
        repo_id=repo_id,
        settings=_settings_table(info["audio"]),
        counts=tables.table(["class", *(f"fold {fold}" for fold in counts.columns), "all"], rows),
        left_out=left_out and f"\n{len(info['left_out'])} left out as missing or unreadable: {left_out}\n",
    )


def model_card(results, names, repo_id):
    """Return the card of a model repository. results: as results.json has them; names: file names of tested clips."""
    settings, is_synthetic = results["run"].get("settings", {}), _is_miniature(names)
    data = "Synthetic miniature of UrbanSound8K" if is_synthetic else "UrbanSound8K"
    network = settings.get("model", "network")
    return _fill(
        "model_card.md",
        is_synthetic,
        network=network,
        title=tables.titled(f"{network}, trained on {data}", results),
        coverage=f"{data}, {tables.coverage(results)}, protocol {results['protocol']}",
        accuracy=f"{results['accuracy_mean']:.4f}",
        accuracy_name=tables.titled("Accuracy, mean over folds", results),
        f1=f"{results['macro_f1']:.4f}",
        f1_name=tables.titled("Macro F1, all clips together", results),
        summary=tables.summary_line(results),
        classes=tables.classes_table(results),
        repo_id=repo_id,
        settings=_settings_table(settings),
    )


def _fill(template, is_synthetic, **facts):
    licence = MINIATURE_LICENCE if is_synthetic else URBANSOUND_LICENCE
    licence_line = "" if is_synthetic else "license: cc-by-nc-3.0\n"
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return Template(text).substitute(facts, licence=licence, licence_line=licence_line)


def _is_miniature(names):
    """Return whether all these file names, which begin with a Freesound id, are the synthetic miniature's."""
    first_parts = [name.split("-")[0] for name in names]
    return all(part.isdigit() and int(part) >= MINIATURE_FSID for part in first_parts)


def _settings_table(settings):
    return tables.table(["setting", "value"], [[name, value] for name, value in settings.items()], left=(0, 1))
