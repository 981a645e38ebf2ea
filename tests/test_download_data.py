"""Stage 1 against a loopback server that fails in every way, with an archive of ten clips."""

import contextlib
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from flaky_server import serving

import data_loader
import download_data
import utils
from utils import UserError

BUSY = b"HTTP/1.1 503 \r\nRetry-After: 0\r\n\r\n"
WHOLE = b"HTTP/1.1 200 \r\n\r\n"  # and the content: an answer without Range
CLOSED = "http://127.0.0.1:9"  # where nobody listens
CONTENT = random.Random(0).randbytes(1_000_000)

# {name in the data set: bytes}; nothing of stage 1 decodes the clips.
CLIPS = [f"10000{i}-{i}-0-0.wav" for i in range(10)]
HEADER = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
TABLE = HEADER + "".join(f"{name},10000{i},0,4,1,1,{i},class_{i}\n" for i, name in enumerate(CLIPS))
DATASET = {download_data.METADATA: TABLE.encode(), "FREESOUNDCREDITS.txt": b"credits"}
DATASET |= {f"audio/fold1/{name}": CONTENT[i * 100_000 : (i + 1) * 100_000] for i, name in enumerate(CLIPS)}


def md5_of(content):
    return hashlib.md5(content).hexdigest()


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
def server():
    """Serves an archive of DATASET, and an index as soundata has it."""
    files = {name: [name, md5_of(content)] for name, content in DATASET.items()}
    clips = {Path(name).stem: {"audio": entry} for name, entry in files.items() if name.startswith("audio")}
    index = {"version": "1.0", "clips": clips, "metadata": {"UrbanSound8K.csv": files[download_data.METADATA]}}
    extra = [member("UrbanSound8K/audio", tarfile.DIRTYPE), member("._UrbanSound8K"), member("notes.txt", size=4)]
    with serving(make_archive(DATASET, extra), json.dumps(index).encode()) as server:
        yield server


