"""Stage 1: fetch UrbanSound8K (8,732 clips), or make a miniature of it.

    python download_data.py                          # 6 GB from Zenodo -> <assets>/data/UrbanSound8K
    python download_data.py --data_dir /big/disk/US8K
    python download_data.py --demo                   # 300 synthetic clips instead, in seconds, no network
    python download_data.py --dataset esc50          # ESC-50 instead: 2,000 clips of 50 classes, 0.6 GB from GitHub

Needs 14 GB of disk while it runs and 7 GB after. Stop it at any time: the same command resumes, and returns at once
when the data set is complete. soundata validates every file. An archive that a browser fetched is used if it lies in
the data set's folder as UrbanSound8K.tar.gz. The archive is removed at the end. GitHub makes ESC-50's archive again,
with another md5: there, the checksums in the archive and soundata's md5 of each clip are what is checked.

UrbanSound8K is free for non-commercial use (CC BY-NC): J. Salamon, C. Jacoby and J. P. Bello, "A Dataset and Taxonomy
for Urban Sound Research", 22nd ACM International Conference on Multimedia, Orlando, 2014. ESC-50 is CC BY-NC 3.0: K. J.
Piczak, "ESC: Dataset for Environmental Sound Classification", 23rd ACM International Conference on Multimedia, 2015.
"""

import hashlib
import importlib
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import requests
import urllib3
from tqdm import tqdm

import config
import data_loader
import demo_data
import utils
from utils import UserError

TOP_FOLDER = "UrbanSound8K"  # of the archive; its contents become the data set's folder
METADATA = "metadata/UrbanSound8K.csv"
ESC50_TABLE = "meta/esc50.csv"
ESC50_DIR = "data/ESC-50"  # in the assets
DISK_BYTES = {"urbansound8k": 14e9, "esc50": 2e9}  # archive and unpacked files, rounded up
MAX_BYTES = 10e9  # neither the archive nor its unpacked files are as large: more is something else

TIMEOUT = 60  # s without a byte before a connection counts as lost
RETRY_SECONDS = 2.0  # s; first wait, doubled with each failure in a row
MAX_FAILURES = 7  # in a row without a new byte; the waits sum to two minutes
MAX_RETRY_AFTER = 900  # s; a server that asks for a longer wait ends the run
CHUNK = 1 << 16  # bytes; at most this much is lost with a connection
# Of damaged data, and of names that are both a file and a folder
BAD_ARCHIVE = (EOFError, zlib.error, ValueError, FileExistsError, NotADirectoryError, IsADirectoryError)


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
    add("--dataset", choices=[*DATASETS], default="urbansound8k", help="default: urbansound8k")
    add("--demo", action="store_true", help="make the miniature instead, without a download")
    add("--force", action="store_true", help="write every file again, even if the data set looks complete")
    add("--url", help="another source of the same archive, such as a mirror (default: soundata's)")
    return parser.parse_args()


