"""The storage seam, on this machine's files. The same on S3: tests/integration."""

import errno
import json
import threading
from pathlib import Path

import pytest

from manta import storage
from manta.errors import InputError, MantaError


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A sealed folder of two files, one of them in a folder of its own."""
    url = str(tmp_path / "model")
    storage.write_bytes(f"{url}/weights", b"w" * 1000)
    storage.write_bytes(f"{url}/tokenizer/vocab", b"v")
    storage.seal(url, {"kind": "model"})
    return url


def test_a_seal_lists_every_file_and_the_facts(folder):
    content = storage.read_seal(folder, "model `m`")
    assert content["kind"] == "model"
    assert content["files"]["weights"] == storage.fingerprint(b"w" * 1000)
    assert sorted(content["files"]) == ["tokenizer/vocab", "weights"]
    assert storage.verify(folder, "model `m`") == content


def test_sealing_again_gives_the_same_seal(folder):
    before = Path(folder, storage.SEAL).read_bytes()
    storage.seal(folder, {"kind": "model"})
    assert Path(folder, storage.SEAL).read_bytes() == before


def test_a_fingerprint_that_the_writer_took_is_used_as_it_is(folder):
    known = {"weights": {"sha256": "of the writer", "size_bytes": 1000}}
    storage.seal(folder, known=known)
    assert storage.read_seal(folder, "m")["files"]["weights"] == known["weights"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda url: Path(url, "weights").write_bytes(b"w" * 999), r"is damaged: .*/weights"),
        (lambda url: Path(url, "weights").unlink(), r"is damaged: .*/weights"),
        (lambda url: Path(url, storage.SEAL).unlink(), "was never finished"),
        (lambda url: Path(url, storage.SEAL).write_text('{"files": {'), "not JSON, or cut short"),
        (lambda url: Path(url, storage.SEAL).write_text("[]"), r"is damaged: .*/seal.json"),
        (lambda url: storage.delete(url), "does not exist"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_its_name(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        storage.read_seal(folder, "model `m`")


def test_a_changed_byte_is_found_when_contents_are_verified(folder):
    Path(folder, "weights").write_bytes(b"x" + b"w" * 999)
    storage.read_seal(folder, "model `m`")  # sizes still fit
    with pytest.raises(InputError, match=r"model `m` is damaged: .*weights"):
        storage.verify(folder, "model `m`")


def test_readers_see_the_old_file_or_the_new_one_and_nothing_between(tmp_path):
    url = str(tmp_path / "file")
    contents = {letter * 100_000 for letter in "ab"}
    storage.write_bytes(url, b"a" * 100_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write_bytes(url, content.encode())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {storage.read_bytes(url).decode() for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    assert seen <= contents


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(MantaError, match=r"No space left on device.*; free some space") as caught:
        storage.write_bytes(url, b"new")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert storage.read_bytes(url) == b"old"


def test_an_upload_replaces_what_was_there_and_seals_it(folder, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "new").write_bytes(b"n")
    storage.upload(source, folder, {"kind": "other"})
    content = storage.verify(folder, "m")
    assert sorted(content["files"]) == ["deep/new"]
    assert content["kind"] == "other"
    assert not Path(folder, "weights").exists()


def test_a_local_folder_is_used_in_place_after_a_check(folder):
    with storage.local_copy(folder, "m") as path:
        assert str(path) == folder
    assert storage.cached_copy(folder, "m") == Path(folder)
    Path(folder, "weights").write_bytes(b"w")
    with pytest.raises(InputError, match="is damaged"), storage.local_copy(folder, "m"):
        pass


def test_a_folder_of_a_remote_store_is_downloaded_once_and_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    storage.upload(folder, "memory://bucket/model")
    first = storage.cached_copy("memory://bucket/model", "m")
    assert (first / "tokenizer" / "vocab").read_bytes() == b"v"
    (first / "mark").touch()
    assert storage.cached_copy("memory://bucket/model", "m") == first
    assert (first / "mark").exists()  # not downloaded again
    assert list((tmp_path / "home" / "cache").iterdir()) == [first]


def test_new_content_at_the_same_url_is_a_new_copy(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    storage.upload(folder, "memory://bucket/model")
    first = storage.cached_copy("memory://bucket/model", "m")
    Path(folder, "weights").write_bytes(b"other")
    storage.upload(folder, "memory://bucket/model")
    second = storage.cached_copy("memory://bucket/model", "m")
    assert first != second
    assert (second / "weights").read_bytes() == b"other"


def test_a_local_copy_of_a_remote_folder_goes_away_and_damage_is_found(folder):
    storage.upload(folder, "memory://bucket/model")
    with storage.local_copy("memory://bucket/model", "m") as path:
        assert (path / "weights").read_bytes() == b"w" * 1000
    assert not path.exists()
    storage.write_bytes("memory://bucket/model/weights", b"x" * 1000)
    with (
        pytest.raises(InputError, match="is damaged"),
        storage.local_copy("memory://bucket/model", "m"),
    ):
        pass


def test_a_glob_a_folder_and_a_file_list_files_with_sizes(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        storage.write_bytes(str(tmp_path / name), name.encode())
    assert storage.glob(str(tmp_path / "*.txt")) == [str(tmp_path / "a.txt"),
                                                     str(tmp_path / "b.txt")]  # fmt: skip
    assert len(storage.glob(str(tmp_path / "**" / "*.txt"))) == 3
    assert len(storage.glob(str(tmp_path))) == 4
    assert storage.file_sizes(str(tmp_path / "d.md")) == {str(tmp_path / "d.md"): 4}
    assert storage.glob(str(tmp_path / "none")) == storage.glob(str(tmp_path / "*.none")) == []


def test_a_remote_glob_gives_full_urls():
    storage.write_bytes("memory://globbed/a.txt", b"x")
    assert storage.glob("memory://globbed/*.txt") == ["memory:///globbed/a.txt"]
    assert storage.read_bytes("memory:///globbed/a.txt") == b"x"


@pytest.mark.parametrize("call", [storage.read_bytes, storage.read_json, storage.fingerprint_file])
def test_reading_what_is_not_there_is_one_line_with_its_url(tmp_path, call):
    with pytest.raises(InputError, match=r"/none: cannot be read \(No such file or directory\)"):
        call(str(tmp_path / "none"))


def test_json_is_written_with_sorted_keys(tmp_path):
    storage.write_json(str(tmp_path / "a"), {"b": 1, "a": [2]})
    storage.write_json(str(tmp_path / "b"), {"a": [2], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"a": [2], "b": 1}


def test_a_url_without_a_filesystem_is_refused():
    with pytest.raises(InputError, match=r"nosuch://x: no filesystem for this URL"):
        storage.filesystem("nosuch://x")


def test_the_root_is_absolute_since_workers_run_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(storage.ROOT_VARIABLE, "store")
    assert storage.root() == str(tmp_path / "store")
    monkeypatch.setenv(storage.ROOT_VARIABLE, "s3://bucket/store")
    assert storage.root() == "s3://bucket/store"


def test_deleting_what_is_not_there_is_no_error(tmp_path):
    storage.delete(str(tmp_path / "none"))