@pytest.fixture
def download(server, tmp_path, monkeypatch, capsys):
    """A function that runs the script for <tmp_path>/data, with soundata's entries for `server` in place of Zenodo's.

    Gives .status, .stdout and .stderr.
    """
    archive, index = download_data.soundata_remotes()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_data, "RETRY_SECONDS", 0.001)
    monkeypatch.setitem(download_data.DISK_BYTES, "urbansound8k", 0)

    def run(*flags, index_url=f"{server.address}/index.json"):
        monkeypatch.setattr(archive, "url", server.address)
        monkeypatch.setattr(archive, "checksum", md5_of(server.content))
        monkeypatch.setattr(index, "url", index_url)
        monkeypatch.setattr(index, "checksum", md5_of(server.index))
        monkeypatch.setattr("sys.argv", ["download_data.py", "--data_dir", str(tmp_path / "data"), *flags])
        status = 0
        try:
            utils.run(download_data.main)
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=printed.out, stderr=printed.err)

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
    assert (done.status, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: "), done.stderr
    return done.stderr


# --- The script ----------------------------------------------------------------------------------------------------


def test_download_bad_server_ends_complete(download, server, tmp_path):
    wrong = ("raw", WHOLE + server.content[:-1] + b"\1")
    server.moods = [("drop", 300_000), ("raw", BUSY), ("drop", 100_000), wrong]
    done = download()
    assert (done.status, done.stderr) == (0, "")
    assert "can't resume" in done.stdout and "is broken" in done.stdout and "complete: 10 clips" in done.stdout
    assert server.offsets == [0, 300_000, 300_000, 400_000, 0]
    assert contents(tmp_path / "data") == DATASET  # archive and index are gone
    table = tmp_path / "data" / download_data.METADATA
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # Excel's byte order mark
    assert "complete: 10 clips" in download().stdout and len(server.offsets) == 5
    server.moods = [wrong, wrong]
    assert f"instead of {md5_of(server.content)}" in error_line(download("--force"))


@pytest.mark.parametrize("is_broken", [False, True])
def test_archive_in_folder_repairs_data_set(download, server, tmp_path, is_broken):
    lost, emptied, changed, *_ = (name for name in DATASET if name.endswith(".wav"))
    damaged = DATASET | {emptied: b"", changed: DATASET[changed][::-1]}
    del damaged[lost]
    write(tmp_path / "data", damaged | {"UrbanSound8K.tar.gz": server.content[: -1 if is_broken else None]})
    assert download().status == 0
    assert contents(tmp_path / "data") == DATASET
    assert server.offsets == [0] * is_broken


def test_archive_other_than_its_index_is_refused_without_index_accepted(download, server):
    name = f"audio/fold1/{CLIPS[0]}"
    server.content = make_archive(DATASET | {name: b"other"})
    assert f"1 unpacked files are broken, such as {name}" in error_line(download())
    assert "no index from soundata" in download(index_url=CLOSED).stdout


def test_no_room_and_no_network_are_one_line(download, server, monkeypatch):
    line = error_line(download("--url", CLOSED))
    assert "no connection (Connection refused)" in line and "--url" in line
    monkeypatch.setitem(download_data.DISK_BYTES, "urbansound8k", 4e17)
    line = error_line(download())
    assert "needs 400,000,000,000 MB" in line and "--data_dir" in line and server.offsets == []


@pytest.mark.parametrize("archive, path", [(False, "/UrbanSound8K.tar.gz.part"), (True, "")])
def test_disk_that_takes_no_more_is_one_line_with_the_path(download, server, tmp_path, archive, path):
    resource = pytest.importorskip("resource")
    write(tmp_path / "data", {"UrbanSound8K.tar.gz": server.content} if archive else {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes of a file
    try:
        line = error_line(download())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"error: {tmp_path}/data{path}: File too large" in line


def test_stop_in_download_and_in_unpacking_resumes(download, server, tmp_path):
    server.moods = [("slow", None)]
    data, part = tmp_path / "data", tmp_path / "data" / "UrbanSound8K.tar.gz.part"
    code = f"""
import download_data, utils
archive, index = download_data.soundata_remotes()
archive.url, archive.checksum, index.url = {server.address!r}, {md5_of(server.content)!r}, {CLOSED!r}
download_data.DISK_BYTES["urbansound8k"] = 0
utils.run(download_data.main)
"""
    for stop, status, is_reached in (
        (signal.SIGKILL, -signal.SIGKILL, lambda: download_data.size_of(part) > 200_000),
        (signal.SIGINT, 130, lambda: any(data.glob("audio/*/*.wav"))),
    ):
        command = [sys.executable, "-c", code, "--data_dir", data]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not is_reached():
            time.sleep(0.001)
        process.send_signal(stop)
        _, errors = process.communicate()
        assert process.returncode == status, errors
    assert "The same command resumes" in errors
    assert download().status == 0
    assert server.offsets[0] == 0 and server.offsets[1] > 200_000 and len(server.offsets) == 2
    assert contents(data) == DATASET


def test_damaged_table_is_refused_until_force_replaces_it(download, tmp_path):
    outside = f"{HEADER}{CLIPS[0]},100000,0,4,1,1/../../..,0,class_0\n"
    write(tmp_path / "data", DATASET | {f"../{CLIPS[0]}": b""})  # where that fold leads
    for table in (HEADER, outside):
        write(tmp_path / "data", {download_data.METADATA: table.encode()})
        line = error_line(download())
        assert download_data.METADATA in line and "--force" in line
    assert download("--force").status == 0
    assert contents(tmp_path / "data") == DATASET and (tmp_path / CLIPS[0]).exists()


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("audio/fold1/900001-0-0-0.wav", [], "holds the miniature"),
        ("audio/fold1/100032-3-0-0.wav", ["--demo"], "does not belong to this miniature"),
        ("UrbanSound8K.tar.gz.part", ["--demo"], "does not belong to this miniature"),
        (download_data.METADATA, ["--demo"], "does not belong to this miniature"),
    ],
)
def test_miniature_and_real_data_set_stay_apart(download, tmp_path, name, flags, words):
    write(tmp_path / "data", {name: b"x"})
    line = error_line(download("--force", *flags))
    assert words in line and "--data_dir" in line
    assert contents(tmp_path / "data") == {name: b"x"}


def test_soundata_entries_are_the_ones_expected():
    archive, index = download_data.soundata_remotes()
    assert archive.filename == "UrbanSound8K.tar.gz" and archive.unpack_directories == [download_data.TOP_FOLDER]
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


def test_fetch_redirect_is_followed_without_its_body(file, tmp_path):
    file.moods = [("raw", b"HTTP/1.1 302 \r\nLocation: /there\r\n\r\n" + bytes(20_000_000))]
    tracemalloc.start()
    download_data.fetch(file.address, tmp_path / "part")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "part").read_bytes() == CONTENT and peak < 10_000_000


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
        (member("UrbanSound8K/evil", size=3000), r"more than 2e\+03 bytes"),
        (member("UrbanSound8K//evil"), None),  # lands in the data set's folder
        (member("../evil"), None),  # left out, as all that follows
        (member("UrbanSound8K/evil", tarfile.SYMTYPE, target="../.."), None),
        (member("UrbanSound8K/evil", tarfile.LNKTYPE, target="/etc/passwd"), None),
        (member("UrbanSound8K/evil", tarfile.FIFOTYPE), None),
    ],
)
def test_unpack_unsafe_member_stays_in_folder(tmp_path, monkeypatch, evil, refusal):
    files = {download_data.METADATA: b"table", "audio/fold1/1-0-0-0.wav": b"sound", "FREESOUNDCREDITS.txt": b"credits"}
    write(tmp_path, {"archive": make_archive(files, [evil])})
    monkeypatch.setattr(download_data, "MAX_BYTES", 2000)
    with pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext():
        download_data.unpack(tmp_path / "archive", tmp_path / "a" / "b")
    found = contents(tmp_path)
    del found["archive"]
    if refusal:
        del files[download_data.METADATA]  # the table comes last
    assert found.pop("a/b/evil", b"") == b"" and found == {f"a/b/{name}": files[name] for name in files}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "content",
    [
        make_archive({"a": CONTENT})[:500_000],
        b"<html>log in</html>" * 1000,
        make_archive({"a": b"", "a/b": b""}),
    ],
)
def test_unpack_damaged_archive_is_named(tmp_path, content):
    write(tmp_path, {"archive": content})
    with pytest.raises(UserError, match=f"{tmp_path}/archive can't be unpacked"):
        download_data.unpack(tmp_path / "archive", tmp_path / "data")


