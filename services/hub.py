"""The Hugging Face Hub: the only file that knows it. Off until config.py or the environment names a repository.

    python -m services.hub push     # send what HF_REPO_ID and HF_MODEL_REPO_ID lack, after a failed upload or a crash

Stage 2 uploads the processed files to HF_REPO_ID, and stage 3 fetches them where they are missing. Stage 3 uploads the
weights of every epoch, models and report to HF_MODEL_REPO_ID, and stage 4 fetches models. Nothing is sent twice.
"""

import contextlib
import json
import os
import queue
import shlex
import shutil
import sys
import threading
from pathlib import Path

import config
import data_loader
import utils
from data_loader import PROCESSED_FILES
from model_file import MODEL_FILE
from reports import metrics
from services import cards
from utils import UserError

ANSWER_SECONDS = 30  # s of silence after which a request has failed
FINISH_SECONDS = 120  # s that a finished training waits for its last commit
STOP_SECONDS = 3  # s that an interrupted one waits
COMMIT_MINUTES = 0.01, 10_000  # the range of HF_COMMIT_MINUTES
RESULT_FILES = ("README.md", "results.json", "report.md", "confusion_matrix.png")  # README.md is the model card


# --- The client, and its failures in words -----------------------------------------------------------------------


def connect():
    """Return huggingface_hub's HfApi. UserError if the package is missing."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it warns at each retry; the outcome is our one line
    library = utils.need("huggingface_hub", "the Hugging Face Hub")
    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would run through a log, or the lines of the training
    library.get_session().timeout = ANSWER_SECONDS  # its own is endless
    return library.HfApi(library_name="audio_is_all_you_need")


@contextlib.contextmanager
def failures(what, otherwise=""):
    """Raise what goes wrong in the block as a UserError of one line: `what`, the reason, the remedy, `otherwise`."""
    try:
        yield
    except UserError as error:  # it has its remedy
        raise UserError(f"{what}: {error}") from error
    except Exception as error:  # of the client library, its HTTP and Xet libraries, or the disk
        raise UserError(f"{what}: {explain(error)}{otherwise}") from error


def explain(error):
    """Return the reason and the remedy, in one line, of what the Hub, its client, the network or the disk raised."""
    from huggingface_hub import errors

    reasons = (  # (class of exception or HTTP status, reason and remedy): the first that fits
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it (and TRANSFORMERS_OFFLINE) to use the Hub"),
        (errors.HFValidationError, 'the repository has no valid name; set it in config.py as "owner/name"'),
        (errors.RemoteEntryNotFoundError, "it lacks a file; send it: python -m services.hub push"),
        (401, "no token, or a refused one; run `hf auth login`, or correct HF_TOKEN (or the repository's name)"),
        (403, "the token may not write there, or the storage is full; take one that may, or make room"),
        (404, "there is no such repository that your token may see; check HF_REPO_ID and HF_MODEL_REPO_ID"),
        (429, "too many requests; try again later"),
        (errors.HfHubHTTPError, "the Hub refuses, or is in trouble; try again later"),
        (errors.HTTPError, "no connection; check the network, and HF_ENDPOINT if that is set"),
        (json.JSONDecodeError, "the answer is not the Hub's; check the network (a log-in page?) and HF_ENDPOINT"),
    )
    cause = error
    while cause is not None:  # the client wraps what happened, more than once
        status = getattr(getattr(cause, "response", None), "status_code", None)
        for kind, reason in reasons:
            if kind == status or (isinstance(kind, type) and isinstance(cause, kind)):
                detail = getattr(cause, "server_message", None) or cause
                return f"{reason} [{status or type(cause).__name__}: {utils.one_line(detail)}]"
        cause = cause.__cause__ or cause.__context__
    detail = utils.one_line(f"{type(error).__name__}: {error}")
    return f"{detail}; check the disk, and in the environment HF_ variables, SSL_CERT_FILE and proxies"


def commit(repo_id, repo_type, files, message):
    """Send files, {name in the repository: path or bytes}, in one commit to a repository, which is made if needed."""
    api = connect()
    from huggingface_hub import CommitOperationAdd

    api.create_repo(repo_id, repo_type=repo_type, private=config.HF_PRIVATE, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    for operation in operations:  # one by one: for several it starts threads, for which Python waits when it ends
        api.preupload_lfs_files(repo_id, [operation], repo_type=repo_type, free_memory=False)
    api.create_commit(repo_id, operations, repo_type=repo_type, commit_message=message)


# --- Data and models, for stages 2 to 4 --------------------------------------------------------------------------


def upload_processed(folder, repo_id):
    """Send the processed files at the end of stage 2, whose work is done: a failure is one line on stderr."""
    try:
        push_processed(folder, repo_id)
    except UserError as error:
        command = f"python -m services.hub push --processed_dir {shlex.quote(str(folder))}"
        print(f"warning: {error}. To send the files later: {command}", file=sys.stderr)


def push_processed(folder, repo_id):
    """Send the processed files and a card in one commit. UserError says what failed, why, and what to do."""
    with failures(f"the data set {repo_id} on the Hub is not updated"):
        files = {name: folder / name for name in PROCESSED_FILES}
        commit(repo_id, "dataset", files | {"README.md": cards.data_card(folder, repo_id).encode()}, "Processed files")
    print(f"on the Hub: the processed files in {repo_id}")


def fetch_processed(folder, repo_id):
    """Download the processed files of a data set repository into a folder without them: all six or none.

    UserError names the repository, the reason and the remedy. Of several processes one fetches, and the others wait
    for it. What one that was killed has fetched is not fetched again.
    """
    what, partial = f"can't fetch the data set {repo_id} from the Hub", folder / ".fetching"
    with failures(what, "; or run python preprocess_data.py"), utils.try_lock(folder / ".hub.lock", wait=True):
        if (folder / "features.json").is_file():  # by now: another process has fetched them
            return
        print(f"fetching the data set {repo_id} to {folder}", flush=True)
        api = connect()
        revision = api.dataset_info(repo_id, timeout=ANSWER_SECONDS).sha
        for name in reversed(PROCESSED_FILES):  # features.json first: settings that don't fit cost no download
            api.hf_hub_download(repo_id, name, repo_type="dataset", revision=revision, local_dir=partial)
            if name == "features.json":
                data_loader.check_audio_settings(data_loader.read_info(partial)["audio"])
        data_loader.install(partial, folder)


def fetch_model(repo_id, fold):
    """Return the path of a fold's model file in the Hub's cache, fetched if it is not there. UserError says why not."""
    with failures(f"can't fetch the model of fold {fold} from {repo_id} on the Hub", "; or try a different --fold_num"):
        return Path(connect().hf_hub_download(repo_id, MODEL_FILE.format(fold)))


def model_folds(repo_id):
    """Return the folds, 0-indexed, whose models a repository holds; offline, those in the cache. UserError if none."""
    with failures(f"can't list the models of {repo_id} on the Hub"):
        api = connect()
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            names = {file.rfilename for file in api.model_info(repo_id, timeout=ANSWER_SECONDS).siblings or []}
        except OfflineModeIsEnabled:
            names = os.listdir(api.snapshot_download(repo_id, local_files_only=True))
        if folds := [fold for fold in range(utils.MAX_FOLDS) if MODEL_FILE.format(fold) in names]:
            return folds
        raise UserError("it holds no model; send one: python -m services.hub push")


# --- What training makes -----------------------------------------------------------------------------------------


def keep_epoch(paths, name):
    """Copy an epoch's weights, such as fold_0/epoch_1.safetensors, to checkpoints/outbox, which nobody prunes."""
    with utils.atomic_write(paths.checkpoints / "outbox" / name) as file:
        file.write((paths.checkpoints / name).read_bytes())