def size_of(path):
    """Return a file's size in bytes, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def progress_bar(total, name, initial=0):
    """Return a tqdm bar that counts bytes, shown on terminals."""
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, leave=False, disable=None)


# --- Download ----------------------------------------------------------------------------------------------------


def fetch(url, part):
    """Append to `part` what it lacks of the file at a URL.

    Lost connections and busy servers are tried again after doubling waits, until MAX_FAILURES in a row brought no new
    byte. UserError for what waiting can't fix. Whether the bytes are right is for the caller to check.
    """
    failures, most = 0, size_of(part)
    while True:
        try:
            reason, wait = fetch_rest(url, part)
        except ValueError as error:  # this URL, or one that the server leads to, is none
            raise UserError(f"can't fetch {url!r} ({root_cause(error)}): name another source with --url") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason, wait = f"no connection ({root_cause(error)})", 0
        if not reason:
            return
        size = size_of(part)
        failures = 1 if size > most else failures + 1
        most = max(size, most)
        wait = max(wait, RETRY_SECONDS * 2 ** (failures - 1))
        if failures == MAX_FAILURES or wait > MAX_RETRY_AFTER:
            raise UserError(
                f"{url}: {reason}, {failures} times in a row. Check the network, or name another source with --url. "
                f"The same command, in {wait:g} s or later, resumes at {size / 1e6:.1f} MB"
            )
        tqdm.write(f"{reason}; {size / 1e6:.1f} MB are here, next try in {wait:g} s")
        time.sleep(wait)


def fetch_rest(url, part):
    """Make one request and append its body to `part`.

    Returns (why it failed, "" if it did not; the seconds that the server asks to wait). Lost connections are errors of
    requests or urllib3.
    """
    size = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT, hooks={"response": skip_body}) as response:
        status = response.status_code
        if status == 416 and size:  # Range Not Satisfiable: all bytes are here, or different ones; the md5 decides
            return "", 0
        if status in (408, 425, 429) or status >= 500:
            wait = response.headers.get("Retry-After", "")
            return f"the server answers {status}", int(wait) if re.fullmatch("[0-9]{1,9}", wait) else 0
        if status not in (200, 206):
            raise UserError(f"{url}: the server answers {status}: name another source with --url")
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            part.unlink(missing_ok=True)
            return "the server sends bytes that were not asked for", 0
        if status == 200 and size:
            tqdm.write("the server can't resume: starting again")
            size = 0
        total = size + (response.raw.length_remaining or 0)
        mode = "ab" if size else "wb"
        with utils.naming(part), open(part, mode) as file, progress_bar(total, part.stem, size) as bar:
            for chunk in response.raw.stream(CHUNK, decode_content=False):  # a .gz stays a .gz
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    raise UserError(f"{url} sends more bytes than the data set has: check --url, and delete {part}")
    return "", 0


def skip_body(response, **_):
    """Close a redirect before it is followed: requests would read its body, of any length, into memory."""
    if response.is_redirect:
        response.close()


def root_cause(error):
    """Return what led to an exception of requests, as one printable line: servers have a say in some messages."""
    while error.__context__:
        error = error.__context__
    return utils.one_line(getattr(error, "strerror", None) or error)


def get_file(url, path, md5):
    """Bring a file with this md5 (None: any) to `path`. A broken one is named and fetched again, once."""
    for _ in range(2):
        if not path.exists():
            print(f"fetching {url}")
            part = path.with_name(path.name + ".part")
            fetch(url, part)
            os.replace(part, path)
        if md5 is None:
            return
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found == md5:
            return
        path.unlink()
        print(f"{path} is broken (md5 {found} instead of {md5})")
    raise UserError(f"{url} is broken (md5 {found} instead of {md5}): name another source with --url")


# --- Data set ----------------------------------------------------------------------------------------------------


def unpack(archive, folder):
    """Unpack the plain files of the archive's TOP_FOLDER into `folder`, over what is there, the table last.

    UserError for a damaged archive, names that leave the folder, and more bytes than the data set has.
    """
    n_bytes, table = 0, folder / f"{METADATA}.new"
    try:
        with (
            utils.naming(folder),  # a full disk
            open(archive, "rb") as raw,
            progress_bar(archive.stat().st_size, "unpacking") as bar,
            tarfile.open(fileobj=raw, mode="r|gz") as tar,
        ):
            for member in tar:
                bar.update(raw.tell() - bar.n)
                n_bytes += member.size
                if n_bytes > MAX_BYTES:
                    raise UserError(f"{archive} is refused: it unpacks to more than {MAX_BYTES:.3g} bytes")
                top, _, name = member.name.partition("/")
                if top == TOP_FOLDER and member.isfile():  # no links and devices; a folder comes with its files
                    name += ".new" * (name == METADATA)  # with it in its place, the data set would look complete
                    tar.extract(member.replace(name=name, deep=False), folder, filter="data")
        if table.is_file():
            os.replace(table, folder / METADATA)
    except (tarfile.TarError, *BAD_ARCHIVE, OverflowError) as error:
        reason = utils.one_line(error)
        raise UserError(f"{archive} can't be unpacked ({reason}). If you delete it, it is fetched again") from error
    finally:
        table.unlink(missing_ok=True)


def unpack_zip(archive, folder):
    """Unpack the files of the archive's one top folder into `folder`, over what is there, the table last.

    UserError for a damaged archive, names that leave the folder, and more bytes than the data set has.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise UserError(f"{archive} is refused: it unpacks to more than {MAX_BYTES:.3g} bytes")
            members.sort(key=lambda member: member.filename.endswith(ESC50_TABLE))
            for member in tqdm(members, "unpacking", unit="file", leave=False, disable=None):
                name = "/".join(PurePosixPath(member.filename).parts[1:])
                if not data_loader.is_file_name(name):
                    raise UserError(f"{archive} is refused: it names the file {member.filename!r}. Delete it")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # as GitHub has it
                    raise UserError(f"{archive} is refused: {member.filename!r} is not stored or deflated. Delete it")
                with file.open(member) as source, utils.atomic_write(folder / name) as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, *BAD_ARCHIVE, RuntimeError) as error:  # the last: encrypted
        reason = utils.one_line(error)
        raise UserError(f"{archive} can't be unpacked ({reason}). If you delete it, it is fetched again") from error


def soundata_remotes(dataset="urbansound8k"):
    """Return soundata's (archive, index) entries for a data set: objects with filename, url and checksum (md5)."""
    utils.need("soundata", "the download")
    module = importlib.import_module(f"soundata.datasets.{dataset}")
    return module.REMOTES["all"], module.INDEXES[module.INDEXES["default"]].remote


