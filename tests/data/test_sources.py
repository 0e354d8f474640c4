"""Rows of every kind of source: content, random access, and the place of each bad one."""

import json
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data.rows import BadRow
from jaxlm.data.sources import open_rows

ROWS = [{"text": f"row {i}", "n": i} for i in range(10)]


def everything(rows):
    return rows.read(0, len(rows))


@pytest.fixture
def source(request, tmp_path):
    kind = request.param
    if kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    elif kind == "two files":
        path = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        for file, part in zip(path, (ROWS[:4], ROWS[4:]), strict=True):
            file.write_text("\n".join(json.dumps(row) for row in part))
    elif kind == "directory":
        path = tmp_path / "parts"
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(ROWS[:7]), path / "0.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS[7:]), path / "1.parquet")
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


kinds = pytest.mark.parametrize("source", ["jsonl", "parquet", "two files", "directory", "datasets"], indirect=True)


@kinds
def test_rows_in_any_order(source):
    rows = open_rows(source)
    assert len(rows) == 10 and everything(rows) == ROWS
    assert [rows[i] for i in (7, 0, 9, 3)] == [ROWS[i] for i in (7, 0, 9, 3)]
    assert rows.read(2, 8) == ROWS[2:8]
    with pytest.raises(IndexError):
        rows[10]
    assert all(file.is_file() for file in rows.files) and rows.files


@kinds
def test_rows_go_to_another_process(source):
    rows = open_rows(source)
    assert rows[5] == ROWS[5]
    assert everything(pickle.loads(pickle.dumps(rows))) == ROWS


@pytest.mark.parametrize("source", ["parquet", "directory", "datasets"], indirect=True)
def test_schema_and_choice_of_columns(source):
    rows = open_rows(source)
    assert rows.columns == ("text", "n")
    assert everything(rows.only(["text"])) == [{"text": row["text"]} for row in ROWS]


def test_bad_rows_of_jsonl_are_located(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n\n{"text": "\xff"}\n{"text": "b"}\n')
    rows = open_rows(path)
    assert len(rows) == 5
    found = everything(rows)
    assert [row for row in found if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]
    bad = [str(row) for row in found if isinstance(row, BadRow)]
    assert bad == [
        f"{path}:2: invalid JSON: Expecting value at column 10",
        f"{path}:3: expected a JSON object, found list",
        f"{path}:5: not UTF-8: invalid start byte 0xff at byte 39",
    ]
    with pytest.raises(BadRow, match=r"bad\.jsonl:2"):
        rows[1]


def test_byte_order_mark(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert everything(open_rows(path)) == [{"text": "a"}]


def test_a_json_array_is_not_jsonl(tmp_path):
    path = tmp_path / "array.json"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match="expected JSONL"):
        open_rows(path)


def test_bad_utf8_in_parquet(tmp_path):
    data = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": strings}), path)
    good, bad, fine = everything(open_rows(path))
    assert (good, fine) == ({"text": "good"}, {"text": "fine"})
    assert isinstance(bad, BadRow) and str(bad).startswith(f"{path}: row 1: not UTF-8")


def test_not_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet file at all")
    with pytest.raises(ValueError, match=r"x\.parquet: not a Parquet file"):
        open_rows(tmp_path / "x.parquet")


TEXT = "one\ntwo\n\n \nthree\r\n%\nfour  \n"


@pytest.mark.parametrize(
    ("documents", "expected", "lines"),
    [
        ("file", [TEXT], [1]),
        ("line", ["one", "two", "three", "%", "four  "], [1, 2, 5, 6, 7]),
        ("blank", ["one\ntwo", "three\r\n%\nfour  "], [1, 5]),
        ("separator=%", ["one\ntwo\n\n \nthree", "four  "], [1, 7]),
    ],
)
def test_documents_of_a_text_file(tmp_path, documents, expected, lines):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    rows = open_rows(path, documents=documents)
    assert [row["text"] for row in everything(rows)] == expected
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}:{line}" for line in lines]


def test_bad_utf8_in_text_names_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ä\nb\n".encode() + b"c\xe4\nd\n")
    (bad,) = everything(open_rows(path))
    assert str(bad) == f"{path}:3: not UTF-8: invalid continuation byte 0xe4 at byte 6"


def test_empty_files(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        assert len(open_rows(tmp_path / name)) == 0


def test_kind_in_place_of_an_ending(tmp_path):
    (tmp_path / "fortunes").write_text("a\n%\nb\n")
    with pytest.raises(ValueError, match="--kind"):
        open_rows(tmp_path / "fortunes")
    assert len(open_rows(tmp_path / "fortunes", kind="text", documents="separator=%")) == 2
    with pytest.raises(ValueError, match="did you mean 'jsonl'"):
        open_rows(tmp_path / "fortunes", kind="jsonnl")
    with pytest.raises(ValueError, match="did you mean 'blank'"):
        open_rows(tmp_path / "fortunes", kind="text", documents="blanks")


def test_patterns_and_mixtures(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for row in everything(open_rows(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.txt").write_text("c")
    with pytest.raises(ValueError, match="several kinds"):
        open_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="split: only for a Hugging Face data set"):
        open_rows(tmp_path / "c.txt", split="train")
    with pytest.raises(ValueError, match="is for text files"):
        open_rows(tmp_path / "a.jsonl", documents="line")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_rows("data/rows.jsonl")  # not org/name of the hub
    with pytest.raises(ValueError, match="no source"):
        open_rows([])


def test_files_must_agree_on_their_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has the columns other"):
        open_rows(tmp_path)


def test_splits(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS[:6]), "test": datasets.Dataset.from_list(ROWS[6:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    rows = open_rows(tmp_path / "both", split="test")
    assert everything(rows) == ROWS[6:] and rows.where(1).endswith("both[test]: row 1")
    with pytest.raises(ValueError, match="several splits"):
        open_rows(tmp_path / "both")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        open_rows(tmp_path / "both", split="trian")
    for options in ({"subset": "small"}, {"documents": "line"}):
        with pytest.raises(ValueError, match="is for"):
            open_rows(tmp_path / "both", split="train", **options)


def test_a_name_on_the_hub_goes_to_datasets(monkeypatch):
    def load_dataset(name, subset):
        assert (name, subset) == ("org/name", "small")
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert everything(open_rows("org/name", subset="small")) == ROWS
