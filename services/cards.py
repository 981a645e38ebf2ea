"""The README.md of a Hugging Face repository: what stands there, made from the files themselves.

A card has no date, so that the same files give the same card and nothing to send.
"""

import json

import data_loader
import utils
from reports import report

URBANSOUND_CLIPS = 8732
MINIATURE_FSID = 900_000  # the miniature's first Freesound id (demo_data.py); UrbanSound8K's last is 209992
LEFT_OUT_SHOWN = 20

DATASET_CARD = """\
---
{header}
---

# {title}

Log-mel spectrograms of {source}, ready for training: {n_clips} clips of {n_classes} classes in the data set's own
{n_folds} folds. Made by `preprocess_data.py` of the project Audio is All You Need.

| file | content |
|---|---|
| `features.pkl` | array {shape}, {dtype}: clip × row × frame, power in dB; the rows: see below |
| `labels.pkl`, `folds.pkl` | int64 arrays in the same order: classID; fold, 1 to 10 |
| `class_mapping.pkl` | {{classID: class name}} |
| `clips.csv` | the metadata rows in the same order |
| `features.json` | audio settings, clip count, fingerprint |

## How to load it

Set `HF_REPO_ID = "{repo_id}"` in the project's `config.py`, then:

    python train.py         # fetches these files where there are none, and trains

or, in Python, once they are in a folder:

    data = data_loader.load_processed(folder)       # data.features, data.labels, data.folds, data.class_names

Both read the pickles with a loader that takes arrays, numbers and text alone. Any other way of opening a pickle may run
code that is in it.

## Audio settings

{settings}

The rows are the `n_mels` mel bands of a log-mel spectrogram, then the `fine_n_mels` bands of each of a frame's
`fine_frames` shorter frames.

## Clips per class and fold

{counts}
{left_out}
## Source, licence and citation

{licence}
"""

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


def dataset_card(folder, repo_id):
    """Return the data set card of the processed files in a folder: a YAML header and Markdown."""
    info = utils.load_json(folder / "features.json")
    clips = data_loader.read_clip_table(folder / "clips.csv")
    folds, counts = data_loader.count_clips(clips)
    miniature = is_miniature(clip["slice_file_name"] for clip in clips)
    title = "Synthetic miniature" if miniature else "UrbanSound8K"
    partial = "" if miniature or len(clips) == URBANSOUND_CLIPS else f" of its {URBANSOUND_CLIPS:,}"
    header = [
        f"pretty_name: {json.dumps(f'{title}: log-mel spectrograms')}",
        *([] if miniature else ["license: cc-by-nc-3.0"]),
        "task_categories: [audio-classification]",
        "tags: [audio, environmental-sound, log-mel-spectrogram, urbansound8k]",
        f"size_categories: [{size_category(len(clips))}]",
        "configs: [{config_name: clips, data_files: clips.csv}]",
    ]
    return DATASET_CARD.format(
        header="\n".join(header),
        title=f"{title}: log-mel spectrograms",
        source="the project's synthetic miniature" if miniature else "UrbanSound8K",
        n_clips=f"{len(clips):,}{partial}",
        n_classes=len(counts),
        n_folds=len(folds),
        shape=" × ".join(f"{length:,}" for length in info["shape"]),
        dtype=info["audio"]["feature_dtype"],
        repo_id=repo_id,
        settings=table(["setting", "value"], [[f"`{name}`", value] for name, value in info["audio"].items()]),
        counts=count_table(folds, counts),
        left_out=left_out_paragraph(info["left_out"]),
        licence=MINIATURE_LICENCE if miniature else URBANSOUND_LICENCE,
    )


def is_miniature(names):
    """Return whether all these file names, which begin with a Freesound id, are the synthetic miniature's."""
    first_parts = [name.split("-")[0] for name in names]
    return all(part.isdigit() and int(part) >= MINIATURE_FSID for part in first_parts)