def missing_clips(dataset_dir, dataset="urbansound8k"):
    """Return (names of clips that the table lists and that are missing or empty, number of clips listed)."""
    if dataset == "esc50":
        paths = data_loader.read_esc50(dataset_dir)["path"]
        return [str(path.relative_to(dataset_dir)) for path in paths if not size_of(path)], len(paths)
    clips = data_loader.read_clip_table(dataset_dir / METADATA)  # which refuses names and folds that leave the folder
    names = [f"audio/fold{fold}/{name}" for fold, name in zip(clips["fold"], clips["slice_file_name"], strict=True)]
    return [name for name in names if not size_of(dataset_dir / name)], len(names)


def broken_files(dataset_dir, dataset="urbansound8k"):
    """Return the names of files that are missing or whose md5 is not the one of soundata's index."""
    _, remote = soundata_remotes(dataset)
    index = dataset_dir / remote.filename
    try:
        get_file(remote.url, index, remote.checksum)
    except UserError as error:
        print(f"no index from soundata ({error}). Clips are checked against the table instead")
        return missing_clips(dataset_dir, dataset)[0]
    dataset = utils.need("soundata", "the download").initialize(dataset, data_home=str(dataset_dir))
    dataset.index_path = str(index)  # soundata would keep it in its own package folder, writable or not
    broken = []
    for kinds in dataset.validate(verbose=sys.stderr.isatty()):  # missing, then invalid: {kind: {id: [paths]}}
        broken += [path for files in kinds.values() for paths in files.values() for path in paths]
    index.unlink()
    return sorted(Path(path).relative_to(dataset_dir).as_posix() for path in broken)


def download(name, dataset_dir, url, force):
    """Bring dataset_dir to a complete, validated data set, from whatever state an earlier run left.

    name: of DATASETS. The archive is removed last: as long as it lies there, the data set is not taken for complete.
    """
    table, has_md5, unpack = DATASETS[name]
    remote, _ = soundata_remotes(name)
    archive = dataset_dir / remote.filename
    if demo_data.holds_miniature(dataset_dir):
        raise UserError(f"{dataset_dir} holds the miniature: delete that folder, or name another with --data_dir")
    if (dataset_dir / table).exists() and not archive.exists() and not force:
        try:
            missing, n_clips = missing_clips(dataset_dir, name)
        except UserError as error:
            raise UserError(f"{error}. --force fetches the data set again") from error
        if not missing:
            print(f"complete: {n_clips} clips in {dataset_dir}")
            return
        print(f"{len(missing)} of {n_clips} clips are missing or empty, such as {missing[0]}")
    needed = max(DISK_BYTES[name] - sum(size_of(path) for path in dataset_dir.rglob("*")), 0)
    utils.need_space(dataset_dir, needed, f" and needs {needed / 1e6:,.0f} MB: make room, or name another --data_dir")
    if force and not has_md5:  # what lies there may be anything
        archive.unlink(missing_ok=True)
    get_file(url or remote.url, archive, remote.checksum if has_md5 else None)
    unpack(archive, dataset_dir)
    try:
        if broken := broken_files(dataset_dir, name) or missing_clips(dataset_dir, name)[0]:
            raise UserError(f"{len(broken)} unpacked files are broken, such as {broken[0]}: check the disk, run again")
        n_clips = missing_clips(dataset_dir, name)[1]  # which reads the table, where soundata's index was enough
    except UserError as error:
        if has_md5:
            raise
        (dataset_dir / table).unlink(missing_ok=True)
        archive.unlink()  # it may be the wrong one
        raise UserError(f"{error}. {archive} is removed: the same command fetches it again") from error
    archive.unlink()
    print(f"complete: {n_clips} clips in {dataset_dir}, each validated")


DATASETS = {  # table, whether its archive has one md5, what unpacks that
    "urbansound8k": (METADATA, True, unpack),
    "esc50": (ESC50_TABLE, False, unpack_zip),
}


def main():
    args = parse_args()
    below = ESC50_DIR if args.dataset == "esc50" else config.DATASET_DIR
    dataset_dir = utils.folder(args.data_dir, args.assets_dir, below)
    try:
        with utils.only_one(dataset_dir, "download_data.py"):
            if not args.demo:
                return download(args.dataset, dataset_dir, args.url, args.force)
            state = "made" if demo_data.make_miniature(dataset_dir, force=args.force) else "complete"
            print(f"{state}: {missing_clips(dataset_dir)[1]} synthetic clips in {dataset_dir}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. The same command {'starts again' if args.demo else 'resumes'}.") from None


if __name__ == "__main__":
    utils.run(main)
