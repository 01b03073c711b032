"""The embedding model, and what is found for a question; no cluster."""

from pathlib import Path

import numpy as np
import pytest

from manta.errors import InputError
from manta.spec.apps import EmbedderConfig, Generator, RagArgs

embeddings = pytest.importorskip("manta.serving.embeddings")
rag = pytest.importorskip("manta.serving.rag")

ROOT = Path(__file__).parents[2]


def encode(*texts):
    return embeddings.HashedNgrams(EmbedderConfig()).eval()(list(texts)).numpy()


def test_texts_that_share_words_lie_closer_than_others():
    question, near, far = encode(
        "How do I revoke an API key?",
        "manta keys revoke ends an API key within two seconds.",
        "Prices of virtual machines are listed for three clouds.",
    )
    assert question @ near > 2 * abs(question @ far)


def test_replicas_with_one_seed_agree_and_vectors_have_length_one():
    one, two = encode("the same text"), encode("the same text")
    assert np.array_equal(one, two)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert not encode("…").any()  # no words


PAGES = {
    "keys.md": "A secret is shown once. keys rotate makes a new one; keys revoke ends it.",
    "prices.md": "List prices of instances come from the clouds; refresh fetches them.",
    "traps.md": "HAProxy does not start where the hard limit of open files is low.",
    "check.md": "Each rule names file and line; a misspelt key in a cluster file is an error.",
    "jobs.md": "A job is retried by cause; a controller that is killed is started again.",
}


@pytest.mark.parametrize(
    ("question", "page"),
    [
        ("How do I rotate and revoke API keys?", "keys.md"),
        ("Where does the price of an instance come from?", "prices.md"),
        ("What does HAProxy need of open files?", "traps.md"),
        ("Which rule finds misspelt keys in cluster files?", "check.md"),
        ("What happens to jobs when the controller is killed?", "jobs.md"),
    ],
)
def test_the_page_that_answers_a_question_is_the_closest(question, page, tmp_path):
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    passages = rag.read_passages(str(tmp_path), 600)
    near = encode(*(passage.text for passage in passages)) @ encode(question)[0]
    assert passages[int(np.argmax(near))].source == f"{page}#1"


def test_documents_are_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    text = "one\n\ntwo two\n\n" + "three " * 40 + "\n\nfour"
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.bin").write_bytes(b"\xff")
    passages = rag.read_passages(str(tmp_path), 50)
    assert passages[0].text == "one\n\ntwo two"
    assert [p.source for p in passages] == [f"a.md#{i + 1}" for i in range(len(passages))]
    assert all(len(p.text) <= 50 for p in passages)
    assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())


def test_a_folder_without_documents_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no \.md or \.txt files; put the documents there"):
        rag.read_passages(str(tmp_path), 600)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"num_passage": 3}, "num_passage: Extra inputs"),
        ({"generator": {"modell": "x"}}, "generator.modell: Extra"),
        ({"guard": {"keys": "maybe"}}, "guard.keys: Input should be"),
    ],
)
def test_a_wrong_argument_is_one_line(args, what):
    with pytest.raises(InputError, match=what):
        rag.build_app(args)


def test_the_generators_key_is_the_named_files_else_the_environments_else_the_owners(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert rag.api_key(Generator()) == "none"
    (tmp_path / "api_key").write_text("owner\n")
    assert rag.api_key(Generator()) == "owner"
    monkeypatch.setenv("OPENAI_API_KEY", "given")
    assert rag.api_key(Generator()) == "given"
    (tmp_path / "own").write_text("own\n")
    assert rag.api_key(Generator(api_key_file=str(tmp_path / "own"))) == "own"
    with pytest.raises(InputError, match="cannot be read"):
        rag.api_key(Generator(api_key_file=str(tmp_path / "nowhere")))


def test_the_shipped_arguments_are_understood():
    import yaml

    from manta.spec.apps import EmbeddingsArgs

    for name, kind in (("embeddings", EmbeddingsArgs), ("rag", RagArgs)):
        document = yaml.safe_load((ROOT / "serve_apps" / f"{name}.yaml").read_text())
        (app,) = document["applications"]
        kind.model_validate(app["args"])
