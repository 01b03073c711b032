"""The same dataset as jobs/prepare.py makes, by one process without Ray: what to compare with.

python bench/plain_prepare.py CONFIG OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from manta import spec
from manta.workloads import packing, text, tokenizer


def main(config_file: str, output: Path) -> None:
    """Read, clean, drop duplicates, split, train the tokenizer, pack, write Parquet."""
    config = spec.load(config_file, spec.PrepareConfig)
    documents: dict[str, str] = {}
    for file in text.list_inputs(config):
        for raw in text.read_texts(file, config.text_field):
            for piece in text.cut(text.clean(raw or ""), config.max_document_chars):
                if len(piece) >= config.min_document_chars:
                    documents[text.document_id(piece)] = piece
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for key in sorted(documents):
        held_out = text.is_validation(key, config.validation_fraction)
        splits["validation" if held_out else "train"].append((key, documents[key]))

    texts = tokenizer.first_bytes(
        (document for _, document in splits["train"]), config.tokenizer.train_max_bytes
    )
    tokenizer.write_folder(tokenizer.train(texts, config.tokenizer), str(output / "tokenizer"))
    trained, end_of_text = tokenizer.load(str(output / "tokenizer"))
    table = packing.spaces(trained)
    for split, rows in splits.items():
        rate = config.tokenizer.loose_space_rate if split == "train" else 0.0
        encoded = packing.encode((document for _, document in rows), trained, end_of_text)
        tokens = [packing.loosen(ids, table, rate) for ids in encoded]
        blocks = packing.pack(tokens, config.sequence_length)
        _write(output / f"{split}.parquet", packing.parquet_bytes(packing.blocks_table(blocks)))
        print(f"{split}: {len(rows)} documents, {blocks.size} tokens")
    held_out_text = packing.parquet_bytes(packing.documents_table(splits["validation"]))
    _write(output / "validation_text.parquet", held_out_text)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
