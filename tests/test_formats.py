"""Files of rows: a row is what its own line says, in every format, and corpora and tasks read it by the same rules."""

import csv
import datetime
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from pytest_lmeval import Choices, Rows, Task, corpus
from pytest_lmeval.data import _formats as formats
from pytest_lmeval.errors import CorpusError
from pytest_lmeval.scoring._fewshot import rows_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
DATES = (
    st.dates().map(str) | st.datetimes().map(str) | st.sampled_from(["2024-03-01", "12:30", "1e5", "007", "NaN", "true", ""])
)
NUMBERS = st.integers() | st.integers(2**53, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
VALUES = st.recursive(
    TEXT | DATES | NUMBERS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), min_size=1, max_size=5)


def exactly(rows):
    """Rows with the types of their values, since 1 == 1.0 == True in Python."""
    return [json.dumps({name: value for name, value in row.items() if value is not None}) for row in rows]


def read(content, form="jsonl", folder=None, **options):
    file = folder / f"rows.{form}"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(Rows(f"{form}:{file}", **options).read())


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    form=st.sampled_from(["jsonl", "json"]),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    last=st.booleans(),
    bom=st.booleans(),
    packed=st.booleans(),
    escaped=st.booleans(),
)
def test_a_row_is_what_its_own_line_says(tmp_path_factory, rows, form, end, last, bom, packed, escaped):
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    text = f"[{f',{end}'.join(lines)}]" if form == "json" else end.join(lines)
    content = (text + end * last).encode("utf-8-sig" if bom else "utf-8")
    found = read(gzip.compress(content) if packed else content, form, tmp_path_factory.mktemp("rows"))
    assert exactly(found) == exactly(rows)


def test_a_date_an_integer_and_a_long_number_are_not_changed_by_other_rows(tmp_path):
    lines = ['{"t": "2024-03-01", "n": 1}', '{"t": "2024-03-02", "n": 9007199254740993}', '{"t": "2024-03-03", "n": 2.5}']
    found = read("\n".join(lines), folder=tmp_path)
    assert [repr(row["n"]) for row in found] == ["1", "9007199254740993", "2.5"]
    assert [row["t"] for row in found] == ["2024-03-01", "2024-03-02", "2024-03-03"]
    for line, row in zip(lines, found, strict=True):
        assert exactly(read(line, folder=tmp_path)) == exactly([row])


def test_fields_that_other_rows_have_are_missing_and_not_null_even_in_nested_objects(tmp_path):
    assert read('{"a": {"x": 1}}\n{"b": {"y": 2}, "a": null}\n', folder=tmp_path) == [{"a": {"x": 1}}, {"b": {"y": 2}}]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(TEXT | DATES, min_size=2, max_size=2), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_every_value_of_csv_is_the_text_that_it_is(tmp_path_factory, cells, end, packed):
    written = io.StringIO()
    csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["t", "n"], *cells])
    content = written.getvalue().encode("utf-8-sig")
    found = read(gzip.compress(content) if packed else content, "csv", tmp_path_factory.mktemp("rows"))
    assert found == [{"t": t, "n": n} for t, n in cells]


def test_a_document_in_csv_may_be_long_and_have_several_lines(tmp_path):
    long = 'a line, and "quotes"\n' * 20_000
    found = read('text\n"' + long.replace('"', '""') + '"\n\nshort\n""\n', "csv", tmp_path)
    assert found == [{"text": long}, {"text": "short"}, {"text": ""}]


def test_parquet_is_streamed_with_its_types(tmp_path):
    values = [{"n": 2**60 + number, "t": "2024-03-01", "l": [number], "d": datetime.date(2024, 3, 1)} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "rows.parquet")
    assert list(Rows(f"parquet:{tmp_path}/rows.parquet").read()) == values
    stream = formats.rows(tmp_path / "rows.parquet", "parquet")
    assert next(stream)[0].endswith("rows.parquet, row 0")
    assert len(list(stream)) == 999


