"""A web page that says what a sound is: upload a recording or use the microphone.

    pip install -r requirements-app.txt          # Gradio, in the project's environment
    python app.py                                # your own trained model, else the ready one
    python app.py --model_dir hf://owner/name --port 8000

Prints the page's address, on this machine alone. The page shows the class and its confidence, bars for all classes, a
picture of waveform, log-mel and timeline, and a table of what sounds when, to download as CSV. It needs no internet.
Recordings are removed after KEEP_SECONDS, and nothing is logged. research/scaling.md has how it becomes a Space.
"""

import argparse
import base64
import os
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import utils
from audio import stream_audio
from classifier import find_models, open_models
from reports import answers, pictures, tables
from utils import UserError

MAX_UPLOAD = "50mb"
MAX_MINUTES = 10  # of a recording
KEEP_SECONDS = 600  # s until a recording is removed
HINT = "Choose a recording, or press the microphone."


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", metavar="DIR", help="a folder, a file, or hf://owner/name (default: models/)")
    add("--port", type=port_number, metavar="N", help="of the page (default: 7860, or the next that is free)")
    return parser.parse_args()


def port_number(text):
    """argparse type: a TCP port."""
    port = utils.positive_int(text)
    if port > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is above 65535, the last port")
    return port


def limited(blocks, rate):
    """Yield blocks of samples, (n,) each at `rate` Hz. UserError after MAX_MINUTES."""
    seconds = 0.0
    for block in blocks:
        seconds += len(block) / rate
        if seconds > 60 * MAX_MINUTES:
            raise UserError(f"it is longer than {MAX_MINUTES} minutes: cut it")
        yield block


def describe(path, model):
    """Return what the page shows of a recording: (text, {class: probability}, picture, rows of a table, link).

    The picture is an RGB array, the link HTML with the table as CSV. What can't be predicted is a text with the reason.
    """
    if not path:
        return HINT, None, None, None, ""
    name, rate, sketch = Path(path).name, model.audio.sample_rate, pictures.Sketch(model.audio)
    try:
        answer = model.classify(limited(stream_audio(path, rate), rate), watch=sketch.add)
        with tempfile.TemporaryDirectory() as folder:
            picture, table = Path(folder) / "picture.png", Path(folder) / "timeline.csv"
            pictures.draw_recording(picture, name, answer, sketch)
            answers.save_csv(table, {name: answer.timeline})
            image, csv = pictures.read(picture), base64.b64encode(table.read_bytes()).decode()
    except UserError as error:
        return f"**{tables.escape(str(error).replace(str(path), name))}**", None, None, None, ""
    timeline = answer.timeline
    rows = [[answers.clock(start), answers.clock(end), sound, f"{share:.0%}"] for start, end, sound, share in timeline]
    link = f'<a download="timeline.csv" href="data:text/csv;base64,{csv}">Download the table as CSV</a>'
    names = tables.escape(", ".join(model.names))
    text = f"## {tables.escape(answer.label)}\n{answer.confidence:.0%} sure, of {answer.seconds:.1f} s by {names}"
    return text, answer.probabilities, image, rows, link


def build_page(gradio, model):
    """Return the Gradio Blocks of the page."""
    with gradio.Blocks(title="What is that sound?", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as page:
        gradio.Markdown(f"# What is that sound?\nOne of: {', '.join(map(tables.escape, model.info['class_names']))}.")
        with gradio.Row():
            with gradio.Column():
                audio = gradio.Audio(sources=["upload", "microphone"], type="filepath", label="Recording", buttons=[])
                text = gradio.Markdown(HINT)
                bars = gradio.Label(label="Classes", show_heading=False)
            with gradio.Column():
                image = gradio.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])
                headers = ["from", "to", "class", "sure"]
                rows = gradio.Dataframe(headers=headers, label="Timeline", interactive=False, wrap=True)
                link = gradio.HTML()
        shown = [text, bars, image, rows, link]
        audio.change(lambda path: describe(path, model), audio, shown, api_name="classify", show_progress_on=text)
    return page


def main():
    args = parse_args()
    gradio = utils.need("gradio", "the page", "pip install -r requirements-app.txt")
    model = open_models(find_models(args.model_dir, None, utils.run_folders(args).models))
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others are fetched
    page = build_page(gradio, model)
    host = None if "SPACE_ID" in os.environ else "127.0.0.1"  # a Space sets its own; elsewhere this machine alone
    limits = {"max_file_size": MAX_UPLOAD, "share": False}
    try:
        page.launch(server_name=host, server_port=args.port, theme=theme, footer_links=[], **limits)
    except OSError as error:  # Gradio's own has no errno, but the ports that it tried
        raise UserError(f"{utils.one_line(error).split('. ')[0]}: name a free one with --port") from error


if __name__ == "__main__":
    utils.run(main)