def write_card(paths, results, names):
    """Write the model card. results: as in results.json; names: file names of tested clips."""
    with utils.atomic_write(paths.results / "README.md", "w") as file:
        file.write(cards.model_card(results, names, config.HF_MODEL_REPO_ID))


def send(paths):
    """Send outbox, models and report in one commit, and return the number of files. UserError if that fails."""
    outbox, repo_id = paths.checkpoints / "outbox", config.HF_MODEL_REPO_ID
    what = f"the model repository {repo_id} on the Hub is not updated"
    with failures(what), utils.try_lock(outbox / ".hub.lock", wait=True):
        epochs = sorted(outbox.glob("fold_*/epoch_*.safetensors"))
        files = {f"checkpoints/{path.parent.name}/{path.name}": path for path in epochs}
        files |= {path.name: path for path in paths.models.glob(MODEL_FILE.format("*"))}
        files |= {name: paths.results / name for name in RESULT_FILES if (paths.results / name).is_file()}
        if files:
            commit(repo_id, "model", files, f"Training: {len(epochs)} epochs, and models and report as they are now")
        for path in epochs:
            path.unlink()
        return len(files)


def forget(checkpoint_dir, folds):
    """Remove the epochs in the outbox of these folds: --fresh begins them again."""
    for fold in folds:
        shutil.rmtree(Path(checkpoint_dir) / "outbox" / f"fold_{fold}", ignore_errors=True)


