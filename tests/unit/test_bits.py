"""Bits per byte: the arithmetic that the scores rest on."""

import math
from types import SimpleNamespace

import pytest
import torch

from manta.workloads import bits

VOCAB = 8


class Uniform(torch.nn.Module):
    """Gives every token the same probability."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))


class Successor(Uniform):
    """Is certain that token t is followed by t + 1, and knows nothing but the last token."""

    def forward(self, input_ids):
        follower = torch.nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB)
        return SimpleNamespace(logits=1000.0 * follower.float())


def score(model, documents, **kwargs):
    defaults = {"start_token": 0, "length": 4, "stride": 3, "batch_size": 2}
    return bits.model_bits(model, documents, **{**defaults, **kwargs})


@pytest.mark.parametrize("num_tokens", range(0, 40))
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 4), (4, 3), (8, 1), (7, 5)])
def test_windows_score_each_token_exactly_once_and_never_exceed_the_length(
    num_tokens, length, stride
):
    found = bits.windows(num_tokens, length, stride)
    scored = [t for w in found for t in range(w.end - w.num_scored, w.end)]
    assert scored == list(range(num_tokens))
    assert all(w.start >= 0 and w.end - w.start <= length for w in found)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token():
    documents = [[1, 2, 3], [0] * 11, [7], list(range(8)) * 3]
    expected = [math.log2(VOCAB) * len(tokens) for tokens in documents]
    assert score(Uniform(), documents) == pytest.approx(expected)


def test_a_model_that_is_right_about_every_token_needs_no_bits():
    counting = [(1 + i) % VOCAB for i in range(21)]
    assert score(Successor(), [counting, counting[:2]]) == pytest.approx([0, 0])


def test_one_wrong_token_is_charged_to_its_own_document_once():
    counting = [(1 + i) % VOCAB for i in range(21)]
    wrong = counting.copy()
    wrong[10:] = [(token + 1) % VOCAB for token in wrong[10:]]
    right_bits, wrong_bits = score(Successor(), [counting, wrong])
    assert right_bits == pytest.approx(0)
    assert wrong_bits == pytest.approx(1000 / math.log(2))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_does_not_change_the_scores(batch_size):
    documents = [[3, 1, 4, 1, 5], [2, 6], [5, 3, 5] * 9]
    torch.manual_seed(0)
    embed = torch.nn.Embedding(VOCAB, VOCAB)
    model = Uniform()
    model.forward = lambda input_ids: SimpleNamespace(logits=embed(input_ids).detach())
    alone = [score(model, [tokens])[0] for tokens in documents]
    assert score(model, documents, batch_size=batch_size) == pytest.approx(alone)


def test_the_unigram_model_smooths_counts_by_one():
    counts = [3, 0, 0, 1]  # probabilities 4/8, 1/8, 1/8, 2/8
    assert bits.unigram_bits([[0, 1], [3]], counts) == pytest.approx(1 + 3 + 2)


def test_xz_squeezes_what_repeats():
    assert bits.xz_bits(b"spam and eggs " * 1000) < 8 * 200
