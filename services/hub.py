"""The Hugging Face Hub: the only file that knows it. Off until config.py or the environment names a repository.

    python -m services.hub push     # send what HF_REPO_ID and HF_MODEL_REPO_ID lack, after a failed upload or a crash

Stage 2 uploads the processed files to HF_REPO_ID, and stage 3 fetches them where they are missing. Stage 3 uploads
models to HF_MODEL_REPO_ID, and stage 4 fetches them. What a repository has already is not sent again. What training
makes waits in checkpoints/outbox as hard links, under its name in the repository, so that neither pruning nor a kill
takes it away.
"""

import contextlib
import csv
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import config
import data_loader
import utils
from data_loader import PROCESSED_FILES
from utils import UserError

ANSWER_SECONDS = 30  # s without an answer until a look-up or a download has failed
UPLOAD_SECONDS = 3600  # s that preprocessing waits for its upload
FINISH_SECONDS = 120  # s that a finished training waits for its last commit
STOP_SECONDS = 3  # s that an interrupted one waits
SPARE_DISK = 100e6  # bytes left free beside fetched files
MODEL_FILE = "model_fold_{}_best.safetensors"  # as model.py names it; importing that takes torch's seconds
RESULT_FILES = ("results.json", "report.md", "confusion_matrix.png")


# --- The client, and its failures in words -----------------------------------------------------------------------

STORAGE_FULL = "the storage is full; make room or extend it: https://huggingface.co/settings/billing"
REASONS = {  # HTTP status: reason and remedy
    401: "the token is refused; run `hf auth login` again, or correct HF_TOKEN",
    402: STORAGE_FULL,
    403: "the token has no right to it; take one that may write, or a repository of your own",
    404: "there is no such repository that your token may see; check HF_REPO_ID and HF_MODEL_REPO_ID in config.py",
    413: STORAGE_FULL,
    429: "too many requests; try again later",
    507: STORAGE_FULL,
}


