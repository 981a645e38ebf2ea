"""Stage 1 against a loopback server that fails in every way, with a small archive of real WAV files."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pytest
from flaky_server import serving

import download_data
from utils import UserError

REPOSITORY = Path(download_data.__file__).parent
BUSY = b"HTTP/1.1 503 \r\nRetry-After: 0\r\n\r\n"
WHOLE = b"HTTP/1.1 200 \r\n\r\n"  # and the content: an answer without Range
CLOSED = "http://127.0.0.1:9"  # where nobody listens
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
    clips = pd.read_csv(miniature / download_data.METADATA).query("fold == 1")
    clips["fsID"] -= 891_000  # a few real ids begin with 9 too
    files = {}
    for index, old in clips["slice_file_name"].items():
        clips.loc[index, "slice_file_name"] = name = f"{clips.loc[index, 'fsID']}-{old.split('-', 1)[1]}"
        files[f"audio/fold1/{name}"] = (miniature / "audio" / "fold1" / old).read_bytes()
    return {download_data.METADATA: clips.to_csv(index=False).encode(), **files, "FREESOUNDCREDITS.txt": b"credits"}


def make_archive(files, extra=()):
    """Return a .tar.gz of {name: bytes}, and of `extra` TarInfo objects after them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            tar.addfile(member(f"UrbanSound8K/{name}", size=len(content)), io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def member(name, kind=tarfile.REGTYPE, size=0, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    info.pax_headers = {"path": name} if "\0" in name else {}
    return info


@pytest.fixture
def server(dataset):
    """Serves the archive of `dataset`, and an index as soundata has it."""
    files = {name: [name, md5_of(content)] for name, content in dataset.items()}
    clips = {Path(name).stem: {"audio": entry} for name, entry in files.items() if name.startswith("audio")}
    index = {"version": "1.0", "clips": clips, "metadata": {"UrbanSound8K.csv": files[download_data.METADATA]}}
    extra = [member("UrbanSound8K/audio", tarfile.DIRTYPE), member("._UrbanSound8K"), member("notes.txt", size=4)]
    with serving(make_archive(dataset, extra), json.dumps(index).encode()) as server:
        yield server


@pytest.fixture
def download(server, tmp_path):
    """A function that runs the script for the folder <tmp_path>/data and returns a CompletedProcess.

    It sends the signal `stop` as soon as is_reached().
    """

    def run(*flags, stop=None, is_reached=None, disk_bytes=0, index_url=f"{server.address}/index.json"):
        entries = {"url": f"{server.address}/UrbanSound8K.tar.gz", "md5": md5_of(server.content)}
        entries |= {"index_url": index_url, "index_md5": md5_of(server.index), "disk_bytes": disk_bytes}
        command = [sys.executable, "-c", LAUNCH.format(**entries), "--data_dir", str(tmp_path / "data"), *flags]
        env = {**os.environ, "no_proxy": "127.0.0.1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe, text=True)
        if stop:
            while process.poll() is None and not is_reached():
                time.sleep(0.001)
            process.send_signal(stop)
        output, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

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
    wrong = ("raw", WHOLE + server.content[:-1] + b"\1")
    server.moods = [("drop", 300_000), ("raw", BUSY), ("drop", 100_000), wrong]
    done = download()
    assert (done.returncode, done.stderr) == (0, "")
    assert "can't resume" in done.stdout and "is broken" in done.stdout and "complete: 20 clips" in done.stdout
    assert server.offsets == [0, 300_000, 300_000, 400_000, 0]
    assert contents(tmp_path / "data") == dataset  # archive and index are gone
    table = tmp_path / "data" / download_data.METADATA
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # Excel's byte order mark
    assert "complete: 20 clips" in run_script("download_data.py", "--data_dir", tmp_path / "data").stdout
    server.moods = [wrong, wrong]
    assert f"instead of {md5_of(server.content)}" in error_line(download("--force"))


@pytest.mark.parametrize("is_broken", [False, True])
def test_archive_in_folder_repairs_data_set(download, server, dataset, tmp_path, is_broken):
    lost, emptied, changed, *_ = (name for name in dataset if name.endswith(".wav"))
    damaged = dataset | {emptied: b"", changed: dataset[changed][::-1]}
    del damaged[lost]
    write(tmp_path / "data", damaged | {download_data.ARCHIVE: server.content[: -1 if is_broken else None]})
    assert download().returncode == 0
    assert contents(tmp_path / "data") == dataset
    assert server.offsets == [0] * is_broken


def test_archive_other_than_its_index_is_refused_without_index_accepted(download, server, dataset):
    name = list(dataset)[1]
    server.content = make_archive(dataset | {name: b"other"})
    assert f"1 unpacked files are broken, such as {name}" in error_line(download())
    assert "no index from soundata" in download(index_url=CLOSED).stdout


def test_no_room_and_no_network_are_one_line(download, server):
    line = error_line(download(disk_bytes=4e17))
    assert "needs 400,000,000,000 MB" in line and "--data_dir" in line and server.offsets == []
    line = error_line(download("--url", CLOSED))
    assert "no connection (Connection refused)" in line and "--url" in line


@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stop_in_download_or_unpacking_resumes(download, server, dataset, tmp_path, stop, status):
    server.moods = [("slow", None)]
    data, part = tmp_path / "data", tmp_path / "data" / "UrbanSound8K.tar.gz.part"
    for is_reached in (lambda: download_data.size_of(part) > 200_000, lambda: any(data.glob("audio/*/*.wav"))):
        done = download(stop=stop, is_reached=is_reached)
        assert (done.returncode, "The same command resumes" in done.stderr) == (status, status == 130)
    assert download().returncode == 0
    assert server.offsets[0] == 0 and server.offsets[1] > 200_000 and len(server.offsets) == 2
    assert contents(data) == dataset


def test_damaged_table_is_refused_until_force_replaces_it(run_script, download, dataset, tmp_path):
    header, first, *_ = dataset[download_data.METADATA].decode().splitlines()
    name, *columns = first.split(",")
    outside = ",".join([name, *columns[:4], "1/../../..", *columns[5:]])
    write(tmp_path / "data", dataset | {f"../{name}": b""})  # where that fold leads
    for table in (header, f"{header}\n{outside}"):
        write(tmp_path / "data", {download_data.METADATA: table.encode()})
        line = error_line(run_script("download_data.py", "--data_dir", tmp_path / "data"))
        assert download_data.METADATA in line and "--force" in line
    assert download("--force").returncode == 0
    assert contents(tmp_path / "data") == dataset and (tmp_path / name).exists()


def test_miniature_and_real_data_set_stay_apart(run_script, miniature, dataset, tmp_path):
    for files, flags, words in (
        (contents(miniature), [], "holds the miniature"),
        (dataset, ["--demo"], "does not belong to this miniature"),
        ({"UrbanSound8K.tar.gz.part": b"x"}, ["--demo"], "does not belong to this miniature"),
        ({download_data.METADATA: dataset[download_data.METADATA]}, ["--demo"], "does not belong to this miniature"),
    ):
        write(tmp_path / "data", files)
        line = error_line(run_script("download_data.py", "--force", "--data_dir", tmp_path / "data", *flags))
        assert words in line and "--data_dir" in line
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


def test_fetch_odd_answers_ends_complete(file, tmp_path, capsys):
    odd = [BUSY.replace(b": 0", b": " + wait) for wait in (b"soon", b"9" * 5000, b"-1")]
    odd += [b"HTTP/1.1 503 \x1b[2J\x07\r\n\r\n", b"\x1b[2J\r\n\r\n"]
    whole = WHOLE.replace(b" \r\n", b" \r\nContent-Length: many\r\n", 1) + CONTENT
    file.moods = [("drop", 300_000), ("stall", 0), ("stall", 500_000), *(("raw", answer) for answer in [*odd, whole])]
    download_data.get_file(file.address, tmp_path / "file", md5_of(CONTENT))
    assert contents(tmp_path) == {"file": CONTENT}
    assert file.moods == [] and "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("part, offsets", [(CONTENT, [1_000_000]), (CONTENT[::-1], [1_000_000, 0]), (b"x", [1, 0])])
def test_get_file_part_of_earlier_run(file, tmp_path, part, offsets):
    (tmp_path / "file.part").write_bytes(part)
    download_data.get_file(file.address, tmp_path / "file", md5_of(CONTENT))
    assert contents(tmp_path) == {"file": CONTENT}
    assert file.offsets == offsets


@pytest.mark.parametrize(
    "answer, n_requests, words",
    [
        (BUSY, 7, r"503, 7 times in a row.*--url.*resumes at 0\.0 MB"),
        (b"HTTP/1.1 429 \r\nRetry-After: 3600\r\n\r\n", 1, r"429.*in 3600 s or later"),
        (b"HTTP/1.1 404 \r\n\r\n", 1, "404: name another source with --url"),
        (WHOLE + 3 * CONTENT, 1, "more bytes than the data set has"),
        (b"HTTP/1.1 302 \r\nLocation: ftp://\x1b[2J/\r\n\r\n", 1, "can't fetch.*--url"),
        (b"HTTP/1.1 206 \r\nContent-Range: bytes 9-\r\n\r\n" + CONTENT, 7, "not asked for"),
    ],
)
def test_fetch_hopeless_server_is_one_line(file, tmp_path, answer, n_requests, words):
    file.moods = [("raw", answer)] * 100
    with pytest.raises(UserError, match=words) as refused:
        download_data.fetch(file.address, tmp_path / "part")
    assert str(refused.value).isprintable()
    assert len(file.offsets) == n_requests
    assert download_data.size_of(tmp_path / "part") < 2_000_000 + 2 * download_data.CHUNK


@pytest.mark.parametrize("url", ["http://", "zenodo", "http://127.0.0.1:1/a b", "http://" + "a" * 70])
def test_fetch_bad_url_is_one_line(file, tmp_path, url):
    with pytest.raises(UserError, match="--url"):
        download_data.fetch(url, tmp_path / "part")


# --- unpack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "evil, refusal",
    [
        (member("UrbanSound8K/../../../evil"), "can't be unpacked"),
        (member("UrbanSound8K/e\0vil"), "can't be unpacked"),
        (member("UrbanSound8K/evil", size=30_000_000), r"more than 2e\+07 bytes"),
        (member("UrbanSound8K//evil"), None),  # lands in the data set's folder
        (member("../evil"), None),  # left out, as all that follows
        (member("UrbanSound8K/evil", tarfile.SYMTYPE, target="../.."), None),
        (member("UrbanSound8K/evil", tarfile.LNKTYPE, target="/etc/passwd"), None),
        (member("UrbanSound8K/evil", tarfile.FIFOTYPE), None),
    ],
)
def test_unpack_unsafe_member_stays_in_folder(dataset, tmp_path, monkeypatch, evil, refusal):
    write(tmp_path, {"archive": make_archive(dataset, [evil])})
    monkeypatch.setattr(download_data, "MAX_BYTES", 20_000_000)
    with pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext():
        download_data.unpack(tmp_path / "archive", tmp_path / "a" / "b")
    found = contents(tmp_path)
    del found["archive"]
    names = [name for name in dataset if not refusal or name != download_data.METADATA]  # the table comes last
    assert found.pop("a/b/evil", b"") == b"" and found == {f"a/b/{name}": dataset[name] for name in names}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("is_cut", [True, False])
def test_unpack_damaged_archive_is_named(dataset, tmp_path, is_cut):
    write(tmp_path, {"archive": make_archive(dataset)[:500_000] if is_cut else b"<html>log in</html>" * 1000})
    with pytest.raises(UserError, match=f"{tmp_path}/archive can't be unpacked"):
        download_data.unpack(tmp_path / "archive", tmp_path / "data")
