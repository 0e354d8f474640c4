"""From a file of rows to a cache and back; what makes a cache stale, foreign or damaged, and which rows are bad."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.data.cache import fingerprint, open_cache
from jaxlm.data.formats import FormatConfig
from jaxlm.data.prepare import PrepareConfig, load_tokenizer, make_config, prepare, read_config
from tests.data.tiny import cache, tokenizer

TEXTS = [f"Text number {i}: " + "x" * (i % 13) for i in range(1300)]


@pytest.fixture
def place(tmp_path):
    """A tokenizer and a file of rows."""
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def config(place, **options):
    return PrepareConfig(source=(str(place / "rows.jsonl"),), tokenizer=str(place / "tokenizer"), **options)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_round_trip(place):
    steps = []
    made = prepare(config(place), place / "out", progress=lambda *step: steps.append(step))
    real = tokenizer()
    assert len(made) == 1300 and made.header.dtype == "uint16" and steps[-1] == (1300, 1300)
    for i in (0, 1, 511, 512, 1299, -1):
        ids, mask = made[i]
        assert real.decode(ids) == TEXTS[i] + "<|endoftext|>" and mask.all()
    assert made.lengths.sum() == made.header.tokens == made.header.loss_tokens == len(made.tokens)
    assert made.header.longest == max(made.lengths) and made.header.rows["used"] == 1300
    made.check()
    assert not [file for file in place.iterdir() if file.name.startswith(".")]


def test_mask_bits(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    masks = [rng.random(n) < 0.5 for n in lengths]
    made = cache(tmp_path / "c", [np.zeros(n, np.int32) for n in lengths], masks)
    assert all(np.array_equal(made[i][1], mask) for i, mask in enumerate(masks))
    assert made.header.loss_tokens == sum(mask.sum() for mask in masks)


def test_large_vocabularies_need_four_bytes(tmp_path):
    made = cache(tmp_path / "a", [[70_000, 1]])
    assert made.header.dtype == "uint32" and made[0][0].tolist() == [70_000, 1]
    assert cache(tmp_path / "b", [[65_535]]).header.dtype == "uint16"
    assert cache(tmp_path / "c", [[65_536]])[0][0].tolist() == [65_536]


@pytest.mark.slow
def test_processes_change_nothing(place):
    prepare(config(place), place / "one")
    prepare(config(place), place / "two", workers=2)
    assert contents(place / "one") == contents(place / "two")


def test_made_once(place):
    prepare(config(place), place / "out")
    before = (place / "out" / "tokens.bin").stat().st_mtime_ns
    prepare(config(place), place / "out")
    assert (place / "out" / "tokens.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"cache of other data or options.*--overwrite"):
        prepare(config(place, max_bad_rows=0.5), place / "out")
    with pytest.raises(ValueError, match=r"another format: eos=True \(now False\)"):
        prepare(config(place, eos=False), place / "out")
    assert prepare(config(place, eos=False), place / "out", overwrite=True).header.tokens < 1300 * 30
    assert not open_cache(place / "out").header.format.eos


def test_another_tokenizer(place):
    prepare(config(place), place / "out")
    open_cache(place / "out", tokenizer=load_tokenizer(str(place / "tokenizer")))
    for other in (tokenizer(template=None), tokenizer(merges=[("e", "r")])):
        with pytest.raises(ValueError, match=r"made with another tokenizer: .*tokenizer, fingerprint .*--overwrite"):
            open_cache(place / "out", tokenizer=other)
    with pytest.raises(ValueError, match="another format: name='text'"):
        open_cache(place / "out", format=FormatConfig(name="prompt"))


def test_a_fingerprint_is_that_of_the_files_and_not_of_the_last_call(place):
    made, saved = tokenizer(), load_tokenizer(str(place / "tokenizer"))
    before = fingerprint(saved)
    assert fingerprint(made) == before
    saved.backend_tokenizer.enable_truncation(2)
    saved.backend_tokenizer.enable_padding()
    assert fingerprint(saved) == before
    saved.eos_token = "<|im_end|>"
    assert fingerprint(saved) != before


def test_stale(place):
    prepare(config(place), place / "out")
    rows = place / "rows.jsonl"
    os.utime(rows, (1, 1))  # touched, but as it was
    open_cache(place / "out")
    data = rows.read_bytes()
    rows.write_bytes(data.replace(b"number", b"mumber"))  # the same length
    with pytest.raises(ValueError, match=r"is stale: .*rows\.jsonl has changed since it was made\. Prepare it again"):
        open_cache(place / "out")
    rows.write_bytes(data + b'{"text": "one more"}\n')
    with pytest.raises(ValueError, match="has changed from"):
        open_cache(place / "out")
    open_cache(place / "out", check_sources=False)
    rows.unlink()  # a cache stands for itself
    assert len(open_cache(place / "out")) == 1300


def test_damaged(place):
    prepare(config(place), place / "out")
    tokens = place / "out" / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(ValueError, match="checksum differs"):
        open_cache(place / "out").check()
    tokens.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"tokens\.bin: expected \d+ bytes, found \d+ bytes"):
        open_cache(place / "out")
    header = place / "out" / "header.json"
    value = json.loads(header.read_text())
    header.write_text(json.dumps(value | {"version": 2}))
    with pytest.raises(ValueError, match="version 2, and this jaxlm reads version 1"):
        open_cache(place / "out")
    header.write_text(json.dumps({"magic": "other"}))
    with pytest.raises(ValueError, match="not that of a token cache"):
        open_cache(place / "out")
    with pytest.raises(FileNotFoundError, match="is no token cache"):
        open_cache(place / "nothing")


def spoil(place, lines):
    rows = [json.dumps({"text": text}) for text in TEXTS[:100]]
    for line in lines:
        rows[line - 1] = {7: '{"text": 5}', 8: "{"}.get(line, '{"text": ')
    (place / "rows.jsonl").write_text("\n".join(rows) + "\n")


def test_bad_rows_are_an_error(place):
    spoil(place, [7, 8])
    with pytest.raises(ValueError, match=r"2 of the first 100 rows \(of 100\) are bad") as error:
        prepare(config(place), place / "out")
    assert f"{place}/rows.jsonl:7: column 'text' is int, expected text" in str(error.value)
    assert f"{place}/rows.jsonl:8: invalid JSON" in str(error.value)
    assert not (place / "out").exists()


def test_bad_rows_up_to_a_share(place):
    spoil(place, [3, 7, 8])
    with pytest.raises(ValueError, match=r"at most 2\.0000%"):
        prepare(config(place, max_bad_rows=0.02), place / "out")
    made = prepare(config(place, max_bad_rows=0.03), place / "out")
    assert made.header.rows == {"read": 100, "used": 97, "empty": 0, "bad": 3, "merged": 0}
    listed = [json.loads(line) for line in (place / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [bad["where"] for bad in listed] == [f"{place}/rows.jsonl:{line}" for line in (3, 7, 8)]
    spoil(place, range(1, 50))
    with pytest.raises(ValueError, match="and 44 more"):
        prepare(config(place), place / "many")
    with pytest.raises(ValueError, match="expected a share of the rows"):
        config(place, max_bad_rows=5)


def test_empty_rows_are_counted(place):
    (place / "rows.jsonl").write_text('{"text": ""}\n{"text": "a"}\n')
    assert prepare(config(place), place / "out").header.rows["empty"] == 1
    (place / "rows.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no examples, of 1 rows"):
        prepare(config(place), place / "none")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unknown_column_is_an_error_whatever_may_be_bad(place, workers):
    (place / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: column 'id' not known"):
        prepare(config(place, max_bad_rows=1), place / "out", workers=workers)


KILLED = """
import os, signal, sys
from jaxlm.data import prepare as work
from jaxlm.data.prepare import PrepareConfig
def progress(done, total):
    if done > 600:
        os.kill(os.getpid(), signal.SIGKILL)