class Publisher:
    """Sends what training makes, from a background thread. Does nothing without HF_MODEL_REPO_ID.

    UserError where HF_COMMIT_MINUTES can't be right; later it never raises.
    It commits every HF_COMMIT_MINUTES and at a fold's end: all that is new in the run's folders (paths.checkpoints,
    .models, .results), and so what other processes have made there, or have left when they were killed.
    """

    def __init__(self, paths):
        self.paths, self.is_sent = paths, True
        self.orders = queue.SimpleQueue()  # of commits: True for the last one
        self.thread = threading.Thread(target=self._work, daemon=True)
        if config.HF_MODEL_REPO_ID:
            low, high = COMMIT_MINUTES
            if not low <= config.HF_COMMIT_MINUTES <= high:  # also NaN
                raise UserError(f"HF_COMMIT_MINUTES = {config.HF_COMMIT_MINUTES} in config.py: take {low} to {high}")
            self.thread.start()

    def add_epoch(self, fold_number, epoch):
        """Add the weights of an epoch; they go with the next commit, even if they are pruned before."""
        self._try(keep_epoch, self.paths, f"fold_{fold_number}/epoch_{epoch}.safetensors")

    def add_model(self, fold_number):
        """Send a tested fold's model, and all else that is new."""
        self.orders.put(False)

    def add_results(self, results, names):
        """Add the report and the model card. results: as in results.json; names: file names of tested clips."""
        self._try(write_card, self.paths, results, names)

    def close(self, finished):
        """Send what is left, wait for that in bounded time, and say so if it is not sent."""
        self.orders.put(True)
        if self.thread.is_alive():
            self.thread.join(FINISH_SECONDS if finished else STOP_SECONDS)
        if self.thread.is_alive() or not self.is_sent:
            command = f"python -m services.hub push --assets_dir {shlex.quote(str(self.paths.checkpoints.parent))}"
            print(f"warning: not all of the training is on the Hub; to send the rest: {command}", file=sys.stderr)

    def _work(self):
        is_last = False
        while not is_last:
            with contextlib.suppress(queue.Empty):
                is_last = self.orders.get(timeout=60 * config.HF_COMMIT_MINUTES)
            self.is_sent = self._try(send, self.paths)

    def _try(self, function, *arguments):
        """Call a function and return whether that worked. A failure is a line if no commit has failed just before."""
        try:
            if config.HF_MODEL_REPO_ID:
                function(*arguments)
            return True
        except Exception as error:
            if self.is_sent:
                print(f"warning: {error}. Training continues", file=sys.stderr, flush=True)
            return False


def push_models(paths):
    """Send what a run's folders hold and the repository lacks. UserError if it fails, or there is nothing."""
    for fold, own in metrics.read_run(paths.results).get("files", {}).items():
        path = paths.models / MODEL_FILE.format(fold)
        if path.is_file() and utils.file_digest(path) != own.get("model"):
            raise UserError(f"{path} is not of the run in {paths.results}: remove it, or run python train.py again")
    for path in paths.checkpoints.glob("fold_*/epoch_*.safetensors"):
        keep_epoch(paths, f"{path.parent.name}/{path.name}")
    if any(paths.results.glob("predictions_fold_*.csv")):
        predictions = metrics.read_predictions(paths.results, paths.processed)
        write_card(paths, metrics.summarise(predictions, metrics.read_run(paths.results)), predictions.names)
    if not (count := send(paths)):
        raise UserError(f"nothing to send in {paths.checkpoints}, {paths.models} and {paths.results}: train first")
    print(f"on the Hub: {count} files in {config.HF_MODEL_REPO_ID}")


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("command", choices=["push"], help="send what the repositories lack")
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    args = parser.parse_args()
    paths = utils.run_folders(args)
    if not config.HF_REPO_ID and not config.HF_MODEL_REPO_ID:
        raise UserError('HF_REPO_ID and HF_MODEL_REPO_ID are empty; set one in config.py to "owner/name"')
    if config.HF_REPO_ID:
        push_processed(paths.processed, config.HF_REPO_ID)
    if config.HF_MODEL_REPO_ID:
        push_models(paths)


if __name__ == "__main__":
    utils.run(main)
