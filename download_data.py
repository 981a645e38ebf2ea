"""Stage 1: fetch UrbanSound8K (8,732 clips), or make a miniature of it.

    python download_data.py                          # 6 GB from Zenodo -> <assets>/data/UrbanSound8K
    python download_data.py --data_dir /big/disk/US8K
    python download_data.py --demo                   # 300 synthetic clips instead, in seconds, no network

Needs about 14 GB of disk while it works and 7 GB after. Prints a bar for the download, the md5 check, the unpacking and
soundata's validation of every file. Stop it whenever you like: the same command goes on where it stopped, and returns
at once when the data set is complete. An archive that a browser fetched is used if it lies in the data set's folder as
UrbanSound8K.tar.gz.

UrbanSound8K is free for non-commercial use (CC BY-NC): J. Salamon, C. Jacoby and J. P. Bello, "A Dataset and Taxonomy
for Urban Sound Research", 22nd ACM International Conference on Multimedia, Orlando, 2014.
"""

import argparse
import csv
import email.utils
import errno
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

import config
import demo_data
import utils
from utils import UserError

TOP_FOLDER = "UrbanSound8K"  # of the archive; its contents become the data set's folder
ARCHIVE = "UrbanSound8K.tar.gz"  # soundata's name for it, so that soundata finds it too
METADATA = Path("metadata") / "UrbanSound8K.csv"
WORK_FOLDER = "unpacking"  # in the data set's folder; gone when the data set is complete
UNPACKED_RATIO = 1.25  # unpacked bytes for one byte of archive, estimated on the safe side

TIMEOUT = 60  # s without a byte before a connection counts as lost
RETRY_SECONDS = 2.0  # s; first wait, doubled each time
MAX_WAIT = 120.0  # s; longest of these waits
MAX_RETRY_AFTER = 900.0  # s; a server that asks for more is told to the user
MAX_TRIES = 8  # in a row without one new byte
CHUNK = 1 << 20  # bytes


def parse_args():
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", help=f"the data set (default: {config.DATASET_DIR} in the assets)")
    add("--demo", action="store_true", help="make the miniature instead, without a download")
    add("--force", action="store_true", help="unpack or make it again, even if the data set looks complete")
    add("--keep_archive", action="store_true", help="keep the 6 GB archive once it is unpacked")
    add("--url", help="another source of the same archive, such as a mirror (default: soundata's)")
    add("--md5", type=md5_text, help="the archive's md5, where --url is an archive of your own (default: soundata's)")
    add(
        "--retry_seconds",
        type=utils.positive_float,
        default=RETRY_SECONDS,
        metavar="S",
        help=f"wait before the first retry of a lost connection, then twice as long each (default: {RETRY_SECONDS:g})",
    )
    return parser.parse_args()


def md5_text(text):
    """argparse type: an md5 as 32 hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an md5: 32 hexadecimal digits")
    return text.lower()


# --- HTTP -------------------------------------------------------------------------------------------------------------


def gigabytes(size):
    """Return a number of bytes for people: 6.02 GB, 3.1 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def progress_bar(total, name, initial=0):
    """Return a tqdm bar that counts bytes."""
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, mininterval=0.5, leave=False)


