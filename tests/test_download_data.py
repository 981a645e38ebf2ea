"""Stage 1 against a loopback server that misbehaves, with a small archive made of real WAV files."""

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
from email.utils import formatdate
from pathlib import Path

import pytest
from flaky_server import closed_address, serving

import demo_data
import download_data
from utils import UserError

SCRIPT = Path(download_data.__file__)
CONTENT = random.Random(0).randbytes(1_000_000)
LOOPBACK_ONLY = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


def nowhere():
    """Environment variables that send every request to an address where nobody listens."""
    proxy = closed_address()
    return {"https_proxy": proxy, "HTTPS_PROXY": proxy, "no_proxy": "", "NO_PROXY": ""}


# --- A data set, its archive, its server -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(miniature, tmp_path_factory):
    """The miniature's fold 1 under ids of the real set: {name in the data set: bytes}."""
    files = {}
    with open(miniature / "metadata" / "UrbanSound8K.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "1"]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        source = miniature / f"audio/fold{row['fold']}/{row['slice_file_name']}"
        row["fsID"] = int(row["fsID"]) - demo_data.FIRST_FSID + 1000
        row["slice_file_name"] = f"{row['fsID']}-{row['slice_file_name'].split('-', 1)[1]}"
        files[f"audio/fold{row['fold']}/{row['slice_file_name']}"] = source.read_bytes()
        writer.writerow(row)
    files["metadata/UrbanSound8K.csv"] = table.getvalue().encode()
    files["FREESOUNDCREDITS.txt"] = b"credits"
    return files


def make_archive(files, top="UrbanSound8K/", extra=()):
    """Return a .tar.gz of {name: bytes}, and of `extra` TarInfo objects after the first file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for i, (name, content) in enumerate(files.items()):
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            for stranger in extra if i == 0 else ():
                tar.addfile(stranger, io.BytesIO(b"x" * stranger.size))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(dataset):
    return make_archive(dataset)


@pytest.fixture
def server(archive):
    with serving(archive) as server:
        yield server


@pytest.fixture
def download(server, tmp_path, run_script):
    """Runs `download_data.py --url <server> --data_dir <tmp_path>/data` and what is added."""

    def run(*flags):
        source = ["--url", server.url, "--md5", server.md5, "--retry_seconds", "0.01"]
        return run_script("download_data.py", "--data_dir", tmp_path / "data", *source, *flags, env=LOOPBACK_ONLY)

    return run


def contents(folder):
    """Return {name: bytes} of every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def one_error_line(done):
    """Check that a run ended with status 2 and no traceback; return its error line."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "error: " in line
    return line[line.index("error: ") :]


# --- A good run, and the run after it ----------------------------------------------------------------------------


def test_data_set_is_complete_and_a_second_run_asks_nothing(download, server, dataset, tmp_path):
    done = download()
    assert done.returncode == 0, done.stderr
    assert "complete: 20 clips" in done.stdout
    assert contents(tmp_path / "data") == dataset  # the archive, the .part and the work folder are gone
    again = download()
    assert again.returncode == 0 and "complete: 20 clips" in again.stdout
    assert len(server.seen) == 1


def test_kept_archive_repairs_lost_and_empty_clips_without_the_server(download, server, dataset, tmp_path):
    assert download("--keep_archive").returncode == 0
    data = tmp_path / "data"
    assert (data / "UrbanSound8K.tar.gz").read_bytes() == server.content
    lost, emptied, *_ = sorted((data / "audio").glob("*/*.wav"))
    lost.unlink()
    emptied.write_bytes(b"")
    done = download("--keep_archive")
    assert done.returncode == 0, done.stderr
    assert f"2 of 20 clips are missing or empty, such as audio/{lost.parent.name}/{lost.name}" in done.stdout
    (data / "UrbanSound8K.tar.gz").unlink()
    assert contents(data) == dataset
    assert len(server.seen) == 1


def test_what_is_left_over_is_named_and_kept(download, server, tmp_path):
    assert download("--keep_archive").returncode == 0
    assert "no longer needed" not in download("--keep_archive").stdout
    assert "no longer needed there: UrbanSound8K.tar.gz" in download().stdout
    assert (tmp_path / "data" / "UrbanSound8K.tar.gz").read_bytes() == server.content


def test_force_replaces_damaged_clips(download, server, dataset, tmp_path):
    assert download().returncode == 0
    clip = next((tmp_path / "data" / "audio").glob("*/*.wav"))
    clip.write_bytes(clip.read_bytes()[::-1])
    assert download("--force").returncode == 0
    assert contents(tmp_path / "data") == dataset
    assert len(server.seen) == 2


# --- Servers that misbehave -------------------------------------------------------------------------------------


def test_drops_busy_answers_and_a_server_without_range(download, server, dataset, tmp_path):
    server.moods = [("drop", 300_000), ("status", 503, "0"), ("drop", 100_000), ("no range",)]
    done = download()
    assert done.returncode == 0, done.stderr
    assert server.offsets == [0, 300_000, 300_000, 400_000]
    assert done.stdout.count("trying again in") == 3 and "starting over" in done.stdout
    assert contents(tmp_path / "data") == dataset


def test_wrong_byte_is_named_and_fetched_again(download, server, dataset, tmp_path):
    server.moods = [("wrong byte",)]
    done = download()
    assert done.returncode == 0, done.stderr
    assert "UrbanSound8K.tar.gz is broken (md5 " in done.stdout and server.md5 in done.stdout
    assert server.offsets == [0, 0]
    assert contents(tmp_path / "data") == dataset


def test_wrong_byte_twice_is_an_error(download, server, tmp_path):
    server.moods = [("wrong byte",), ("wrong byte",)]
    assert "still broken" in one_error_line(download())
    assert len(server.seen) == 2
    assert not (tmp_path / "data" / "metadata").exists()


def test_broken_archive_on_disk_is_named_and_fetched_again(download, server, dataset, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "UrbanSound8K.tar.gz").write_bytes(server.content[:-1])
    done = download()
    assert done.returncode == 0 and "is broken" in done.stdout
    assert contents(tmp_path / "data") == dataset


def test_archive_that_a_browser_fetched_is_used(download, server, dataset, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "UrbanSound8K.tar.gz").write_bytes(server.content)
    assert download().returncode == 0
    assert contents(tmp_path / "data") == dataset
    assert server.seen == []


def test_missing_file_is_one_clear_error(download, server):
    server.moods = [("status", 404)]
    line = one_error_line(download())
    assert server.url in line and "404" in line and "--url" in line


def test_no_network_is_one_clear_error(run_script, tmp_path):
    line = one_error_line(run_script("download_data.py", "--assets_dir", tmp_path, env=nowhere()))
    assert "can't reach https://" in line and "--url" in line


def test_disk_that_is_too_small_is_named_before_anything_is_written(download, server, tmp_path):
    server.moods = [("huge", 4 * 10**17)]
    line = one_error_line(download())
    assert "400000000.00 GB" in line and "500000000.00 GB" in line and "--data_dir" in line
    assert contents(tmp_path / "data") == {}


# --- Interruptions -----------------------------------------------------------------------------------------------


def start_and_wait(server, data, is_reached):
    """Start a download in the background; return its process once is_reached(data) or it has ended."""
    command = [sys.executable, SCRIPT, "--data_dir", data, "--url", server.url, "--md5", server.md5]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **LOOPBACK_ONLY}
    )
    while process.poll() is None and not is_reached(data):
        time.sleep(0.001)
    return process


def has_bytes(data):
    part = data / "UrbanSound8K.tar.gz.part"
    return part.exists() and part.stat().st_size > 200_000


def test_kill_in_the_download_then_resume(download, server, dataset, tmp_path):
    server.moods = [("slow",)]
    process = start_and_wait(server, tmp_path / "data", has_bytes)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    have = (tmp_path / "data" / "UrbanSound8K.tar.gz.part").stat().st_size
    assert download().returncode == 0
    assert server.offsets == [0, have] and have > 200_000
    assert contents(tmp_path / "data") == dataset


def test_ctrl_c_says_how_to_go_on(download, server, dataset, tmp_path):
    server.moods = [("slow",)]
    process = start_and_wait(server, tmp_path / "data", has_bytes)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors and "goes on where it stopped" in errors
    assert download().returncode == 0
    assert server.offsets[1] > 200_000
    assert contents(tmp_path / "data") == dataset


def test_kill_in_the_unpacking_then_resume(download, server, dataset, tmp_path):
    data = tmp_path / "data"
    for count in (1, 7, 19):
        process = start_and_wait(
            server, data, lambda data, count=count: len(list(data.glob("unpacking/*/audio/*/*.wav"))) >= count
        )
        process.kill()
        process.communicate()
        if process.returncode:
            assert not (data / "metadata").exists()
    assert download().returncode == 0
    assert contents(data) == dataset
    assert len(server.seen) == 1


@pytest.mark.parametrize("moved", [[], ["FREESOUNDCREDITS.txt"], ["FREESOUNDCREDITS.txt", "audio"], "all"])
def test_stop_between_validation_and_the_end_is_finished_without_the_server(download, server, dataset, tmp_path, moved):
    data = tmp_path / "data"
    for name, content in dataset.items():
        is_moved = moved == "all" or name.split("/")[0] in moved
        path = (data if is_moved else data / "unpacking" / "UrbanSound8K") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (data / "unpacking").mkdir(exist_ok=True)
    (data / "unpacking" / "validated").touch()
    assert download().returncode == 0
    assert contents(data) == dataset
    assert not (data / "unpacking").exists()
    assert server.seen == []


# --- Archives from strangers -------------------------------------------------------------------------------------


def stranger(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "evil",
    [
        stranger("../evil"),
        stranger("UrbanSound8K/../../../evil"),
        stranger("/evil_absolute"),
        stranger("UrbanSound8K\\..\\evil"),
        stranger("UrbanSound8K/audio/fold1/evil", tarfile.SYMTYPE, "../../../../.."),
        stranger("UrbanSound8K/audio/fold1/evil", tarfile.LNKTYPE, "/etc/passwd"),
        stranger("UrbanSound8K/evil", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_archive_with_a_name_that_leaves_the_folder_is_refused(dataset, tmp_path, evil):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(make_archive(dataset, extra=[evil]))
    with pytest.raises(UserError, match=f"refused.*{re.escape(repr(evil.name))}"):
        download_data.unpack(path, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*evil*"))
    assert not os.path.lexists("/evil_absolute")


def test_refused_archive_is_one_clear_error(download, server, dataset, tmp_path):
    server.content = make_archive(dataset, extra=[stranger("../../evil")])
    line = one_error_line(download())
    assert "refused" in line and "../../evil" in line
    assert not (tmp_path / "data" / "metadata").exists()


@pytest.mark.parametrize("kind", ["not a tar", "cut short", "another data set"])
def test_archive_of_something_else_is_named(dataset, archive, tmp_path, kind):
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(
        {
            "not a tar": b"<html>log in to the hotel's network</html>" * 1000,
            "cut short": archive[: len(archive) // 2],
            "another data set": make_archive(dataset, top="ESC-50/"),
        }[kind]
    )
    with pytest.raises(UserError, match=re.escape(str(path))):
        download_data.unpack(path, tmp_path)


def test_archive_without_the_clips_is_one_clear_error(download, server, dataset, tmp_path):
    server.content = make_archive({name: dataset[name] for name in dataset if name.startswith("metadata")})
    line = one_error_line(download())
    assert "20 files" in line and "audio/fold1/" in line
    assert not (tmp_path / "data" / "metadata").exists()


def test_strays_beside_the_data_set_in_the_archive_are_left_out(download, server, dataset, tmp_path):
    server.content = make_archive(dataset, extra=[stranger("._UrbanSound8K"), stranger("notes.txt")])
    assert download().returncode == 0
    assert contents(tmp_path / "data") == dataset


# --- soundata's validation ---------------------------------------------------------------------------------------


def test_soundata_validates_every_file(dataset, tmp_path):
    data = tmp_path / "data"
    for name, content in dataset.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    md5s = {name: [name, hashlib.md5(content).hexdigest()] for name, content in dataset.items()}
    index = {
        "version": "1.0",
        "clips": {Path(name).stem: {"audio": entry} for name, entry in md5s.items() if name.startswith("audio")},
        "metadata": {"UrbanSound8K.csv": md5s["metadata/UrbanSound8K.csv"]},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert download_data.validate_with_soundata(data, tmp_path / "index.json") == []
    changed, lost, *_ = (name for name in dataset if name.startswith("audio"))
    (data / changed).write_bytes(dataset[changed] + b"x")
    (data / lost).unlink()
    broken = [changed, lost, "metadata/UrbanSound8K.csv"]
    (data / broken[2]).write_bytes(b"slice_file_name\n")
    assert download_data.validate_with_soundata(data, tmp_path / "index.json") == sorted(broken)


def test_without_soundatas_index_one_line_says_so(tmp_path):
    code = f"import download_data, pathlib; print(download_data.get_index(pathlib.Path({str(tmp_path)!r}), 0.01))"
    env = {**os.environ, **nowhere()}
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, result = done.stdout.splitlines()
    assert "checked against the metadata" in line and result == "None"


def test_soundatas_own_archive_is_what_the_script_expects():
    archive, index = download_data.soundata_remotes()
    assert archive.filename == download_data.ARCHIVE and archive.unpack_directories == [download_data.TOP_FOLDER]
    assert archive.url.startswith("https://") and index.url.startswith("https://")
    assert download_data.md5_text(archive.checksum) and download_data.md5_text(index.checksum)


# --- The miniature and the real set stay apart -------------------------------------------------------------------


def test_miniature_is_not_taken_for_the_real_set(download, server, miniature, tmp_path):
    shutil.copytree(miniature, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert "holds the miniature" in one_error_line(download())
    assert contents(tmp_path / "data") == before
    assert server.seen == []


@pytest.mark.parametrize("state", ["complete", "archive", "part", "unpacking"])
def test_miniature_is_not_written_into_the_real_set(run_script, dataset, tmp_path, state):
    name = {"archive": "UrbanSound8K.tar.gz", "part": "UrbanSound8K.tar.gz.part", "unpacking": "unpacking/a.wav"}
    files = dataset if state == "complete" else {name[state]: b"x"}
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    line = one_error_line(run_script("download_data.py", "--demo", "--force", "--data_dir", tmp_path))
    assert str(tmp_path) in line and "--data_dir" in line
    assert contents(tmp_path) == files


def test_flags_that_make_no_sense_are_refused(run_script, tmp_path):
    for flags in (["--md5", "123"], ["--retry_seconds", "-1"], ["--url", "zenodo", "--md5", "0" * 32]):
        done = run_script("download_data.py", "--data_dir", tmp_path, *flags)
        assert flags[1] in one_error_line(done)


# --- Downloads of one file --------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def bytes_server(no_proxy):
    with serving(CONTENT) as server:
        yield server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new_folder" / "archive.tar.gz"


def check_whole(path, content=CONTENT):
    """The file is whole and nothing lies beside it."""
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_dropped_connections_go_on_where_they_broke(bytes_server, path, capsys):
    bytes_server.moods = [("drop", 300_000), ("drop", 0), ("drop", 500_000)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path)
    assert bytes_server.offsets == [0, 300_000, 300_000, 800_000]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("trying again in" in line for line in lines)


def test_silent_connection_is_given_up_and_goes_on(bytes_server, path):
    bytes_server.moods = [("stall", 300_000), ("stall", 0)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01, timeout=0.2)
    check_whole(path)
    assert bytes_server.offsets == [0, 300_000, 300_000]


def test_bytes_of_an_earlier_run_are_not_fetched_again(bytes_server, path):
    bytes_server.moods = [("drop", 300_000), ("status", 404)]
    with pytest.raises(UserError, match="404"):
        download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path)
    assert bytes_server.offsets == [0, 300_000, 300_000]


def test_whole_part_needs_no_request(bytes_server, path):
    bytes_server.moods = [("drop", 300_000), ("status", 404)]
    with pytest.raises(UserError):
        download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    path.with_name(path.name + ".part").write_bytes(CONTENT)  # killed between the last byte and the rename
    download_data.fetch(bytes_server.url, path)
    check_whole(path)
    assert len(bytes_server.seen) == 2


def test_server_that_ignores_range_is_read_from_the_start(bytes_server, path, capsys):
    bytes_server.moods = [("drop", 300_000), ("no range",)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path)
    assert "starting over" in capsys.readouterr().out


@pytest.mark.parametrize("keeps_to_if_range", [True, False])
@pytest.mark.parametrize("new", [CONTENT[::-1], CONTENT[::-1] + b"longer", CONTENT[::-1][:500_000], b"short"])
def test_file_that_changes_on_the_server_is_read_from_the_start(bytes_server, path, capsys, keeps_to_if_range, new):
    def change():
        bytes_server.content, bytes_server.etag = new, '"second"'

    bytes_server.keeps_to_if_range = keeps_to_if_range
    bytes_server.moods = [("drop", 300_000), ("call", change)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path, new)
    assert "starting over" in capsys.readouterr().out


def test_part_of_another_url_is_not_continued(bytes_server, path):
    bytes_server.moods = [("drop", 300_000), ("status", 404)]
    with pytest.raises(UserError):
        download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    download_data.fetch(bytes_server.url + "?mirror", path)
    check_whole(path)
    assert bytes_server.offsets == [0, 300_000, 0]


@pytest.mark.parametrize("has_length", [True, False])
def test_file_without_an_etag_or_length(bytes_server, path, has_length):
    bytes_server.etag = None
    bytes_server.moods = [("drop", 300_000)] if has_length else [("no length",)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_server_is_asked_again(bytes_server, path, code, capsys):
    bytes_server.moods = [("status", code), ("status", code)]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    check_whole(path)
    assert capsys.readouterr().out.count(f"the server answers {code}") == 2


def test_busy_server_is_not_asked_before_it_wishes(bytes_server, path):
    bytes_server.moods = [("status", 503, "1")]
    started = time.monotonic()
    download_data.fetch(bytes_server.url, path, retry_seconds=0.01)
    assert time.monotonic() - started >= 1
    check_whole(path)


def test_wish_can_be_a_date(bytes_server, path, capsys):
    bytes_server.moods = [("status", 503, formatdate(time.time() - 60, usegmt=True)), ("status", 503, "soon")]
    download_data.fetch(bytes_server.url, path, retry_seconds=0.02)
    check_whole(path)
    first, second = capsys.readouterr().out.splitlines()
    assert "in 0 s" in first and "in 0.04 s" in second  # a wish that nobody can read falls back on our own wait


def test_wish_for_an_hour_is_told_at_once(bytes_server, path):
    bytes_server.moods = [("status", 429, "3600")]
    with pytest.raises(UserError, match="3600 s"):
        download_data.fetch(bytes_server.url, path)
    assert len(bytes_server.seen) == 1


def test_server_that_stays_busy_is_given_up(bytes_server, path):
    bytes_server.moods = [("status", 503), ("status", 503), ("drop", 300_000), *[("status", 503)] * 100]
    with pytest.raises(UserError, match=r"503.*goes on at 0\.3 MB"):
        download_data.fetch(bytes_server.url, path, retry_seconds=0.001)
    assert len(bytes_server.seen) == 2 + download_data.MAX_TRIES  # counted from the last new byte


def test_what_waiting_cannot_mend_is_told_at_once(bytes_server, path):
    bytes_server.moods = [("status", 404)]
    with pytest.raises(UserError, match=r"404.*--url"):
        download_data.fetch(bytes_server.url, path)
    assert len(bytes_server.seen) == 1
    for url in (closed_address(), "http://", "zenodo", "ftp:/x", "http://127.0.0.1:1/a b"):
        with pytest.raises(UserError, match=r"--url|not a URL"):
            download_data.fetch(url, path)


def test_space_is_checked_with_what_is_left(bytes_server, path):
    asked = []
    bytes_server.moods = [("drop", 300_000)]
    download_data.fetch(bytes_server.url, path, 0.01, check_space=lambda left, total: asked.append((left, total)))
    assert asked == [(1_000_000, 1_000_000), (700_000, 1_000_000)]


def test_refused_for_space_writes_nothing(bytes_server, path):
    def refuse(left, total):
        raise UserError("too small")

    with pytest.raises(UserError, match="too small"):
        download_data.fetch(bytes_server.url, path, check_space=refuse)
    assert list(path.parent.iterdir()) == []