def connect():
    """Return huggingface_hub's HfApi. UserError if the package is missing."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        os.environ.setdefault(name, str(ANSWER_SECONDS))
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it warns at each retry; the outcome is our one line
    utils.need("huggingface_hub", "the Hugging Face Hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        disable_progress_bars()
    return HfApi(library_name="audio_is_all_you_need")


@contextlib.contextmanager
def failures(what, otherwise=""):
    """Raise what goes wrong in the block as a UserError of one line: `what`, the reason, the remedy, `otherwise`.

    Its is_lasting says whether the failure stays until a person does something.
    """
    try:
        yield
    except UserError as error:  # it has its remedy
        raise UserError(f"{what}: {error}") from error
    except Exception as error:  # of the client library, its HTTP and Xet libraries, or the disk
        reason, is_lasting = explain(error)
        failure = UserError(f"{what}: {reason}{otherwise}")
        failure.is_lasting = is_lasting
        raise failure from error


def explain(error):
    """Return (reason and remedy, is_lasting) of what the Hub, its client, the network or the disk raised."""
    from huggingface_hub import errors, get_token

    cause = error
    while cause is not None:  # the client wraps what happened, more than once
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it (and TRANSFORMERS_OFFLINE) to use the Hub", True
        if isinstance(cause, errors.HFValidationError):
            return 'the repository has no valid name; set it in config.py as "owner/name"', True
        if isinstance(cause, (json.JSONDecodeError, errors.FileMetadataError)):
            return "the answer is not the Hub's; check the network (a proxy or log-in page?) and HF_ENDPOINT", False
        if isinstance(cause, errors.HfHubHTTPError):
            status, message = cause.response.status_code, utils.one_line(cause.server_message or "")
            reason = REASONS.get(status, "the Hub is in trouble; try again later" if status >= 500 else "refused")
            if status == 401 and not get_token():
                reason = "there is no token; run `hf auth login`, or set HF_TOKEN (and check the repository's name)"
            if status == 403 and "storage" in message.lower():
                reason = STORAGE_FULL
            return f"{reason} [{status}{': ' if message else ''}{message}]", status in REASONS and status != 429
        if type(cause).__module__.startswith("http"):  # the client's HTTP library
            text = utils.one_line(f"{type(cause).__name__}: {cause}")
            return f"no connection ({text}); check the network, and HF_ENDPOINT if that is set", False
        cause = cause.__cause__ or cause.__context__
    return utils.one_line(f"{type(error).__name__}: {error}"), False


def commit(repo_id, repo_type, files, message):
    """Send files, {name in the repository: path or bytes}, in one commit, and return the repository's address.

    The repository is made if needed.
    """
    api = connect()
    from huggingface_hub import CommitOperationAdd

    url = api.create_repo(repo_id, repo_type=repo_type, private=config.HF_PRIVATE, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    for operation in operations:  # one by one: for several it starts threads, for which Python waits when it ends
        api.preupload_lfs_files(repo_id, [operation], repo_type=repo_type, free_memory=False)
    api.create_commit(repo_id, operations, repo_type=repo_type, commit_message=message)
    return url


# --- The processed files -----------------------------------------------------------------------------------------


def upload_processed(folder, repo_id):
    """Send the processed files to a data set repository within UPLOAD_SECONDS, and return whether that worked.

    Never raises: a failure is one line on stderr.
    """
    outcome = [f"the data set {repo_id} on the Hub is not updated after {UPLOAD_SECONDS} s; check the network"]

    def push():
        try:
            outcome[0] = push_processed(folder, repo_id)
        except Exception as error:
            outcome[0] = str(error)

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    thread.join(UPLOAD_SECONDS)
    if outcome[0]:
        command = f"python -m services.hub push --processed_dir {shlex.quote(str(folder))}"
        print(f"warning: {outcome[0]}. To send the files later: {command}", file=sys.stderr)
    return not outcome[0]


def push_processed(folder, repo_id):
    """Send the processed files and a card in one commit. UserError says what failed, why, and what to do."""
    from services import cards  # here, for the libraries that a report's tables need

    folder = Path(folder)
    with failures(f"the data set {repo_id} on the Hub is not updated"):
        if missing := [name for name in PROCESSED_FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} lacks {', '.join(missing)}; run python preprocess_data.py")
        files = {name: folder / name for name in PROCESSED_FILES}
        total = sum(path.stat().st_size for path in files.values())
        print(f"sending {total / 1e6:,.1f} MB to the data set {repo_id} on the Hub", flush=True)
        files["README.md"] = cards.data_card(folder, repo_id).encode()
        url = commit(repo_id, "dataset", files, "Processed files")
    print(f"on the Hub: {utils.one_line(url)}")


def fetch_processed(folder, repo_id):
    """Download the processed files of a data set repository into a folder without them: all six or none.

    UserError names the repository, the reason and the remedy. The pickles are not opened here. Of several processes
    one fetches, and the others wait for it.
    """
    folder = Path(folder)
    with failures(f"can't fetch the data set {repo_id} from the Hub", "; or run python preprocess_data.py"):
        api = connect()
        with utils.try_lock(folder / ".hub.lock", wait=True):
            if (folder / "features.json").is_file():  # by now: another process has fetched them
                return
            for leftover in folder.glob("fetching_*"):  # of a fetch that was killed
                shutil.rmtree(leftover)
            info = api.dataset_info(repo_id, files_metadata=True, timeout=ANSWER_SECONDS)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}  # bytes
            if missing := [name for name in PROCESSED_FILES if name not in sizes]:
                raise UserError(f"it lacks {', '.join(missing)}; send it again: python -m services.hub push")
            total = sum(sizes[name] for name in PROCESSED_FILES)
            print(f"fetching {total / 1e6:,.1f} MB of the data set {repo_id} to {folder}", flush=True)
            utils.need_space(folder, total + SPARE_DISK, " and that is too little; make room")
            with tempfile.TemporaryDirectory(prefix="fetching_", dir=folder) as temporary:
                for name in reversed(PROCESSED_FILES):  # features.json first: settings that don't fit cost no download
                    path = api.hf_hub_download(
                        repo_id, name, repo_type="dataset", revision=info.sha, local_dir=temporary
                    )
                    if name == "features.json":
                        data_loader.check_audio_settings(data_loader.read_info(Path(temporary))["audio"])
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())  # on the disk before it has its name
                for name in PROCESSED_FILES:  # features.json last: it marks a complete set
                    os.replace(Path(temporary) / name, folder / name)
            utils.sync_folder(folder)


# --- Models for prediction ---------------------------------------------------------------------------------------


def fetch_model(repo_id, fold):
    """Return the path of a fold's model file in the Hub's cache, downloaded if it is not there.

    UserError names the repository, the reason and the remedy, or the folds that it has.
    """
    with failures(f"can't fetch the model of fold {fold} from {repo_id} on the Hub"):
        api = connect()
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return Path(api.hf_hub_download(repo_id, MODEL_FILE.format(fold)))
        except RemoteEntryNotFoundError:
            raise UserError(f"it has the folds {model_folds(repo_id)}; choose one with --fold_num") from None


def model_folds(repo_id):
    """Return the folds, 0-indexed, whose models a repository holds; offline, those in the cache. UserError if none."""
    with failures(f"can't list the models of {repo_id} on the Hub"):
        api = connect()
        from huggingface_hub import errors, try_to_load_from_cache

        try:
            files = {file.rfilename for file in api.model_info(repo_id, timeout=ANSWER_SECONDS).siblings or []}
        except errors.OfflineModeIsEnabled:
            names = map(MODEL_FILE.format, range(10))
            files = {name for name in names if isinstance(try_to_load_from_cache(repo_id, name), str)}
            if not files:
                raise
        if folds := [fold for fold in range(10) if MODEL_FILE.format(fold) in files]:
            return folds
        raise UserError("it holds no model; send one: python -m services.hub push")


# --- What training makes -----------------------------------------------------------------------------------------


def put(outbox, name, path):
    """Let a file wait under its name in the repository, as it is now."""
    target = outbox / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a disk without links
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)


def put_results(paths, results, names, repo_id):
    """Let the report wait, with the model card made from it. results: as in results.json; names: of tested clips."""
    from services import cards

    with utils.atomic_write(paths.results / "model_card.md", "w") as file:
        file.write(cards.model_card(results, names, repo_id))
    put(paths.checkpoints / "outbox", "README.md", paths.results / "model_card.md")
    for name in RESULT_FILES:
        put(paths.checkpoints / "outbox", name, paths.results / name)


def waiting(outbox):
    """Return {name in the repository: path} of what is not sent yet."""
    paths = sorted(path for path in outbox.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(outbox).as_posix(): path for path in paths}


def send(outbox, repo_id):
    """Send all that waits, and return how many files that were. UserError if it fails; then they wait on."""
    what = f"the model repository {repo_id} on the Hub is not updated"
    with failures(what), utils.try_lock(outbox / ".hub.lock", wait=True):
        files = waiting(outbox)
        before = {name: os.stat(path) for name, path in files.items()}
        if files:
            commit(repo_id, "model", files, f"{', '.join(list(files)[:3])}{', ...' * (len(files) > 3)}")
        for name, path in files.items():
            if os.path.samestat(before[name], os.stat(path)):  # else a newer version has come in the meantime
                path.unlink()
        return len(files)


def forget(checkpoint_dir, folds):
    """Remove what waits for these folds, and the report, which speaks for them: --fresh begins them again."""
    outbox = Path(checkpoint_dir) / "outbox"
    for name in ("README.md", *RESULT_FILES, *map(MODEL_FILE.format, folds)):
        (outbox / name).unlink(missing_ok=True)
    for fold in folds:
        shutil.rmtree(outbox / "checkpoints" / f"fold_{fold}", ignore_errors=True)


class Publisher:
    """Sends what training makes, from a background thread. Does nothing without HF_MODEL_REPO_ID, and never raises.

    It commits every HF_COMMIT_MINUTES and at a fold's end. Several processes may add to one outbox: each in turn sends
    all that waits there, and so what a process that was killed has left.
    paths: the run's folders (.checkpoints, .models, .results).
    """

    def __init__(self, paths):
        self.paths, self.repo_id = paths, config.HF_MODEL_REPO_ID
        self.outbox = Path(paths.checkpoints) / "outbox"
        self.wake, self.is_closing, self.has_failed, self.has_warned = threading.Event(), False, False, False
        self.thread = threading.Thread(target=self._work, daemon=True)
        if self.repo_id:
            self.thread.start()

    def add_epoch(self, fold_number, epoch):
        """Add the weights of an epoch; they go with the next commit, even if they are pruned before."""
        name = f"fold_{fold_number}/epoch_{epoch}.safetensors"
        self._add(put, self.outbox, f"checkpoints/{name}", self.paths.checkpoints / name)

    def add_model(self, fold_number):
        """Add a tested fold's model, and send what waits."""
        name = MODEL_FILE.format(fold_number)
        self._add(put, self.outbox, name, self.paths.models / name)
        self.wake.set()

    def add_results(self, results, names):
        """Add the report and the model card. results: as in results.json; names: file names of tested clips."""
        self._add(put_results, self.paths, results, names, self.repo_id)

    def close(self, finished):
        """Send what is left, wait for that in bounded time, and say what could not be sent."""
        if not self.repo_id:
            return
        self.is_closing = True
        self.wake.set()
        self.thread.join(FINISH_SECONDS if finished else STOP_SECONDS)
        is_done = not self.has_failed and not self.thread.is_alive()
        count = 0 if is_done else len(waiting(self.outbox))  # if done, what waits is another process's, which sends it
        if count:
            command = f"python -m services.hub push --assets_dir {shlex.quote(str(self.paths.checkpoints.parent))}"
            print(f"warning: {count} files are not on the Hub yet; to send them: {command}", file=sys.stderr)

    def _add(self, function, *arguments):
        if self.repo_id:
            try:
                function(*arguments)
            except Exception as error:
                self._warn(error)

    def _work(self):
        """Send what waits at intervals and when woken, until the run ends or the Hub refuses for good."""
        is_ending = False
        while not is_ending:
            self.wake.wait(60 * config.HF_COMMIT_MINUTES)
            self.wake.clear()
            is_ending = self.is_closing  # read before sending: what is added later wakes the next wait
            try:
                send(self.outbox, self.repo_id)
                self.has_failed = False
            except Exception as error:
                self.has_failed = True
                self._warn(error)
                is_ending |= getattr(error, "is_lasting", False)

    def _warn(self, error):
        """Print the first failure; later ones are silent, and close() says how many files are left."""
        if not self.has_warned:
            self.has_warned = True
            print(f"warning: {error}. Training continues", file=sys.stderr, flush=True)