class TryAgain(Exception):
    """A failure that may pass; `wait` is the server's own wish in seconds, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


def fetch(url, path, retry_seconds=RETRY_SECONDS, check_space=None, timeout=TIMEOUT):
    """Fetch a URL to `path`, going on after the bytes that an earlier call left in `<path>.part`.

    Lost connections, those without a byte for `timeout` seconds, and busy servers are tried again, at most MAX_TRIES
    times without a new byte. `check_space(left, total)` is called with bytes before any is written. UserError for
    what waiting can't mend.
    """
    part = path.with_name(path.name + ".part")
    note = path.with_name(path.name + ".part.json")  # what the bytes in the .part belong to
    path.parent.mkdir(parents=True, exist_ok=True)
    tries, most = 0, 0
    with progress_bar(None, path.name) as bar:
        while True:
            try:
                fetch_rest(url, part, note, bar, check_space, timeout, first=tries == 0)
                break
            except TryAgain as failure:
                have = part.stat().st_size if part.exists() else 0
                tries = 1 if have > most else tries + 1
                most = max(have, most)
                if tries == MAX_TRIES or (failure.wait or 0) > MAX_RETRY_AFTER:
                    wish = f"; the server asks to wait {failure.wait:.0f} s" if failure.wait else ""
                    raise UserError(
                        f"{url}: {failure} (try {tries}{wish}). The same command goes on at {gigabytes(have)} later"
                    ) from failure
                wait = min(retry_seconds * 2 ** (tries - 1), MAX_WAIT) if failure.wait is None else failure.wait
                tqdm.write(f"{failure}; {gigabytes(have)} are here, trying again in {wait:.3g} s ({tries}/{MAX_TRIES})")
                time.sleep(wait)
    os.replace(part, path)
    note.unlink(missing_ok=True)


def fetch_rest(url, part, note, bar, check_space, timeout, first):
    """Append what is missing to `part`; TryAgain where the connection ends before the file does."""
    known = utils.load_json(note) if note.exists() and part.exists() else {}
    offset = part.stat().st_size if known.get("url") == url else 0
    if offset and offset == known["length"]:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "download_data.py (Python urllib)"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with open_url(url, headers, part, timeout, first) as response:
        start, total = span(response)
        validator = response.headers["ETag"] or response.headers["Last-Modified"]
        validator = None if (validator or "").startswith("W/") else validator  # a weak ETag can't promise the bytes
        if start and (start != offset or (total, validator) != (known["length"], known["validator"])):
            part.unlink()
            raise TryAgain("the file has changed on the server: starting over", wait=0)
        if offset and not start:
            tqdm.write("the server sends the file from its first byte: starting over")
        if check_space and total is not None:
            check_space(total - start, total)
        bar.total = total
        bar.n = bar.initial = start
        bar.refresh()
        if not start:
            part.unlink(missing_ok=True)
            utils.save_json(note, {"url": url, "length": total, "validator": validator})
        is_lost = not copy_body(response, part, bar)
    if is_lost or (total is not None and part.stat().st_size < total):
        raise TryAgain(f"the connection ended early{f' ({gigabytes(total)} in all)' if total else ''}")


def open_url(url, headers, part, timeout, first):
    """Open a URL. TryAgain for what may pass, UserError for what will not."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # Range Not Satisfiable: our bytes are not the start of what the server has
                part.unlink(missing_ok=True)
                raise TryAgain("the file has changed on the server: starting over", wait=0) from error
            if error.code in (408, 425, 429) or error.code >= 500:
                reason = f"the server answers {error.code} {error.reason}"
                raise TryAgain(reason, retry_after(error.headers["Retry-After"])) from error
            raise UserError(f"{url}: {error.code} {error.reason}. Name another source with --url") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url!r} is not a URL ({error})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if not first or isinstance(reason, (TimeoutError, ConnectionResetError, http.client.HTTPException)):
            raise TryAgain(f"no connection ({reason})") from error
        text = getattr(reason, "strerror", None) or reason
        raise UserError(f"can't reach {url} ({text}): check the network, or name a source with --url") from error


def span(response):
    """Return (first byte, length of the whole file or None) of a response."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
    if response.status == 206 and match:
        return int(match[1]), int(match[2])
    length = response.headers["Content-Length"]
    return 0, int(length) if length else None


def copy_body(response, part, bar):
    """Append the response to `part`. Return False if the connection broke; one that just ends early returns True."""
    with open(part, "ab") as file:
        while True:
            try:
                chunk = response.read1(CHUNK)
            except (OSError, http.client.HTTPException):
                return False
            if not chunk:
                return True
            file.write(chunk)
            bar.update(len(chunk))


def retry_after(text):
    """Return the seconds that a Retry-After header asks for (a number or a date), or None."""
    if text and text.strip().isdigit():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


# --- Archive -----------------------------------------------------------------------------------------------------


def soundata_remotes():
    """Return soundata's (archive, index) entries for UrbanSound8K: objects with filename, url and checksum (md5)."""
    utils.need("soundata", "the download")
    from soundata.datasets import urbansound8k

    return urbansound8k.REMOTES["all"], urbansound8k.INDEXES[urbansound8k.INDEXES["default"]].remote


