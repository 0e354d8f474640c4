"""Fill-in-the-middle against the published rule, and the marks of tokenizers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxlm.data.fim import Fim
from tests.data.tiny import tokenizer

P, S, M = 100, 101, 102
IDS = np.arange(10)


def fim(**options):
    return Fim(prefix=P, suffix=S, middle=M, **options)


def test_orders():
    """github.com/bigcode-project/Megatron-LM, megatron/data/gpt_dataset.py: permute()."""
    cuts = [0.0, 0.7, 0.3]  # places 7 and 3 of 0..10
    psm = fim(spm_rate=0.5)(IDS, np.array([*cuts, 0.6]))
    assert psm.tolist() == [P, 0, 1, 2, S, 7, 8, 9, M, 3, 4, 5, 6] and psm.dtype == np.int32
    spm = fim(spm_rate=0.5)(IDS, np.array([*cuts, 0.4]))
    assert spm.tolist() == [P, S, 7, 8, 9, M, 0, 1, 2, 3, 4, 5, 6]


def test_ends_stay():
    made = fim(bos=0, eos=9, spm_rate=0)(IDS, np.array([0, 0.0, 0.999, 0.5]))
    assert made.tolist() == [0, P, S, M, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert fim(bos=0, eos=0)(np.array([0]), np.array([0, 0.5, 0.5, 0.9])).tolist() == [0, P, S, M]


@pytest.mark.parametrize("spm_rate", [0, 1])
def test_any_cut_gives_the_text_back(spm_rate):
    one = fim(eos=9, spm_rate=spm_rate)
    cuts = set()
    for draw in one.draws(seed=3, count=2000):
        made = one(IDS, draw).tolist()
        assert made[0] == P and made[-1] == 9
        at_suffix, at_middle = made.index(S), made.index(M)
        prefix, suffix, middle = made[1:at_suffix], made[at_suffix + 1 : at_middle], made[at_middle + 1 : -1]
        assert not (spm_rate and prefix)  # SPM has it with the middle
        assert prefix + middle + suffix == list(range(9))
        cuts.add((len(prefix), len(suffix)))
    assert len(cuts) == (10 if spm_rate else 55)  # every choice of two of the 10 places


def test_rates():
    drawn = fim().draws(0, 10_000)
    assert abs(fim(rate=0.3).applies(drawn).mean() - 0.3) < 0.02
    assert not fim(rate=0).applies(drawn).any() and fim(rate=1).applies(drawn).all()
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        fim(rate=1.5)


def test_marks_of_a_tokenizer():
    made = tokenizer()
    found = Fim.of(made, rate=0.9)
    names = [made.convert_ids_to_tokens(i) for i in (found.prefix, found.suffix, found.middle)]
    assert names == ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    assert found.eos == made.eos_token_id and found.rate == 0.9
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="has no fill-in-the-middle tokens"):
        Fim.of(bare)
