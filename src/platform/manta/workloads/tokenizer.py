"""The byte-level BPE tokenizer, trained or loaded, as a folder that transformers and vLLM read."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from manta import storage
from manta.errors import InputError
from manta.spec import TokenizerConfig

END_OF_TEXT = "<|endoftext|>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""What a tokenizer's folder may hold that matters; weights beside it are left where they are."""

# A message of any role but the assistant's is shown as the user's: there is no system token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{ASSISTANT}' if message['role'] == 'assistant' else '{USER}' }}}}\n"
    f"{{{{ message['content'] }}}}{END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}\n{{% endif %}}"
)


def train(texts: Iterable[str], config: TokenizerConfig) -> dict[str, bytes]:
    """Train on `texts`; the same texts in the same order give the same files, name → content.

    Raises:
        InputError: the texts do not have enough distinct pieces for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size is {config.vocab_size:,}, but the training documents"
            f" yield only {size:,} tokens",
            f"set it to at most {size}, or add documents",
        )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(_SETTINGS),
        "special_tokens_map.json": _json(_SPECIAL_TOKENS_MAP),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


_SPECIAL_TOKENS_MAP = {
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "additional_special_tokens": [USER, ASSISTANT, END],
}
_SETTINGS = _SPECIAL_TOKENS_MAP | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first texts, up to `max_bytes` of UTF-8 in all; the first one whatever its size."""
    num_bytes = 0
    for text in texts:
        if num_bytes and num_bytes + len(text.encode()) > max_bytes:
            return
        num_bytes += len(text.encode())
        yield text


def read_folder(url: str) -> dict[str, bytes]:
    """The files of a tokenizer's folder, checked. Raises InputError if it cannot be used."""
    present = {name.rpartition("/")[2]: name for name in storage.glob(url)}
    if "tokenizer.json" not in present:
        raise InputError(
            f"tokenizer.load: {url} has no tokenizer.json",
            "give a folder that a tokenizer's save_pretrained wrote",
        )
    files = {name: storage.read_bytes(present[name]) for name in FILES if name in present}
    tokenizer = parse(files["tokenizer.json"], url)
    end_of_text_id(tokenizer, files, url)
    return files


def write_folder(files: dict[str, bytes], url: str) -> None:
    """Write a tokenizer's files under `url`."""
    for name, data in files.items():
        storage.write_bytes(storage.join(url, name), data)


@functools.lru_cache(maxsize=1)  # one worker process encodes many shards
def load(url: str) -> tuple[Tokenizer, int]:
    """The tokenizer in folder `url`, ready to encode plain text, and its end-of-text id.

    Text that happens to spell a special token is encoded as the plain text it is.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: storage.read_bytes(storage.join(url, name)) for name in names}
    tokenizer = parse(files["tokenizer.json"], url)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, end_of_text_id(tokenizer, files, url)


def parse(data: bytes, url: str) -> Tokenizer:
    """The tokenizer in `tokenizer.json` of folder `url`. Raises InputError if it is none."""
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise InputError(
            f"tokenizer.load: {url}/tokenizer.json does not load ({reason})"
        ) from None


def end_of_text_id(tokenizer: Tokenizer, files: dict[str, bytes], url: str) -> int:
    """Id of the token that ends a document. Raises InputError if the folder names none."""
    try:
        named = json.loads(files.get("tokenizer_config.json", b"{}")).get("eos_token")
    except (ValueError, AttributeError):
        raise InputError(f"tokenizer.load: {url}/tokenizer_config.json is not JSON") from None
    token = named.get("content") if isinstance(named, dict) else named
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise InputError(
            f"tokenizer.load: {url} names no eos_token that its vocabulary has",
            'add "eos_token" to its tokenizer_config.json',
        )
    return int(number)


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id, special and added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
