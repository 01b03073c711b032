"""The tokenizer, and packing its tokens into blocks."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from manta.errors import InputError
from manta.spec import TokenizerConfig
from manta.workloads import packing, tokenizer
from manta.workloads.tokenizer import ASSISTANT, END, END_OF_TEXT, USER

TEXTS = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py")]
CONFIG = TokenizerConfig(vocab_size=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.write_folder(tokenizer.train(TEXTS, CONFIG), url)
    return url


@pytest.fixture(scope="module")
def transformers_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_same_texts_give_the_same_files_byte_for_byte():
    assert tokenizer.train(TEXTS, CONFIG) == tokenizer.train(iter(TEXTS), CONFIG)


def test_any_text_comes_back_from_its_tokens(folder):
    trained, _ = tokenizer.load(folder)
    for text in [*TEXTS, "tab\tnew\n\nline  two blanks", "é 漢字 😀 \u0301", f"a{END_OF_TEXT}b"]:
        ids = trained.encode(text, add_special_tokens=False).ids
        assert trained.decode(ids, skip_special_tokens=False) == text


def test_some_training_words_have_their_space_apart_and_the_text_stays_the_same(folder):
    trained, end_of_text = tokenizer.load(folder)
    table = packing.spaces(trained)
    (plain,) = packing.encode(TEXTS[:1], trained, end_of_text)
    loose = packing.loosen(plain, table, 0.2)
    assert trained.decode(list(loose[:-1])) == TEXTS[0]
    words = sum(table.bare[plain] >= 0)
    assert 0.1 * words < len(loose) - len(plain) < 0.3 * words
    lone_space = trained.encode("def ", add_special_tokens=False).ids[-1]
    assert sum(loose == lone_space) - sum(plain == lone_space) == len(loose) - len(plain)
    assert (packing.loosen(plain, table, 0.2) == loose).all()
    assert (packing.loosen(plain, table, 0.0) == plain).all()


def test_text_that_spells_a_special_token_is_not_taken_for_one(folder):
    trained, end_of_text = tokenizer.load(folder)
    ids = trained.encode(f"a {END_OF_TEXT} b {USER}", add_special_tokens=False).ids
    assert end_of_text not in ids
    assert trained.token_to_id(USER) not in ids


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused():
    with pytest.raises(InputError, match=r"vocab_size is 5,000.*yield only \d+ tokens; set it to"):
        tokenizer.train(["abc abc"], TokenizerConfig(vocab_size=5000))


def test_transformers_loads_the_folder_with_its_special_tokens(transformers_tokenizer):
    loaded = transformers_tokenizer
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (END_OF_TEXT,) * 3
    assert len(loaded) == CONFIG.vocab_size
    assert {USER, ASSISTANT, END} <= set(loaded.all_special_tokens)


def test_transformers_and_the_bare_library_encode_alike(folder, transformers_tokenizer):
    trained, _ = tokenizer.load(folder)
    expected = trained.encode(TEXTS[0], add_special_tokens=False).ids
    assert transformers_tokenizer(TEXTS[0])["input_ids"] == expected
    assert transformers_tokenizer.decode(expected) == TEXTS[0]


def test_the_chat_template_marks_who_speaks(transformers_tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]
    text = transformers_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == (f"{USER}\ns{END}\n{USER}\nhi{END}\n{ASSISTANT}\nyes{END}\n{ASSISTANT}\n")
    ids = transformers_tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[0] == transformers_tokenizer.convert_tokens_to_ids(USER)


def test_training_text_ends_at_the_cap_but_is_never_empty():
    assert list(tokenizer.first_bytes(["abc", "de", "f"], 5)) == ["abc", "de"]
    assert list(tokenizer.first_bytes(["éé", "a"], 1)) == ["éé"]


def test_a_written_folder_can_be_loaded_again_unchanged(folder):
    assert tokenizer.read_folder(folder) == tokenizer.train(TEXTS, CONFIG)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b"{}", "does not load"),
        ("tokenizer.json", b"\xff", "does not load"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"{}", "names no eos_token"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "names no eos_token that its"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_refused(folder, tmp_path, file, content, message):
    files = tokenizer.read_folder(folder) | {file: content}
    tokenizer.write_folder({name: data for name, data in files.items() if data}, str(tmp_path))
    with pytest.raises(InputError, match=message):
        tokenizer.read_folder(str(tmp_path))


def test_an_eos_token_written_as_an_object_is_understood(folder, tmp_path):
    settings = json.dumps({"eos_token": {"content": END}}).encode()
    files = tokenizer.read_folder(folder) | {"tokenizer_config.json": settings}
    tokenizer.write_folder(files, str(tmp_path))
    loaded, end = tokenizer.load(str(tmp_path))
    assert end == loaded.token_to_id(END)


def test_documents_are_closed_and_packed_end_to_end(folder):
    trained, end_of_text = tokenizer.load(folder)
    tokens = list(packing.encode(TEXTS, trained, end_of_text))
    blocks = packing.pack(tokens, 16)
    stream = blocks.reshape(-1).tolist()
    assert stream == np.concatenate(tokens)[: len(stream)].tolist()
    assert sum(map(len, tokens)) - len(stream) < 16
    assert trained.decode(stream[: len(tokens[0]) - 1]) == TEXTS[0]
    assert stream[len(tokens[0]) - 1] == end_of_text


def test_texts_of_any_number_and_size_are_all_encoded(folder, monkeypatch):
    trained, end_of_text = tokenizer.load(folder)
    monkeypatch.setattr(packing, "ENCODE_BATCH_BYTES", 10)
    texts = ["a" * number for number in range(1, 30)]
    decoded = [trained.decode(ids[:-1]) for ids in packing.encode(texts, trained, end_of_text)]
    assert decoded == texts


def test_packing_nothing_gives_no_blocks():
    assert packing.pack([], 8).shape == (0, 8)
    assert packing.pack([np.arange(7, dtype=np.int32)], 8).shape == (0, 8)


def test_a_document_that_comes_several_times_is_kept_once_whatever_the_order():
    rows = [{"id": f"{number:02d}", "text": str(number)} for number in range(20)] * 3
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        found = packing.unique(packing.pa.Table.from_pylist(rows))
        assert found.column("id").to_pylist() == [f"{number:02d}" for number in range(20)]


def test_blocks_come_back_from_parquet_as_int32_lists():
    blocks = np.arange(3000 * 8, dtype=np.int32).reshape(3000, 8)
    data = packing.parquet_bytes(packing.blocks_table(blocks))
    column = packing.read_parquet(data).column("input_ids")
    assert column.combine_chunks().flatten().to_numpy().reshape(3000, 8).tolist() == (
        blocks.tolist()
    )
    assert data == packing.parquet_bytes(packing.blocks_table(blocks))