def md5_of(path):
    """Return a file's md5, with a bar."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress_bar(path.stat().st_size, "md5") as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def get_archive(dataset_dir, url, md5, retry_seconds):
    """Return the path of the archive in dataset_dir, verified; a broken one is named and fetched again, once."""
    archive = dataset_dir / ARCHIVE

    def check_space(left, total):
        need_space(dataset_dir, left, UNPACKED_RATIO * total)

    attempts = 3 if archive.exists() else 2
    for attempt in range(1, attempts + 1):
        if archive.exists():
            print(f"checking {archive} ({gigabytes(archive.stat().st_size)})")
        else:
            print(f"fetching {url}")
            fetch(url, archive, retry_seconds, check_space)
        found = md5_of(archive)
        if found == md5:
            return archive
        if attempt < attempts:
            print(f"{archive} is broken (md5 {found}, expected {md5}): fetching it again")
            archive.unlink()
    raise UserError(f"{archive}, fetched again, is still broken (md5 {found}, expected {md5}): see --url and --md5")


def need_space(folder, archive_bytes, unpacked_bytes):
    """UserError if a folder's disk can't take this many bytes."""
    free = shutil.disk_usage(folder).free
    done = sum(path.stat().st_size for path in (folder / WORK_FOLDER).rglob("*") if path.is_file())
    unpacked_bytes = max(unpacked_bytes - done, 0)
    if free < archive_bytes + unpacked_bytes:
        raise UserError(
            f"{folder} has {gigabytes(free)} free and needs {gigabytes(archive_bytes + unpacked_bytes)} (archive "
            f"{gigabytes(archive_bytes)}, unpacked {gigabytes(unpacked_bytes)}): make room, or choose --data_dir"
        )


def unpack(archive, folder):
    """Unpack the archive's TOP_FOLDER below `folder`. Files that are there at full size are not written again.

    A name that leaves the folder, a link or a device is refused by name, before anything is written for it.
    """
    try:
        with (
            open(archive, "rb") as raw,
            progress_bar(archive.stat().st_size, "unpacking") as bar,
            tarfile.open(fileobj=raw, mode="r|*") as tar,
        ):
            for member in tar:
                name = PurePosixPath(member.name)
                is_plain = member.isfile() or member.isdir()
                if name.is_absolute() or ".." in name.parts or re.search(r"[\\:]", member.name) or not is_plain:
                    raise UserError(f"{archive} is refused: {member.name!r} in it is no plain file below its folder")
                path = folder / name
                bar.update(raw.tell() - bar.n)
                if name.parts[:1] != (TOP_FOLDER,) or member.isdir():
                    continue
                if path.suffix == ".wav" and path.is_file() and path.stat().st_size == member.size:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(path.name + ".tmp")
                with open(temporary, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file, CHUNK)
                os.replace(temporary, path)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} can't be unpacked ({error}): is --url an archive of UrbanSound8K?") from error
    if not (folder / TOP_FOLDER / METADATA).exists():
        raise UserError(f"{archive} holds no {TOP_FOLDER}/{METADATA.as_posix()}: is --url an archive of UrbanSound8K?")


# --- Data set ----------------------------------------------------------------------------------------------------


def broken_clips(dataset_dir):
    """Return (files that the metadata lists and that are missing or empty, number of clips listed)."""
    try:
        with open(dataset_dir / METADATA, newline="", encoding="utf-8") as file:
            names = [f"audio/fold{row['fold']}/{row['slice_file_name']}" for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{dataset_dir / METADATA} is not UrbanSound8K's table ({error}): delete it") from error
    sizes = {}
    for fold in dataset_dir.glob("audio/*/"):
        sizes.update((f"audio/{fold.name}/{entry.name}", entry.stat().st_size) for entry in os.scandir(fold))
    return [name for name in names if not sizes.get(name)], len(names)


def validate_with_soundata(dataset_dir, index_path):
    """Return the files (relative names) that are missing or whose md5 differs from soundata's index."""
    import soundata

    dataset = soundata.initialize("urbansound8k", data_home=str(dataset_dir))
    dataset.index_path = str(index_path)  # soundata would keep it in its own package folder, writable or not
    broken = []
    for kinds in dataset.validate(verbose=True):  # missing, then invalid: {kind: {id: [paths]}}
        broken += [path for files in kinds.values() for paths in files.values() for path in paths]
    return sorted(Path(path).relative_to(dataset_dir).as_posix() for path in broken)


def get_index(folder, retry_seconds):
    """Return the path of soundata's index, verified, or None with one line where it can't be had."""
    _, remote = soundata_remotes()
    for path in (Path(remote.destination_dir) / remote.filename, folder / remote.filename):
        if path.exists() and md5_of(path) == remote.checksum:
            return path
    try:
        fetch(remote.url, path, retry_seconds)
        if md5_of(path) == remote.checksum:
            return path
        reason = "its md5 is wrong"
    except UserError as error:
        reason = error
    print(f"no index from soundata ({reason}): every clip is checked against the metadata instead")
    return None


