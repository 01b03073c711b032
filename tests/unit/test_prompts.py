"""Prompts: how files become rows and shards, and which runs are the same."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import InputError
from manta.spec import GenerateConfig
from manta.workloads import generate
from manta.workloads.prompts import cut, read_prompts

ROWS = [{"id": i, "prompt": f"prompt {i}"} for i in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_shards_hold_every_row_once_in_order():
    shards = cut(ROWS, 4)
    assert [row for shard in shards for row in shard.rows] == ROWS
    assert [shard.start for shard in shards] == [0, 4, 8]


def test_shard_names_follow_from_content_and_position_alone():
    names = [shard.name for shard in cut(ROWS, 4)]
    assert [shard.name for shard in cut([dict(row) for row in ROWS], 4)] == names
    changed = [*ROWS[:5], {"id": 5, "prompt": "other"}, *ROWS[6:]]
    assert [a == b.name for a, b in zip(names, cut(changed, 4), strict=True)] == [
        True,
        False,
        True,
    ]
    twins = cut([ROWS[0]] * 4, 2)
    assert twins[0].name != twins[1].name


def test_parquet_and_jsonl_of_the_same_rows_are_the_same_prompts(tmp_path):
    jsonl = read_prompts(write(tmp_path / "p.jsonl", ROWS), "prompt")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    parquet = read_prompts(str(tmp_path / "p.parquet"), "prompt")
    assert jsonl.rows == parquet.rows == tuple(ROWS)


def test_a_glob_reads_its_files_in_order_of_their_names(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[5:])
    write(tmp_path / "a.jsonl", ROWS[:5])
    assert read_prompts(str(tmp_path / "*.jsonl"), "prompt").rows == tuple(ROWS)


def test_lists_of_messages_are_chat_and_strings_are_not(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    chat = read_prompts(write(tmp_path / "c.jsonl", [{"prompt": messages}]), "prompt")
    assert chat.is_chat
    assert not read_prompts(write(tmp_path / "p.jsonl", ROWS), "prompt").is_chat


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [{"role": "user", "content": "x"}]}, ":2: .*mixed"),
        ({"prompt": 3}, ":2: `prompt` is neither text nor chat messages"),
        ({"prompt": [{"who": "user"}]}, ":2: `prompt` is neither text nor chat messages"),
        ({"prompt": None}, ":2: `prompt` is empty"),
        ({}, ":2: no field `prompt`"),
    ],
)
def test_a_row_without_a_usable_prompt_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", [ROWS[0], row]), "prompt")


@pytest.mark.parametrize("junk", [b"\xff\xfe\x00", b"{" * 100_000, b"NaN", b'"text"', b"[[[["])
def test_a_line_that_is_no_json_object_is_named(tmp_path, junk):
    (tmp_path / "p.jsonl").write_bytes(junk)
    with pytest.raises(InputError, match=r"not JSON|not a JSON object"):
        read_prompts(str(tmp_path / "p.jsonl"), "prompt")


def test_a_cut_parquet_file_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_prompts(str(tmp_path / "p.parquet"), "prompt")


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"max_tokens": 7}},
        {"rows_per_shard": 3},
        {"engine_kwargs_passthrough": {"dtype": "float32"}},
    ],
)
def test_other_sampling_shards_or_engine_make_another_run(tmp_path, change):
    prompts = read_prompts(write(tmp_path / "p.jsonl", ROWS), "prompt")
    base = {"name": "n", "model": "m", "prompts": "p.jsonl"}

    def version(**changes):
        return generate._version(GenerateConfig(**{**base, **changes}), prompts, "content")

    assert version(**change) != version()
    assert version(name="other", concurrency=2, batch_size=1) == version()
