"""The Hugging Face Hub: the only file that knows it. Off until config.py or the environment names a repository.

    python -m services.hub push        # send what HF_REPO_ID and HF_MODEL_REPO_ID lack, after a failed upload or a crash

Stage 2 uploads the processed files to HF_REPO_ID by itself, and stage 3 fetches them where they are missing; stage 3
uploads models to HF_MODEL_REPO_ID (publisher.py), and stage 4 fetches them. Prints one line: the address, or what
failed, why, and the remedy. What a repository holds already is not sent again.
"""

import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import config
import data_loader
import utils
from data_loader import PROCESSED_FILES
from services import cards
from utils import UserError

ANSWER_SECONDS = 30  # s without a byte from the network until a request has failed; HF_HUB_DOWNLOAD_TIMEOUT overrides
LONGEST_WAIT = 60  # s; where the Hub asks for a longer pause (its limits are per hour), the run goes on without it
# A stalled Xet transfer ends after 9 minutes (by its own defaults 30). One try may have 64 MB to send on a slow line.
XET_LIMITS = {"HF_XET_CLIENT_READ_TIMEOUT": "180s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
SPARE_DISK = 100e6  # bytes left free beside fetched files


# --- The client, bounded in time ---------------------------------------------------------------------------------


def connect():
    """Return huggingface_hub's HfApi, whose requests end in bounded time. UserError if the package is missing."""
    utils.need("huggingface_hub", "the Hugging Face Hub")
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging

    set_client_factory(_client)
    for name, limit in XET_LIMITS.items():
        os.environ.setdefault(name, limit)
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # else it warns at each retry; the outcome is our one line
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
    return HfApi(library_name="audio_is_all_you_need")


def _client():
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()  # without any time limit, and some of its requests ask for none
    client.event_hooks["request"].append(_limit_time)
    client.event_hooks["response"].append(_refuse_long_wait)
    return client


def _answer_seconds():
    return int(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or ANSWER_SECONDS)


def _limit_time(request):
    limits = request.extensions["timeout"]  # connect, read, write, pool: s each, None for no limit
    longest = _answer_seconds()
    request.extensions["timeout"] = {name: min(limit or longest, longest) for name, limit in limits.items()}


def _refuse_long_wait(response):
    """Fail now where the client library would sleep as long as the Hub asks, hours if need be."""
    if response.status_code >= 400 and _seconds_to_wait(response) > LONGEST_WAIT:
        from huggingface_hub.utils import hf_raise_for_status

        response.read()
        hf_raise_for_status(response)


def _seconds_to_wait(response):
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(response.headers)
    if limit and limit.remaining == 0:
        return limit.reset_in_seconds
    pause = response.headers.get("Retry-After", "")
    return int(pause) if pause.isdigit() else 0


# --- Failures in words -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def failures(what, otherwise=""):
    """Raise what goes wrong in the block as a UserError of one line: `what`, the reason, the remedy, `otherwise`."""
    try:
        yield
    except UserError as error:  # has its remedy
        raise UserError(f"{what}: {error}") from error
    except Exception as error:  # of the client library, its HTTP and Xet libraries, or the disk
        failure = UserError(f"{what}: {explain(error)}{otherwise}")
        failure.is_lasting = is_lasting(error)
        raise failure from error


def is_lasting(error):
    """Return whether a failure stays until a person does something: an answer by which the Hub refuses, or none."""
    from huggingface_hub import errors

    for cause in _causes(error):
        if isinstance(cause, (errors.OfflineModeIsEnabled, errors.HFValidationError)):
            return True
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            return status == 507 or (400 <= status < 500 and status not in (408, 409, 412, 429))
    return False


def _causes(error):
    """Return an error and what it came from, the nearest first."""
    causes = [error]
    while error := error.__cause__ or error.__context__:
        causes.append(error)
    return causes


def explain(error):
    """Return reason and remedy, in one line, of whatever the Hub, its client or the network raised."""
    import httpx2
    from huggingface_hub import errors

    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it (and TRANSFORMERS_OFFLINE) to use the Hub"
        if isinstance(cause, errors.HfHubHTTPError):
            said = _one_line(cause.server_message or "")
            return _explain_status(cause.response.status_code, said, _seconds_to_wait(cause.response))
        if isinstance(cause, httpx2.TimeoutException):
            return f"no answer for {_answer_seconds()} s; check the network, or try again later"
        if isinstance(cause, httpx2.TransportError):
            return f"no connection ({_one_line(cause)}); check the network, and HF_ENDPOINT if that is set"
        if isinstance(cause, errors.HFValidationError):
            return 'no valid repository name; set HF_REPO_ID in config.py to "owner/name"'
        if isinstance(cause, json.JSONDecodeError):
            return "the answer is not the Hub's; check the network (a proxy or log-in page?) and HF_ENDPOINT"
        if isinstance(cause, ConnectionError):  # hf_xet's, for whatever goes wrong in its transfer
            return _explain_xet(str(cause))
    if isinstance(causes[0], OSError) and causes[0].strerror:
        return f"{causes[0].strerror}: {causes[0].filename or 'on the disk'}"
    return f"{type(causes[0]).__name__}: {_one_line(causes[0])}"


def _explain_status(status, said, seconds=0):
    from huggingface_hub import get_token

    if status in (402, 413, 507) or (status == 403 and re.search("storage|quota", said, re.IGNORECASE)):
        reason = "the storage is full; make room or extend it: https://huggingface.co/settings/billing"
    elif status == 401 and not get_token():
        reason = "there is no token; run `hf auth login`, or set HF_TOKEN (and check HF_REPO_ID)"
    elif status == 401:
        reason = "the token is not accepted; run `hf auth login` again, or correct HF_TOKEN"
    elif status == 403:
        reason = "the token has no right to it; take one that may write, or a repository of your own as HF_REPO_ID"
    elif status == 404:
        reason = (
            "there is no such repository that your token may see; check HF_REPO_ID and HF_MODEL_REPO_ID in config.py"
        )
    elif status == 429:
        reason = f"too many requests; try again {f'in {seconds} s' if seconds else 'later'}"
    elif status >= 500:
        reason = "the Hub is in trouble; try again later"
    else:
        reason = "the Hub refuses the request"
    return f"{reason} [{status}{': ' if said else ''}{said}]"


def _explain_xet(text):
    status = re.search(r"HTTP status \w+ error \((\d{3})", text)
    if status and status[1] == "404":
        return "the server has no Xet storage; set HF_HUB_DISABLE_XET=1 [404]"
    if status:
        return _explain_status(int(status[1]), "from the Xet storage" + ", which may be full" * (status[1] == "403"))
    return f"the transfer failed ({_one_line(text)}); check the network, or try again later"


def _one_line(text):
    return " ".join(str(text).split())[:200]


# --- The processed files -----------------------------------------------------------------------------------------


def upload_processed(folder, repo_id, private=config.HF_PRIVATE):
    """Send the processed files and a card to a data set repository, and return whether that worked.

    Never raises for a failure of the Hub or the network: prints one line and leaves the run to go on.
    """
    try:
        push_processed(folder, repo_id, private)
        return True
    except UserError as error:
        print(
            f"warning: {error}. The run goes on; to send the files later: "
            f"python -m services.hub push --processed_dir {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        return False


def push_processed(folder, repo_id, private=config.HF_PRIVATE):
    """Send the processed files and a card in one commit, to a repository that is made if needed. UserError if it fails.

    Files that the repository has already are not sent again, and if it has all of them there is no commit.
    """
    folder = Path(folder)
    with failures(f"the data set {repo_id} on the Hub is not updated"):
        if missing := [name for name in PROCESSED_FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} lacks {', '.join(missing)}; run python preprocess_data.py")
        card = cards.dataset_card(folder, repo_id)
        api = connect()
        from huggingface_hub import CommitOperationAdd

        total = sum((folder / name).stat().st_size for name in PROCESSED_FILES)
        print(f"sending {_amount(total)}, to the data set {repo_id} on the Hub", flush=True)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        files = [CommitOperationAdd(name, folder / name) for name in PROCESSED_FILES]
        files.append(CommitOperationAdd("README.md", card.encode()))
        commit = api.create_commit(repo_id, files, repo_type="dataset", commit_message="Processed files")
    print(f"on the Hub: {api.endpoint}/datasets/{repo_id} (commit {commit.oid[:8]})")


def fetch_processed(folder, repo_id):
    """Download the processed files of a data set repository into `folder`: all six or none, and nothing else.

    UserError names the repository, the reason and the remedy. The pickles are not opened here.
    """
    folder = Path(folder)
    with failures(f"can't fetch the data set {repo_id} from the Hub", "; or run python preprocess_data.py"):
        api = connect()
        info = api.dataset_info(repo_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}  # bytes
        if missing := [name for name in PROCESSED_FILES if name not in sizes]:
            raise UserError(
                f"it lacks {', '.join(missing)}; send it again (python -m services.hub push), or preprocess here"
            )
        total = sum(sizes[name] for name in PROCESSED_FILES)
        print(f"fetching {_amount(total)} of the data set {repo_id} (commit {info.sha[:8]}) -> {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        utils.need_space(folder, total + SPARE_DISK, " and that is too little; make room")
        with tempfile.TemporaryDirectory(prefix="fetching_", dir=folder) as temporary:
            temporary = Path(temporary)
            for name in reversed(PROCESSED_FILES):  # features.json first: settings that don't fit cost no download
                api.hf_hub_download(repo_id, name, repo_type="dataset", revision=info.sha, local_dir=temporary)
                if name == "features.json":
                    _check_settings(temporary / name)
                with open(temporary / name, "rb+") as file:
                    os.fsync(file.fileno())  # on the disk before it has its name
            (folder / "features.json").unlink(missing_ok=True)
            for name in PROCESSED_FILES:  # features.json last: it marks a complete set
                os.replace(temporary / name, folder / name)
        utils.sync_folder(folder)


def _check_settings(path):
    info = utils.load_json(path)
    audio = info.get("audio") if isinstance(info, dict) else None
    if not isinstance(audio, dict):
        raise UserError("its features.json has no audio settings")
    data_loader.check_audio_settings(audio)


def _amount(total):
    return f"{len(PROCESSED_FILES)} files, {total / 1e6:,.1f} MB"


# --- Models ------------------------------------------------------------------------------------------------------


def commit_files(repo_id, files, message, private=config.HF_PRIVATE):
    """Send files to a model repository, which is made if needed, in one commit. UserError if it fails.

    files: {name in the repository: path}. What the repository has already is not sent again, and if that is all, there
    is no commit.
    """
    with failures(f"the model repository {repo_id} on the Hub is not updated"):
        api = connect()
        from huggingface_hub import CommitOperationAdd

        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        for operation in operations:  # one by one: for several it starts threads, which Python's end waits for
            api.preupload_lfs_files(repo_id, [operation], repo_type="model", free_memory=False)
        api.create_commit(repo_id, operations, repo_type="model", commit_message=message)


def fetch_model(repo_id, fold):
    """Return the path of a fold's model file in the Hub's cache, downloaded if it is not there.

    UserError names the repository, the reason and the remedy, or the folds that it has.
    """
    from model import model_path  # imports torch, which preprocessing does without

    name = model_path("", fold).name
    with failures(f"can't fetch {name} from {repo_id} on the Hub"):
        api = connect()
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return Path(api.hf_hub_download(repo_id, name))
        except RemoteEntryNotFoundError:
            there = folds_at(api, repo_id)
        raise UserError(f"it has the folds {there}; choose one with --fold_num")


def model_folds(repo_id):
    """Return the folds, 0-indexed, whose models a repository holds. UserError if there is none."""
    with failures(f"can't list the models of {repo_id} on the Hub"):
        return folds_at(connect(), repo_id)


def folds_at(api, repo_id):
    """Return the folds, 0-indexed, whose models a repository holds. UserError if there is none."""
    from model import model_path

    files = api.list_repo_files(repo_id)
    there = [number for number in range(10) if model_path("", number).name in files]
    if not there:
        raise UserError("it holds no model")
    return there


# --- By hand -----------------------------------------------------------------------------------------------------


def parse_args():
    parser = utils.make_parser(__doc__)
    parser.add_argument("command", choices=["push"], help="send what the repositories lack")
    parser.add_argument("--processed_dir", metavar="DIR", help="processed files (default: data/ in the assets)")
    parser.add_argument("--checkpoint_dir", metavar="DIR", help="default: checkpoints/ in the assets")
    parser.add_argument("--model_dir", metavar="DIR", help="default: models/ in the assets")
    parser.add_argument("--results_dir", metavar="DIR", help="default: results/ in the assets")
    return parser.parse_args()


def main():
    args = parse_args()
    paths = utils.run_folders(args)
    if not config.HF_REPO_ID and not config.HF_MODEL_REPO_ID:
        raise UserError(
            'HF_REPO_ID and HF_MODEL_REPO_ID are empty; set one, in config.py or the environment, to "owner/name"'
        )
    if config.HF_REPO_ID:
        push_processed(paths.processed, config.HF_REPO_ID)
    if config.HF_MODEL_REPO_ID:
        from services import publisher

        publisher.push(paths, config.HF_MODEL_REPO_ID)


if __name__ == "__main__":
    utils.run(main)