# --- ESC-50 ------------------------------------------------------------------------------------------------------


def esc50_archive(extra=None, method=zipfile.ZIP_STORED, leave_out=()):
    """Return a .zip as GitHub makes it, with ten clips, and {name: bytes} of them."""
    header = "filename,fold,target,category,esc10,src_file,take\n"
    table = header + "".join(f"1-{i}-A-{i}.wav,{i % 5 + 1},{i},class {i},False,{i},A\n" for i in range(10))
    files = {f"audio/1-{i}-A-{i}.wav": CONTENT[i * 1000 : (i + 1) * 1000] for i in range(10)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in {download_data.ESC50_TABLE: table.encode(), **files, **(extra or {})}.items():
            if name not in leave_out:
                file.writestr(f"ESC-50-master/{name}", content)
    return buffer.getvalue(), files


@pytest.fixture
def download_esc50(monkeypatch, tmp_path, capsys):
    """A function that fetches an archive from loopback with --dataset esc50, and gives (status, stdout, stderr)."""

    def run(archive, files, *more, spoil=""):
        index = {"clips": {name: {"audio": [name, md5_of(content) + spoil]} for name, content in files.items()}}
        with serving(archive, json.dumps(index).encode()) as server:
            remote, index_remote = download_data.soundata_remotes("esc50")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            monkeypatch.setitem(download_data.DISK_BYTES, "esc50", 0)
            monkeypatch.setattr(remote, "url", server.address)
            monkeypatch.setattr(index_remote, "url", f"{server.address}/index.json")
            monkeypatch.setattr(index_remote, "checksum", md5_of(server.index))
            flags = ["--dataset", "esc50", "--assets_dir", str(tmp_path), *more]
            monkeypatch.setattr("sys.argv", ["download_data.py", *flags])
            status = 0
            try:
                utils.run(download_data.main)
            except SystemExit as ended:
                status = ended.code
        return status, *capsys.readouterr()

    return run


def test_esc50_is_fetched_and_each_clip_validated(download_esc50, tmp_path):
    status, out, err = download_esc50(*esc50_archive())
    assert (status, err) == (0, "") and "complete: 10 clips" in out and "each validated" in out
    kind, clips = data_loader.read_dataset(tmp_path / "data" / "ESC-50")
    assert kind.startswith("ESC-50") and len(clips) == 10 and all(path.is_file() for path in clips["path"])
    assert not list(tmp_path.rglob("*.zip"))
    _, out, _ = download_esc50(b"", {})
    assert out.startswith("complete: 10 clips")


def test_esc50_with_a_changed_clip_or_a_name_that_leaves_its_folder_is_refused(download_esc50, tmp_path):
    status, _, err = download_esc50(*esc50_archive(), spoil="0")
    assert status == 2 and "10 unpacked files are broken, such as audio/1-0-A-0.wav" in err
    status, _, err = download_esc50(*esc50_archive({"../../escaped.txt": b"x"}))
    assert status == 2 and "is refused: it names the file" in err and not list(tmp_path.rglob("escaped.txt"))
    (tmp_path / "data" / "ESC-50" / "ESC-50-master.zip").unlink()
    archive, files = esc50_archive()
    status, _, err = download_esc50(archive[:-30], files)
    assert status == 2 and "can't be unpacked" in err


def damaged(archive):
    """Return a .zip whose first member's data is wrong."""
    return archive[:60] + bytes(byte ^ 0x5A for byte in archive[60:100]) + archive[100:]


@pytest.mark.parametrize(
    "archive, words",
    [
        *((damaged(esc50_archive(method=method)[0]), "not stored or deflated") for method in (12, 14)),  # bzip2, LZMA
        (damaged(esc50_archive(method=zipfile.ZIP_DEFLATED)[0]), "can't be unpacked"),
        (esc50_archive({"audio": b"x"})[0], "can't be unpacked"),  # a file and a folder
    ],
)
def test_unpack_zip_damaged_archive_is_named(tmp_path, archive, words):
    write(tmp_path, {"archive": archive})
    with pytest.raises(UserError, match=f"{tmp_path}/archive .*{words}"):
        download_data.unpack_zip(tmp_path / "archive", tmp_path / "data")


@pytest.mark.parametrize(
    "wrong",
    [esc50_archive(leave_out=[download_data.ESC50_TABLE])[0], esc50_archive({download_data.ESC50_TABLE: b"x"})[0]],
)
def test_esc50_wrong_archive_is_removed_and_fetched_again(download_esc50, tmp_path, wrong):
    archive, files = esc50_archive()
    folder = tmp_path / "data" / "ESC-50"
    write(folder, {download_data.METADATA: TABLE.encode()})  # of the other data set
    status, _, err = download_esc50(wrong, files)
    assert status == 2 and f"{folder}/ESC-50-master.zip is removed: the same command fetches it again" in err
    assert download_esc50(archive, files)[0] == 0
    write(folder, {"ESC-50-master.zip": wrong})
    assert download_esc50(archive, files, "--force")[0] == 0