config = PrepareConfig(source=(sys.argv[1] + "/rows.jsonl",), tokenizer=sys.argv[1] + "/tokenizer")
work.prepare(config, sys.argv[1] + "/out", overwrite=True, progress=progress)
"""


def test_a_killed_run_leaves_the_old_cache(place):
    prepare(config(place, eos=False), place / "out")
    before = contents(place / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, place], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert contents(place / "out") == before
    prepare(config(place), place / "out", overwrite=True)
    assert open_cache(place / "out").header.format.eos
    assert not [file for file in place.iterdir() if file.name.startswith(".")]


def test_a_config_file(place):
    file = place / "data.yaml"
    file.write_text("data:\n  source: rows.jsonl\n  tokenizer: t\n  columns: {text: content}\n  max_bad_rows: 0.1\n")
    made = read_config(file, tokenizer="other")
    assert made.source == ("rows.jsonl",) and made.tokenizer == "other"
    assert made.columns == (("text", "content"),) and made.max_bad_rows == 0.1
    for text, said in (
        ("source: a\ntokenizr: t", "unknown field 'tokenizr' .did you mean 'tokenizer'"),
        ("source: a", "'tokenizer' is missing"),
        ("source: a\ntokenizer: t\neos: 3", "eos=3: expected bool"),
        ("- a", "expected names and values, found list"),
        ("a: [", "data.yaml"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_config(file)
    with pytest.raises(ValueError, match="source: unknown field 'spilt'"):
        make_config({"source": "a", "tokenizer": "t", "spilt": "train"}, "source")