def unpack_and_validate(archive, dataset_dir, args):
    """Unpack into the work folder, validate there, and mark it as ready to be moved."""
    work = dataset_dir / WORK_FOLDER
    unpacked = work / TOP_FOLDER
    unpacked.mkdir(parents=True, exist_ok=True)
    for name in ("metadata", "audio"):  # what an incomplete data set has need not be unpacked again
        if not args.force and (dataset_dir / name).exists() and not (unpacked / name).exists():
            os.replace(dataset_dir / name, unpacked / name)
    need_space(dataset_dir, 0, UNPACKED_RATIO * archive.stat().st_size)
    index = None if args.md5 else get_index(work, args.retry_seconds)
    for _ in range(2):  # what the validation finds broken is unpacked once more
        unpack(archive, work)
        broken = (index and validate_with_soundata(unpacked, index)) or broken_clips(unpacked)[0]
        if not broken:
            break
        print(f"{len(broken)} files are broken, such as {broken[0]}")
        for name in broken:
            (unpacked / name).unlink(missing_ok=True)
    else:
        raise UserError(
            f"{len(broken)} files, such as {broken[0]}, are broken in the archive itself, or the disk fails"
        )
    print("valid: " + ("each file has the md5 of soundata's index" if index else "each clip of the metadata is there"))
    (work / "validated").touch()


def move_into_place(dataset_dir):
    """Move a validated data set from the work folder to its place, the metadata last; then remove the work folder.

    Can be stopped anywhere and called again: the mark `validated` goes last.
    """
    work = dataset_dir / WORK_FOLDER
    if (work / TOP_FOLDER).exists():
        for path in sorted((work / TOP_FOLDER).iterdir(), key=lambda path: path.name == "metadata"):
            target = dataset_dir / path.name
            if target.exists():
                (work / "old").mkdir(exist_ok=True)
                os.replace(target, work / "old" / path.name)
            os.replace(path, target)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "validated":
            path.unlink()
    (work / "validated").unlink()
    work.rmdir()


def download(dataset_dir, args):
    """Bring dataset_dir to a complete, validated data set, from whatever state an earlier run left."""
    archive = dataset_dir / ARCHIVE
    work = dataset_dir / WORK_FOLDER
    if demo_data.holds_miniature(dataset_dir):
        raise UserError(f"{dataset_dir} holds the miniature: delete that folder, or choose another --data_dir")
    if (work / "validated").exists():
        move_into_place(dataset_dir)
    if (dataset_dir / METADATA).exists() and not args.force:
        broken, clips = broken_clips(dataset_dir)
        if clips and not broken:
            print(f"complete: {clips} clips in {dataset_dir}")
            left = [name for name in (ARCHIVE, ARCHIVE + ".part", WORK_FOLDER) if (dataset_dir / name).exists()]
            if left and not args.keep_archive:
                print(f"no longer needed there: {', '.join(left)}")
            return
        print(f"{len(broken)} of {clips} clips are missing or empty{', such as ' + broken[0] if broken else ''}")
    dataset_dir.mkdir(parents=True, exist_ok=True)
    if args.url and args.md5:
        url, md5 = args.url, args.md5
    else:
        remote, _ = soundata_remotes()
        url, md5 = args.url or remote.url, args.md5 or remote.checksum
    get_archive(dataset_dir, url, md5, args.retry_seconds)
    unpack_and_validate(archive, dataset_dir, args)
    move_into_place(dataset_dir)
    archive.with_name(ARCHIVE + ".part.json").unlink(missing_ok=True)  # left by a kill at the download's last moment
    if not args.keep_archive:
        archive.unlink()
    print(f"complete: {broken_clips(dataset_dir)[1]} clips in {dataset_dir}")


def make_demo(dataset_dir, force):
    """Write the miniature, unless it is there or the folder belongs to the real data set."""
    for name in (ARCHIVE, ARCHIVE + ".part", WORK_FOLDER):
        if (dataset_dir / name).exists():
            raise UserError(f"{dataset_dir / name} belongs to the real data set: choose another --data_dir for --demo")
    is_new = demo_data.make_miniature(dataset_dir, force=force)
    print(f"{'made' if is_new else 'complete'}: {broken_clips(dataset_dir)[1]} synthetic clips in {dataset_dir}")


def main():
    args = parse_args()
    dataset_dir = utils.folder(args.data_dir, args.assets_dir, config.DATASET_DIR)
    try:
        with utils.only_one(dataset_dir, "download_data.py"):
            if args.demo:
                make_demo(dataset_dir, args.force)
            else:
                download(dataset_dir, args)
    except KeyboardInterrupt:
        remedy = "makes it from the start" if args.demo else "goes on where it stopped"
        raise KeyboardInterrupt(f"Stopped. The same command {remedy}.") from None
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "check that folder"
        reason = f"{error.filename or dataset_dir}: {error.strerror or error}"
        raise UserError(f"{reason}: {remedy}, or choose another --data_dir") from error


if __name__ == "__main__":
    utils.run(main)
