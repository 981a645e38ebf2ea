"""Stage 1: fetch UrbanSound8K (8,732 clips), or make a miniature of it.

    python download_data.py                          # 6 GB from Zenodo -> <assets>/data/UrbanSound8K
    python download_data.py --data_dir /big/disk/US8K
    python download_data.py --demo                   # 300 synthetic clips instead, in seconds, no network

Needs 14 GB of disk while it runs and 7 GB after. Stop it at any time: the same command resumes, and returns at once
when the data set is complete. soundata validates every file. An archive that a browser fetched is used if it lies in
the data set's folder as UrbanSound8K.tar.gz. The archive is removed at the end.

UrbanSound8K is free for non-commercial use (CC BY-NC): J. Salamon, C. Jacoby and J. P. Bello, "A Dataset and Taxonomy
for Urban Sound Research", 22nd ACM International Conference on Multimedia, Orlando, 2014.
"""

import errno
import hashlib
import http.client
import os
import re
import sys
import tarfile
import time
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
ARCHIVE = "UrbanSound8K.tar.gz"
METADATA = "metadata/UrbanSound8K.csv"
DISK_BYTES = 14e9  # archive (6 GB) and unpacked files (7 GB), rounded up
MAX_BYTES = 10e9  # neither the archive nor its unpacked files are as large: more is something else

TIMEOUT = 60  # s without a byte before a connection counts as lost
RETRY_SECONDS = 2.0  # s; first wait, doubled with each failure in a row
MAX_FAILURES = 8  # in a row without a new byte; the waits sum to four minutes
MAX_RETRY_AFTER = 900  # s; a server that asks for a longer wait ends the run
CHUNK = 1 << 16  # bytes; at most this much is lost with a connection


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
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


class TryAgain(Exception):
    """A failure that may pass: TryAgain(reason, wait), where wait is the server's Retry-After in s, or None."""


def fetch(url, part):
    """Append to `part` what it lacks of the file at a URL.

    Lost connections and busy servers are tried again after doubling waits, until MAX_FAILURES in a row brought no new
    byte. UserError for what waiting can't fix. Whether the bytes are right is for the caller to check.
    """
    failures, most = 0, size_of(part)
    while True:
        wait = None
        try:
            return fetch_rest(url, part)
        except TryAgain as error:
            reason, wait = error.args
        except ValueError as error:  # this URL, or one that the server leads to, is none
            raise UserError(f"can't fetch {url!r} ({root_cause(error)}): name another source with --url") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = f"no connection ({root_cause(error)})"
            if failures == 0 and isinstance(error, requests.ConnectionError):  # probably no network at all
                raise UserError(f"{url}: {reason}: check the network, or name another source with --url") from error
        size = size_of(part)
        failures = 1 if size > most else failures + 1
        most = max(size, most)
        if wait is None:
            wait = RETRY_SECONDS * 2 ** (failures - 1)
        if failures == MAX_FAILURES or wait > MAX_RETRY_AFTER:
            raise UserError(
                f"{url}: {reason}, {failures} times in a row. Run the same command in {wait:g} s or later: "
                f"it resumes at {size / 1e6:.1f} MB"
            )
        tqdm.write(f"{reason}; {size / 1e6:.1f} MB are here, next try in {wait:g} s")
        time.sleep(wait)


def fetch_rest(url, part):
    """Make one request and append its body to `part`. TryAgain or an error of requests or urllib3 if it fails."""
    size = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 416 and size:  # Range Not Satisfiable: all bytes are here, or different ones; the md5 decides
            return
        if status in (408, 425, 429) or status >= 500:
            raise TryAgain(f"the server answers {status}", whole_number(response.headers.get("Retry-After")))
        if status not in (200, 206):
            reason = http.client.responses.get(status, "no download")
            raise UserError(f"{url}: the server answers {status} ({reason}): name another source with --url")
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            part.unlink(missing_ok=True)
            raise TryAgain("the server sends bytes that were not asked for", None)
        if status == 200 and size:
            tqdm.write("the server can't resume: starting again")
            size = 0
        length = whole_number(response.headers.get("Content-Length"))  # bytes that follow
        total = None if length is None else size + length
        if total and total > MAX_BYTES:
            raise UserError(f"{url} has {total:.3g} bytes, more than the data set: check --url")
        with open(part, "ab" if size else "wb") as file, progress_bar(total, part.stem, size) as bar:
            for chunk in response.raw.stream(CHUNK, decode_content=False):  # a .gz stays a .gz
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    raise UserError(f"{url} sends more bytes than the data set has: check --url, and delete {part}")


