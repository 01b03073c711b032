"""Reading, cleaning and identifying documents."""

import gzip
import json
import random
import re
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import InputError
from manta.spec import STDLIB, PrepareConfig
from manta.workloads import text
from manta.workloads.text import InputFile


def read(path, format_="text", field="text"):
    return list(text.read_texts(InputFile(str(path), 0, format_), field))


def test_line_ends_blanks_and_control_characters_are_cleaned():
    assert text.clean("\ufeff\n\na \t\r\nb\r\x00c\x1b[0m\n\n") == "a\nb\nc[0m"


def test_indentation_and_inner_blank_lines_survive_cleaning():
    assert text.clean("if x:\n\n    y = 1\n") == "if x:\n\n    y = 1"


def test_equal_characters_written_differently_become_the_same_document():
    composed, decomposed = text.clean("caf\u00e9"), text.clean("cafe\u0301")
    assert text.document_id(composed) == text.document_id(decomposed)


def test_half_of_a_surrogate_pair_becomes_a_replacement_character():
    assert text.clean("a\ud800b é").encode() == "a\ufffdb é".encode()
    assert text.clean("\ud83d\ude00") == "😀"


def test_cleaning_twice_changes_nothing_more():
    random.seed(0)
    for _ in range(200):
        raw = "".join(random.choices("a \t\n\r\x00\ufeffé\u0301", k=30))
        assert text.clean(text.clean(raw)) == text.clean(raw)


def test_a_long_text_is_cut_without_losing_a_character():
    assert list(text.cut("abcdefg", 3)) == ["abc", "def", "g"]
    assert list(text.cut("", 3)) == [""]


def test_shards_are_ranges_of_ids_in_order_and_of_like_size():
    ids = sorted(text.document_id(str(number)) for number in range(4000))
    shards = [text.shard_of(key, 4) for key in ids]
    assert shards == sorted(shards)
    assert all(900 < shards.count(shard) < 1100 for shard in range(4))


def test_about_the_asked_fraction_of_every_shard_is_held_out():
    ids = [text.document_id(str(number)) for number in range(4000)]
    for shard in range(2):
        mine = [key for key in ids if text.shard_of(key, 2) == shard]
        held_out = sum(text.is_validation(key, 0.1) for key in mine)
        assert 0.08 < held_out / len(mine) < 0.12


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    ids = [text.document_id(str(number)) for number in range(1000)]
    small = {key for key in ids if text.is_validation(key, 0.05)}
    assert small < {key for key in ids if text.is_validation(key, 0.2)}


def test_a_file_that_is_not_utf8_text_reads_as_none(tmp_path: Path):
    (tmp_path / "latin1").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"a\0b")
    assert read(tmp_path / "latin1") == [None]
    assert read(tmp_path / "binary") == [None]


def test_compressed_jsonl_and_text_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    assert read(tmp_path / "a.jsonl.gz", "jsonl") == ["one", "two"]
    assert read(tmp_path / "b.txt.gz") == ["three"]


def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path):
    lines = "\n".join(json.dumps({"text": random.random().hex()}) for _ in range(500)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
        read(tmp_path / "a.jsonl.gz", "jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "a.jsonl:2: not JSON; write one JSON object on each line"),
        (b"\xff\xfe", "a.jsonl:2: not JSON"),
        (b"[" * 100_000, "a.jsonl:2: not JSON"),
        (b"[1]", "a.jsonl:2: not a JSON object"),
        (b'{"body": "x", "id": 1}', "a.jsonl:2: no text under `text`; set text_field to one of"),
        (b'{"text": 3}', "a.jsonl:2: no text under `text`"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_with_its_number(tmp_path: Path, line: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path / "a.jsonl", "jsonl")


def test_a_column_of_parquet_is_read_and_null_is_empty(tmp_path: Path):
    pq.write_table(pa.table({"body": ["one", None], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "parquet", "body") == ["one", ""]


@pytest.mark.parametrize(
    ("field", "message"),
    [("text", "no column `text`; set text_field to one of its columns: body, n"),
     ("n", "column `n` holds int64, not text")],
)  # fmt: skip
def test_a_parquet_file_without_the_text_column_is_refused(
    tmp_path: Path, field: str, message: str
):
    pq.write_table(pa.table({"body": ["one"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path / "a.parquet", "parquet", field)


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        read(tmp_path / "a.parquet", "parquet")


def test_auto_takes_the_format_from_the_extension(tmp_path: Path):
    names = ["a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet", "e.md"]
    for name in names:
        (tmp_path / name).write_text("x")
    files = text.list_inputs(PrepareConfig(name="n", inputs=(str(tmp_path),)))
    assert [file.format for file in files] == ["text", "jsonl", "jsonl", "parquet", "text"]
    files = text.list_inputs(PrepareConfig(name="n", inputs=(str(tmp_path),), format="text"))
    assert {file.format for file in files} == {"text"}


def test_a_file_that_two_inputs_name_is_read_once(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    config = PrepareConfig(name="n", inputs=(str(tmp_path / "*.txt"), str(tmp_path)))
    assert [file.name for file in text.list_inputs(config)] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.txt", "no/such/folder/*"])
def test_an_input_that_matches_nothing_is_refused(tmp_path: Path, pattern: str):
    with pytest.raises(InputError, match=r"matches no file; give a file, folder or glob"):
        text.list_inputs(PrepareConfig(name="n", inputs=(str(tmp_path / pattern),)))


def test_the_standard_library_is_named_alike_everywhere_and_read_from_here():
    files = text.list_inputs(PrepareConfig(name="n"))
    names = {file.name for file in files}
    assert f"{STDLIB}/asyncio/base_events.py" in names
    assert not [name for name in names if re.search(r"/(tests?|site-packages)/", name)]
    assert sum(file.size_bytes for file in files) > 5_000_000
    first = files[0]
    assert first.url.startswith(sysconfig.get_path("stdlib"))
    assert Path(first.url).stat().st_size == first.size_bytes