@pytest.mark.parametrize(
    ("form", "content", "says"),
    [
        ("jsonl", "", "holds no row"),
        ("jsonl", "\n \n", "holds no row"),
        ("jsonl", '{"a": "x"}\n\n{broken', "line 3: not JSON"),
        ("jsonl", '{"a": 1} {"a": 2}', "line 1: not JSON .*Extra data"),
        ("jsonl", '{"a": "x"}\n7', "line 2: a row is an object with named fields, and this is 7, of type int"),
        ("jsonl", '{"a": NaN}', "line 1: not JSON .*NaN is no JSON: a value that is missing is null"),
        ("jsonl", '{"a": -Infinity}', "line 1: not JSON .*-Infinity is no JSON"),
        ("jsonl", '{"a": 1e999}', "line 1: not JSON .*1e999 is larger than any float"),
        ("jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', "line 1: not JSON .*the field 'c' stands twice"),
        ("jsonl", f'{{"a": {"9" * 5000}}}', "line 1: not JSON"),
        ("jsonl", '{"a": ' + "[" * 100_000, "line 1: its values are nested more than 100 deep"),
        ("jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}', "line 2: not UTF-8 text: byte 0xe9"),
        ("jsonl", '{"a": 1}'.encode("utf-16"), "line 1: not UTF-8 text: byte 0xff"),
        ("jsonl", gzip.compress(b'{"a": "x"}\n' * 9999)[:-20], r"nothing could be read after .*rows\.jsonl, line \d+"),
        ("json", "", "holds no row"),
        ("json", "[]", "holds no row"),
        ("json", '{"a": [1]}', r'a file of json is a list of objects, .* and this is \{"a": \[1\]\}, of type dict'),
        ("json", '[{"a": "x"}, 2]', "row 1: a row is an object"),
        ("json", '{"a": 1}\n{"a": 2}', "Extra data.* the format is jsonl"),
        ("csv", "", "holds no row"),
        ("csv", "a,b\n", "holds no row"),
        ("csv", "a,b\n1,2\n\n3\n", r"line 4: 1 values for the 2 fields of the header \(a, b\)"),
        ("csv", 'a,b\n"1\n1",2\n1,2,3\n', "line 4: 3 values for the 2 fields"),
        ("csv", "a,a\n1,2\n", "line 1: the field 'a' stands twice"),
        ("csv", 'a\n"open', "line 2: not CSV"),
        ("csv", b"a\ncaf\xe9\n", "not UTF-8 text: byte 0xe9"),
        ("parquet", "", "could not be read at row 0"),
        ("parquet", "PAR1 none PAR1", "could not be read at row 0"),
    ],
)
def test_a_broken_file_is_refused_with_its_line_by_corpora_and_tasks_alike(tmp_path, form, content, says):
    file = tmp_path / f"rows.{form}"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CorpusError, match=says):
        list(Rows(f"{form}:{file}").read())
    with pytest.raises(CorpusError, match=says):
        list(corpus(f"{form}:{file}#a").documents())


def test_an_empty_parquet_file_holds_no_row(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(CorpusError, match="holds no row"):
        list(Rows(f"parquet:{tmp_path}/rows.parquet").read())


@pytest.mark.parametrize("name", ["test.jsonl", "test.json", "test.csv", "test.parquet", "test.jsonl.gz", "test.csv.gz"])
def test_corpora_rows_and_the_mirror_read_the_same_file_alike(tmp_path, name):
    folder = tmp_path / "OWNER/NAME/default"
    folder.mkdir(parents=True)
    rows = [{"body": "2024-03-01"}, {"body": "two\nlines, one comma"}]
    form = name.removesuffix(".gz").partition(".")[2]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        written = {
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
            "csv": 'body\n2024-03-01\n"two\nlines, one comma"\n',
        }[form].encode()
        (folder / name).write_bytes(gzip.compress(written) if name.endswith(".gz") else written)
    documents = [row["body"] for row in rows]
    for path in (folder / name, folder):
        assert list(Rows(f"{form}:{path}").read()) == rows
        found = corpus(f"{form}:{path}#body")
        assert ([document.text for document in found.documents()], found.as_stream) == (documents, False)
    assert list(Rows("OWNER/NAME").read(tmp_path)) == rows
    mirrored = corpus("OWNER/NAME#body", data_dir=tmp_path)
    assert [document.text for document in mirrored.documents()] == documents


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_file_may_have_a_mark_and_be_compressed_and_is_not_empty(tmp_path, packed):
    file = tmp_path / ("test.txt.gz" if packed else "test.txt")
    content = "naïve\r\ntext".encode("utf-8-sig")
    file.write_bytes(gzip.compress(content) if packed else content)
    for path in (file, tmp_path):
        assert "".join(part.text for part in corpus(f"text:{path}").documents()) == "naïve\r\ntext"
    file.write_bytes(b"")
    with pytest.raises(CorpusError, match="is empty, so there is nothing to read"):
        list(corpus(f"text:{file}").documents())


def test_a_row_is_named_by_its_number_and_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    names = [where for where, _ in rows_of(Rows(f"jsonl:{tmp_path}/rows.jsonl"))]
    assert names == [f"row 0 ({tmp_path}/rows.jsonl, line 1)", f"row 1 ({tmp_path}/rows.jsonl, line 3)"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"\\ud83d"', r"rows\.jsonl, line 2: the text has a lone surrogate, '\\ud83d' at 0"),
        ('["a"]', r"rows\.jsonl, line 2: no text in field 'text' \(it holds \['a'\]\)"),
        ("true", r"rows\.jsonl, line 2: no text in field 'text' \(it holds True\)"),
        ("7", r"rows\.jsonl, line 2: no text in field 'text' \(it holds 7\)"),
        ("null", r"rows\.jsonl, line 2: no text in field 'text' \(there is n\)"),
    ],
)
def test_a_document_that_is_no_text_is_refused_with_file_and_line(tmp_path, value, says):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "fine"}}\n{{"n": 0, "text": {value}}}\n')
    with pytest.raises(CorpusError, match=says):
        list(corpus(f"jsonl:{tmp_path}/rows.jsonl").documents())


def test_a_task_sees_the_text_of_a_date(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"t": "2024-03-01"}\n{"t": "2024-03-02"}\n')
    task = Task("dates", Rows(f"jsonl:{tmp_path}/rows.jsonl"), lambda row: Choices(row["t"], ("b", "c"), answer=0))
    assert [task.ask(row).prompt for _, row in rows_of(task.rows)] == ["2024-03-01", "2024-03-02"]
