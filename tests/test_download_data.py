"""Stage 1 against a loopback server that fails in every way, with a small archive of real WAV files."""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from flaky_server import closed_address, serving

import download_data
from utils import UserError

REPOSITORY = Path(download_data.__file__).parent
CONTENT = random.Random(0).randbytes(1_000_000)

# The script, with soundata's entries for a small archive and its index in place of Zenodo's.
LAUNCH = """
import download_data, utils
from soundata.datasets import urbansound8k
archive, index = urbansound8k.REMOTES["all"], urbansound8k.INDEXES["1.0"].remote
archive.url, archive.checksum = {url!r}, {md5!r}
index.url, index.checksum = {index_url!r}, {index_md5!r}
download_data.RETRY_SECONDS, download_data.DISK_BYTES = 0.01, {disk_bytes!r}
utils.run(download_data.main)
"""


def md5_of(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def dataset(miniature):
    """The miniature's fold 1 under Freesound ids of the real data set: {name in the data set: bytes}."""
    with open(miniature / "metadata" / "UrbanSound8K.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "1"]
    files, table = {}, io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        content = (miniature / "audio" / "fold1" / row["slice_file_name"]).read_bytes()
        row["fsID"] = int(row["fsID"]) - 899_000
        row["slice_file_name"] = f"{row['fsID']}-{row['slice_file_name'].split('-', 1)[1]}"
        files[f"audio/fold1/{row['slice_file_name']}"] = content
        writer.writerow(row)
    return {download_data.METADATA: table.getvalue().encode(), **files, "FREESOUNDCREDITS.txt": b"credits"}


def make_archive(files, top="UrbanSound8K/", extra=()):
    """Return a .tar.gz of {name: bytes}, and of `extra` TarInfo objects after them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def member(name, kind=tarfile.REGTYPE, size=0, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    if "\0" in name:
        info.pax_headers = {"path": name}
    return info


@pytest.fixture
def server(dataset):
    """Serves the archive of `dataset`, and an index as soundata has it."""
    files = {name: [name, md5_of(content)] for name, content in dataset.items()}
    index = {
        "version": "1.0",
        "clips": {Path(name).stem: {"audio": entry} for name, entry in files.items() if name.startswith("audio")},
        "metadata": {"UrbanSound8K.csv": files[download_data.METADATA]},
    }
    folders = [member(f"UrbanSound8K{name}", tarfile.DIRTYPE) for name in ("", "/audio", "/audio/fold1")]
    strays = [member("._UrbanSound8K"), member("notes.txt", size=4)]
    with serving(make_archive(dataset, extra=[*folders, *strays]), json.dumps(index).encode()) as server:
        yield server


@pytest.fixture
def start(server, tmp_path):
    """A function that starts the script for the folder <tmp_path>/data and returns its process."""

    def start(*flags, disk_bytes=0, env=(), **changes):
        entries = {"url": f"{server.address}/UrbanSound8K.tar.gz", "md5": md5_of(server.content)}
        entries |= {"index_url": f"{server.address}/index.json", "index_md5": md5_of(server.index)}
        code = LAUNCH.format(**entries | changes, disk_bytes=disk_bytes)
        command = [sys.executable, "-c", code, "--data_dir", str(tmp_path / "data"), *flags]
        env = {**os.environ, "no_proxy": "127.0.0.1", **dict(env)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture
def download(start):
    """A function that runs the script to its end and returns a CompletedProcess."""

    def run(*flags, **options):
        process = start(*flags, **options)
        output, errors = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder):
    """Return {name: bytes} of every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def error_line(done):
    """Return the one line on stderr of a run that a UserError ended."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: "), done.stderr
    return done.stderr


# --- The script ----------------------------------------------------------------------------------------------------


def test_download_bad_server_ends_complete(download, run_script, server, dataset, tmp_path):
    server.moods = [("drop", 300_000), ("status", 503, "0"), ("drop", 100_000), ("no range",)]
    done = download()
    assert (done.returncode, done.stderr) == (0, "")
    assert "can't resume" in done.stdout and "complete: 20 clips" in done.stdout
    assert server.offsets == [0, 300_000, 300_000, 400_000]
    assert contents(tmp_path / "data") == dataset  # archive and index are gone
    assert "complete: 20 clips" in run_script("download_data.py", "--data_dir", tmp_path / "data").stdout


def test_download_wrong_byte_is_fetched_again_once(download, server, dataset, tmp_path):
    server.moods = [("wrong byte",)]
    assert "starting again" in download().stdout and server.offsets == [0, 0]
    assert contents(tmp_path / "data") == dataset
    server.moods = [("wrong byte",), ("wrong byte",)]
    assert f"instead of {md5_of(server.content)}" in error_line(download("--force"))
    assert contents(tmp_path / "data") == dataset


@pytest.mark.parametrize("is_broken", [False, True])
def test_archive_in_folder_repairs_data_set(download, server, dataset, tmp_path, is_broken):
    lost, emptied, changed, *_ = (name for name in dataset if name.endswith(".wav"))
    damaged = dataset | {emptied: b"", changed: dataset[changed][::-1]}
    del damaged[lost]
    write(tmp_path / "data", damaged | {download_data.ARCHIVE: server.content[: -1 if is_broken else None]})
    done = download()
    assert (
        done.returncode == 0 and f"1 files are broken, such as {changed}" in done.stdout
    )  # of the size it should have
    assert contents(tmp_path / "data") == dataset
    assert server.offsets == [0] * is_broken


def test_no_index_checks_clips_against_table(download, dataset, tmp_path):
    assert "no index from soundata" in download(index_url=closed_address()).stdout
    assert contents(tmp_path / "data") == dataset


def test_archive_without_clips_is_refused(download, server, dataset, tmp_path):
    server.content = make_archive({download_data.METADATA: dataset[download_data.METADATA]})
    assert "20 unpacked files are broken, such as audio/fold1/" in error_line(download())


def test_disk_too_small_is_named_before_download(download, server):
    line = error_line(download(disk_bytes=4e17))
    assert "needs 400,000,000,000 MB" in line and "--data_dir" in line and server.offsets == []


def test_no_network_is_one_line(download):
    line = error_line(download("--url", closed_address()))
    assert "no connection (Connection refused)" in line and "--url" in line


# --- Interruptions -------------------------------------------------------------------------------------------------


def wait_for(process, is_reached):
    while process.poll() is None and not is_reached():
        time.sleep(0.001)


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stop_in_download_resumes(start, download, server, dataset, tmp_path, stop, status):
    server.moods = [("slow",)]
    part = tmp_path / "data" / "UrbanSound8K.tar.gz.part"
    process = start()
    wait_for(process, lambda: part.exists() and part.stat().st_size > 200_000)
    process.send_signal(stop)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (status, "\nStopped. The same command resumes.\n" if status == 130 else "")
    assert download().returncode == 0
    assert server.offsets[0] == 0 and server.offsets[1] > 200_000
    assert contents(tmp_path / "data") == dataset


def test_kill_in_unpacking_resumes(start, download, server, dataset, tmp_path):
    data = tmp_path / "data"
    for count in (1, 19):
        process = start()
        wait_for(process, lambda count=count: len(list(data.glob("audio/*/*.wav"))) >= count)
        process.kill()
        process.communicate()
    assert download().returncode == 0
    assert contents(data) == dataset
    assert server.offsets == [0]


# --- What lies in the folder ---------------------------------------------------------------------------------------


def test_table_with_byte_order_mark_is_accepted(run_script, dataset, tmp_path):
    write(tmp_path, dataset | {download_data.METADATA: b"\xef\xbb\xbf" + dataset[download_data.METADATA]})
    assert "complete: 20 clips" in run_script("download_data.py", "--data_dir", tmp_path).stdout


def test_damaged_table_is_refused_until_force_replaces_it(run_script, download, dataset, tmp_path):
    header, first, *_ = dataset[download_data.METADATA].decode().splitlines()
    name, *columns = first.split(",")
    outside = ",".join([name, *columns[:4], "1/../../..", *columns[5:]])
    write(tmp_path, {name: b""})  # where that fold leads
    for table in (header, f"{header}\n{outside}"):
        files = dataset | {download_data.METADATA: table.encode(), f"audio/fold1/{name}": b"damaged"}
        write(tmp_path / "data", files)
        line = error_line(run_script("download_data.py", "--data_dir", tmp_path / "data"))
        assert download_data.METADATA in line and "--force" in line
        assert contents(tmp_path / "data") == files
    assert download("--force").returncode == 0
    assert contents(tmp_path / "data") == dataset and (tmp_path / name).exists()


def test_miniature_and_real_data_set_stay_apart(run_script, miniature, dataset, tmp_path):
    for files, flags, word in (
        (contents(miniature), ["--force"], "holds the miniature"),
        (dataset, ["--demo", "--force"], "other clips"),
        ({"UrbanSound8K.tar.gz.part": b"x"}, ["--demo"], "belongs to the real data set"),
    ):
        write(tmp_path / "data", files)
        line = error_line(run_script("download_data.py", "--data_dir", tmp_path / "data", *flags))
        assert word in line and "--data_dir" in line
        assert contents(tmp_path / "data") == files
        shutil.rmtree(tmp_path / "data")


def test_soundata_entries_are_the_ones_expected():
    archive, index = download_data.soundata_remotes()
    assert archive.filename == download_data.ARCHIVE and archive.unpack_directories == [download_data.TOP_FOLDER]
    assert all(entry.url.startswith("https://") and len(entry.checksum) == 32 for entry in (archive, index))


# --- fetch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(monkeypatch):
    """Serves CONTENT."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, value in (("RETRY_SECONDS", 0.001), ("TIMEOUT", 0.5), ("MAX_BYTES", 2_000_000)):
        monkeypatch.setattr(download_data, name, value)
    with serving(CONTENT) as server:
        yield server


@pytest.mark.parametrize(
    "moods",
    [
        [("drop", 300_000), ("stall", 0), ("stall", 500_000)],
        [("status", 429, "soon"), ("status", 503, "9" * 5000), ("status", 500, "-1")],
        [("length", "many")],
        [("length", "-5")],
        [("raw", b"HTTP/1.1 206 \r\nContent-Range: bytes 0-999999/*\r\n\r\n" + CONTENT)],
        [("drop", 1), ("raw", b"HTTP/1.1 503 \x1b[2J\x07\r\n\r\n"), ("raw", b"\x1b[2J\r\n\r\n"), ("raw", b"")],
    ],
)
def test_fetch_odd_answers_ends_complete(file, tmp_path, capsys, moods):
    file.moods = moods
    download_data.get_file(file.address, tmp_path / "file", md5_of(CONTENT))
    assert contents(tmp_path) == {"file": CONTENT}
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("part, offsets", [(CONTENT, [1_000_000]), (CONTENT[::-1], [1_000_000, 0]), (b"x", [1, 0])])
def test_get_file_part_of_earlier_run(file, tmp_path, part, offsets):
    (tmp_path / "file.part").write_bytes(part)
    download_data.get_file(file.address, tmp_path / "file", md5_of(CONTENT))
    assert contents(tmp_path) == {"file": CONTENT}
    assert file.offsets == offsets


@pytest.mark.parametrize(
    "mood, n_requests, words",
    [
        (("status", 503, None), 8, r"503, 8 times in a row.*resumes at 0\.0 MB"),
        (("status", 429, "3600"), 1, r"429.*in 3600 s or later"),
        (("status", 404, None), 1, r"404 \(Not Found\).*--url"),
        (("length", "9" * 15), 1, r"1e\+15 bytes.*--url"),
        (("raw", b"HTTP/1.1 200 \r\n\r\n" + 3 * CONTENT), 1, "more bytes than the data set has"),
        (("raw", b"HTTP/1.1 302 \r\nLocation: ftp://\x1b[2J/\r\n\r\n"), 1, r"can't fetch.*--url"),
        (("raw", b"HTTP/1.1 206 \r\nContent-Range: bytes 9-\r\n\r\n" + CONTENT), 8, "not asked for"),
    ],
)
def test_fetch_hopeless_server_is_one_line(file, tmp_path, mood, n_requests, words):
    file.moods = [mood] * 100
    with pytest.raises(UserError, match=words) as refused:
        download_data.fetch(file.address, tmp_path / "part")
    assert str(refused.value).isprintable()
    assert len(file.offsets) == n_requests
    assert download_data.size_of(tmp_path / "part") < 2_000_000 + 2 * download_data.CHUNK


@pytest.mark.parametrize("url", ["http://", "zenodo", "ftp:/x", "http://127.0.0.1:1/a b", "http://" + "a" * 70])
def test_fetch_bad_url_is_one_line(tmp_path, url):
    with pytest.raises(UserError, match="--url"):
        download_data.fetch(url, tmp_path / "part")


# --- unpack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("UrbanSound8K/../../../evil"),
        member("/evil"),
        member("UrbanSound8K/e\0vil"),
        member("UrbanSound8K/evil", tarfile.SYMTYPE, target="../.."),
        member("UrbanSound8K/evil", tarfile.LNKTYPE, target="/etc/passwd"),
        member("UrbanSound8K/evil", tarfile.FIFOTYPE),
    ],
)
def test_unpack_unsafe_member_is_refused_by_name(dataset, tmp_path, evil):
    write(tmp_path, {"archive": make_archive(dataset, extra=[evil])})
    with pytest.raises(UserError, match=f"refused.*{re.escape(repr(evil.name))}"):
        download_data.unpack(tmp_path / "archive", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*evil*")) and not os.path.lexists("/evil")


def test_unpack_through_link_in_folder_is_refused(dataset, tmp_path):
    write(tmp_path, {"archive": make_archive(dataset), "elsewhere/kept": b""})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "audio").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside the destination"):
        download_data.unpack(tmp_path / "archive", tmp_path / "data")
    assert contents(tmp_path / "elsewhere") == {"kept": b""}


def test_unpack_too_many_bytes_is_refused(dataset, tmp_path, monkeypatch):
    write(tmp_path, {"archive": make_archive(dataset, extra=[member("UrbanSound8K/bomb", size=30_000_000)])})
    monkeypatch.setattr(download_data, "MAX_BYTES", 20_000_000)
    with pytest.raises(UserError, match=r"more than 2e\+07 bytes"):
        download_data.unpack(tmp_path / "archive", tmp_path / "data")
    assert not (tmp_path / "data" / "bomb").exists() and not (tmp_path / "data" / download_data.METADATA).exists()


@pytest.mark.parametrize("kind", ["not an archive", "cut short", "another data set"])
def test_unpack_something_else_is_named(dataset, tmp_path, kind):
    content = {
        "not an archive": b"<html>log in</html>" * 1000,
        "cut short": make_archive(dataset)[:500_000],
        "another data set": make_archive(dataset, top="ESC-50/"),
    }[kind]
    write(tmp_path, {"archive": content})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "archive"))):
        download_data.unpack(tmp_path / "archive", tmp_path / "data")
    assert not (tmp_path / "data" / download_data.METADATA).exists()