# --- By hand -----------------------------------------------------------------------------------------------------


def push_models(paths, repo_id):
    """Send what a run's folders hold and the repository lacks. UserError if it fails, or there is nothing."""
    outbox = paths.checkpoints / "outbox"
    for path in paths.checkpoints.glob("fold_[0-9]/epoch_*.safetensors"):
        put(outbox, f"checkpoints/{path.parent.name}/{path.name}", path)
    for path in paths.models.glob(MODEL_FILE.format("[0-9]")):
        put(outbox, path.name, path)
    names = []
    for path in paths.results.glob("predictions_fold_[0-9].csv"):
        with open(path, encoding="utf-8", newline="") as file:
            names += [row["slice_file_name"] for row in csv.DictReader(file)]
    if names and (paths.results / "results.json").is_file():
        put_results(paths, utils.load_json(paths.results / "results.json"), names, repo_id)
    count = send(outbox, repo_id)
    if not count:
        raise UserError(f"nothing to send in {paths.checkpoints}, {paths.models} and {paths.results}: train first")
    print(f"on the Hub: {count} files in {repo_id}")


def main():
    parser = utils.make_parser(__doc__)
    parser.add_argument("command", choices=["push"], help="send what the repositories lack")
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    args = parser.parse_args()
    paths = utils.run_folders(args)
    if not config.HF_REPO_ID and not config.HF_MODEL_REPO_ID:
        raise UserError(
            'HF_REPO_ID and HF_MODEL_REPO_ID are empty; set one, in config.py or the environment, to "owner/name"'
        )
    if config.HF_REPO_ID:
        push_processed(paths.processed, config.HF_REPO_ID)
    if config.HF_MODEL_REPO_ID:
        push_models(paths, config.HF_MODEL_REPO_ID)


if __name__ == "__main__":
    utils.run(main)