def size_category(n_clips):
    """Return the Hub's name for the order of magnitude of a data set's rows."""
    return "n<1K" if n_clips < 1000 else "1K<n<10K" if n_clips < 10_000 else "10K<n<100K"


def count_table(folds, counts):
    """Return clips per class and fold (see `data_loader.count_clips`) as a Markdown table with sums."""
    rows = [[name, *row, sum(row)] for name, row in counts.items()]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    return table(["class", *(f"fold {fold}" for fold in folds), "all"], rows)


def left_out_paragraph(names):
    """Return a paragraph that names the clips which are in the metadata of the source and not here; "" if none are."""
    if not names:
        return ""
    more = ", ..." if len(names) > LEFT_OUT_SHOWN else ""
    return f"\n{len(names)} left out as missing or unreadable: {', '.join(names[:LEFT_OUT_SHOWN])}{more}\n"


def table(header, rows):
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# --- Models ------------------------------------------------------------------------------------------------------

MODEL_CARD = """\
---
{header}
---

# {title}

**{summary}**

{coverage}. Protocol: {protocol}.

{classes}

![Confusion matrix](confusion_matrix.png)

`report.md` and `results.json` have the rest: folds, confusions, confidence. The whole is made by `train.py` of the
project Audio is All You Need.

## How to predict

    python predict.py recording.wav --from_hub {repo_id}
    python predict.py recording.wav --from_hub {repo_id} --fold_num 3
    python predict.py recording.wav --model_dir hf://{repo_id}

in a clone of the project. `model_fold_<k>_best.safetensors` has weights, class names, audio settings and normalisation:
nothing else is needed. Fold k was tested on the data set's fold k + 1 and has not seen it. `checkpoints/` has the
weights of each epoch.

## Settings

{settings}

## Source, licence and citation

{licence}
"""


def model_card(results, names, repo_id):
    """Return the card of a model repository: a YAML header, with the `model-index` that the Hub shows, and Markdown.

    results: as results.json has them; names: of some tested clips.
    """
    settings = results["run"].get("settings", {})
    network = settings.get("model", "network")
    miniature = is_miniature(names)
    data = "Synthetic miniature of UrbanSound8K" if miniature else "UrbanSound8K"
    header = {
        **({} if miniature else {"license": "cc-by-nc-3.0"}),
        "library_name": "audio_is_all_you_need",
        "pipeline_tag": "audio-classification",
        "tags": ["audio", "environmental-sound", "log-mel-spectrogram", "urbansound8k"],
        "model-index": [{"name": network, "results": [model_index_result(results, data)]}],
    }
    return MODEL_CARD.format(
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        title=report.titled(f"{network}, trained on {data}", results),
        summary=report.summary_line(results),
        coverage=report.coverage(results),
        protocol=report.PROTOCOLS.get(results["protocol"], "not one of this project"),
        classes=report.classes_table(results),
        repo_id=repo_id,
        settings=table(["setting", "value"], [[f"`{name}`", value] for name, value in settings.items()]),
        licence=MINIATURE_LICENCE if miniature else URBANSOUND_LICENCE,
    )


def model_index_result(results, data):
    """Return the scores as the Hub's metadata has them: shares from 0 to 1, and a name that says what they are."""
    folds = f"{results['folds_present']} folds" if results["folds_present"] > 1 else "one fold"
    values = {
        f"Accuracy, mean of {folds}": ("accuracy", results["accuracy_mean"]),
        f"Accuracy, standard deviation over {folds}": ("accuracy_std", results["accuracy_std"]),
        "Macro F1, all clips together": ("f1", results["macro_f1"]),
    }
    return {
        "task": {"type": "audio-classification", "name": "Audio classification"},
        "dataset": {
            "type": "urbansound8k",
            "name": report.titled(f"{data}, {report.coverage(results)}, protocol {results['protocol']}", results),
        },
        "metrics": [
            {"type": kind, "value": round(value, 4), "name": report.titled(name, results)}
            for name, (kind, value) in values.items()
            if value is not None
        ],
    }