def whole_number(text):
    """Return a header's number, or None if it is missing or none."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def root_cause(error):
    """Return what led to an exception of requests, as printable text: servers have a say in some messages."""
    while error.__context__:
        error = error.__context__
    return repr(str(getattr(error, "strerror", None) or error))[1:-1]


def md5_of(path):
    """Return a file's md5 as 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def get_file(url, path, md5):
    """Bring a file with this md5 to `path`. A broken one is named and fetched again, once."""
    part = path.with_name(path.name + ".part")
    if path.exists():
        print(f"checking {path}")
        if md5_of(path) == md5:
            return
        print(f"{path} is broken: fetching it again")
        path.unlink()
    for attempt in (1, 2):
        print(f"fetching {url}")
        fetch(url, part)
        found = md5_of(part)
        if found == md5:
            os.replace(part, path)
            return
        part.unlink()
        if attempt == 1:
            print(f"{path.name} is broken (md5 {found} instead of {md5}): starting again")
    raise UserError(f"{url} is broken (md5 {found} instead of {md5}): name another source with --url")


# --- Archive -----------------------------------------------------------------------------------------------------


def unpack(archive, folder, force=False):
    """Unpack the archive's TOP_FOLDER into `folder`, the table last, so that half a data set never looks complete.

    Files that are there at full size are not written again, unless `force`. UserError for a damaged archive, for names
    that leave the folder, links and devices, and for more bytes than the data set or the disk has.
    """
    table = folder / METADATA
    table_part = table.with_name(table.name + ".part")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.unlink(missing_ok=True)
    n_bytes = 0
    try:
        with (
            open(archive, "rb") as raw,
            progress_bar(archive.stat().st_size, "unpacking") as bar,
            tarfile.open(fileobj=raw, mode="r|gz") as tar,
        ):
            for member in tar:
                bar.update(raw.tell() - bar.n)
                n_bytes += member.size
                if n_bytes > MAX_BYTES:
                    raise UserError(f"{archive} is refused: it unpacks to more than {MAX_BYTES:.3g} bytes")
                name = PurePosixPath(member.name)
                is_plain = (member.isfile() or member.isdir()) and "\0" not in member.name
                if name.is_absolute() or ".." in name.parts or not is_plain:
                    raise UserError(f"{archive} is refused: {member.name!r} in it is no plain file below its folder")
                if name.parts[:1] != (TOP_FOLDER,):
                    continue
                path = folder / name.relative_to(TOP_FOLDER)
                if path == table:
                    path = table_part
                if member.isfile() and not force and path.is_file() and path.stat().st_size == member.size:
                    continue
                utils.need_space(folder, member.size, f", too little for {member.name!r}: make room")
                inner = path.relative_to(folder).as_posix()
                tar.extract(member.replace(name=inner, deep=False), folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise UserError(f"{archive} can't be unpacked ({error}). If you delete it, it is fetched again") from error
    if not table_part.exists():
        raise UserError(f"{archive} holds no {TOP_FOLDER}/{METADATA}: delete it, and it is fetched again")
    os.replace(table_part, table)


# --- Data set ----------------------------------------------------------------------------------------------------


def soundata_remotes():
    """Return soundata's (archive, index) entries for UrbanSound8K: objects with filename, url and checksum (md5)."""
    utils.need("soundata", "the download")
    from soundata.datasets import urbansound8k

    return urbansound8k.REMOTES["all"], urbansound8k.INDEXES[urbansound8k.INDEXES["default"]].remote


def get_index(folder):
    """Return the path of soundata's index of md5s in `folder`, or None, with one line, where it can't be had."""
    _, remote = soundata_remotes()
    path = folder / remote.filename
    try:
        get_file(remote.url, path, remote.checksum)
        return path
    except UserError as error:
        print(f"no index from soundata ({error}). Clips are checked against the table instead")


def missing_clips(dataset_dir):
    """Return (names of clips that the table lists and that are missing or empty, number of clips listed)."""
    clips = data_loader.read_clip_table(dataset_dir / METADATA)  # which refuses names and folds that leave the folder
    names = [f"audio/fold{fold}/{name}" for fold, name in zip(clips["fold"], clips["slice_file_name"], strict=True)]
    return [name for name in names if not size_of(dataset_dir / name)], len(names)


def validate_with_soundata(dataset_dir, index_path):
    """Return the names of files that are missing or whose md5 is not the one of soundata's index."""
    import soundata

    dataset = soundata.initialize("urbansound8k", data_home=str(dataset_dir))
    dataset.index_path = str(index_path)  # soundata would keep it in its own package folder, writable or not
    broken = []
    for kinds in dataset.validate(verbose=sys.stderr.isatty()):  # missing, then invalid: {kind: {id: [paths]}}
        broken += [path for files in kinds.values() for paths in files.values() for path in paths]
    return sorted(Path(path).relative_to(dataset_dir).as_posix() for path in broken)


def unpack_and_validate(archive, dataset_dir, force):
    """Unpack the archive and validate each file. What is broken is unpacked once more."""
    index = get_index(dataset_dir)
    for attempt in (1, 2):
        unpack(archive, dataset_dir, force and attempt == 1)
        broken = validate_with_soundata(dataset_dir, index) if index else missing_clips(dataset_dir)[0]
        if not broken:
            break
        print(f"{len(broken)} files are broken, such as {broken[0]}")
        for name in broken:
            (dataset_dir / name).unlink(missing_ok=True)
    else:
        raise UserError(f"{len(broken)} unpacked files are broken, such as {broken[0]}: check the disk, then run again")
    if index:
        index.unlink()


def download(dataset_dir, url, force):
    """Bring dataset_dir to a complete, validated data set, from whatever state an earlier run left.

    The archive is removed last: as long as it lies there, the data set is not taken for complete.
    """
    archive = dataset_dir / ARCHIVE
    if demo_data.holds_miniature(dataset_dir):
        raise UserError(f"{dataset_dir} holds the miniature: delete that folder, or name another with --data_dir")
    if (dataset_dir / METADATA).exists() and not archive.exists() and not force:
        try:
            missing, n_clips = missing_clips(dataset_dir)
        except UserError as error:
            raise UserError(f"{error}. --force fetches the data set again") from error
        if not missing:
            print(f"complete: {n_clips} clips in {dataset_dir}")
            return
        print(f"{len(missing)} of {n_clips} clips are missing or empty, such as {missing[0]}")
    files = (archive, archive.with_name(ARCHIVE + ".part"), *dataset_dir.glob("audio/*/*"))
    here = sum(size_of(path) for path in files)
    needed = max(DISK_BYTES - here, 0)
    utils.need_space(dataset_dir, needed, f" and needs {needed / 1e6:,.0f} MB: make room, or name another --data_dir")
    remote, _ = soundata_remotes()
    get_file(url or remote.url, archive, remote.checksum)
    unpack_and_validate(archive, dataset_dir, force)
    archive.unlink()
    print(f"complete: {missing_clips(dataset_dir)[1]} clips in {dataset_dir}, each validated")


def make_demo(dataset_dir, force):
    """Write the miniature, unless it is there or the folder belongs to the real data set."""
    for name in (ARCHIVE, ARCHIVE + ".part"):
        if (dataset_dir / name).exists():
            raise UserError(f"{dataset_dir / name} belongs to the real data set: name another --data_dir for --demo")
    is_new = demo_data.make_miniature(dataset_dir, force=force)
    print(f"{'made' if is_new else 'complete'}: {missing_clips(dataset_dir)[1]} synthetic clips in {dataset_dir}")


def main():
    args = parse_args()
    dataset_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    try:
        with utils.only_one(dataset_dir, "download_data.py"):
            if args.demo:
                make_demo(dataset_dir, args.force)
            else:
                download(dataset_dir, args.url, args.force)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. The same command {'starts again' if args.demo else 'resumes'}.") from None
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "check that folder"
        reason = f"{error.filename or dataset_dir}: {error.strerror or error}"
        raise UserError(f"{reason}: {remedy}, or name another --data_dir") from error


if __name__ == "__main__":
    utils.run(main)
