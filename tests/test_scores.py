"""Ready scorers (`pytest_lmeval.tasks.scores`) against what people would say, and against the libraries that they stand for."""

import importlib.util
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings, strategies as st

from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks import Extracted, scores


@pytest.mark.parametrize(
    ("ignore", "right", "answer", "expected"),
    [
        ((), "Paris", " Paris\n", True),
        ((), "Paris", "paris", False),
        (("case",), "Paris", "PARIS", True),
        (("punctuation",), "Paris", "Paris.", True),
        ((), "a b", "a  b", False),
        (("whitespace",), "a b", "a \n b", True),
        (("case", "articles"), "tower", "The tower", True),
        ((), ["Rome", "Roma"], "Roma", True),
        ((), 7, "7", True),
    ],
)
def test_exact(ignore, right, answer, expected):
    assert scores.exact("a", ignore=ignore)({"a": right}, answer) is expected
    assert scores.exact(lambda row: row["a"], ignore=ignore)({"a": right}, answer) is expected


def test_contains():
    assert scores.contains("a")({"a": ["x", "y"]}, "has Y")
    assert not scores.contains("a", ignore_case=False)({"a": ["x", "y"]}, "has Y")
    assert not scores.contains("a", every=True)({"a": ["x", "y"]}, "has Y")
    assert scores.contains("a", every=True)({"a": ["x", "y"]}, "yx")


@pytest.mark.parametrize("right", [None, [], {"x": 1}, ["a", None]])
@pytest.mark.parametrize("make", [scores.exact, scores.contains, scores.numeric, scores.letter])
def test_a_row_without_a_right_answer_is_refused(make, right):
    with pytest.raises(TaskError, match=r"the field 'a' gives .*, and what is right is a text, a number, or several"):
        make("a")({"a": right}, "x")


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        ("1 + 1 = 2\n#### 2", "It is 2."),
        (2, "2.0"),
        ("1,234.50", "so $1234.5."),
        ("1234567", "1,234,567 people"),
        ("0.5", "50%"),
        ("50", "50 \\%"),
        ("1/2", r"\dfrac{1}{2}"),
        (0.25, "1/4"),
        ("7", "10 - 3 = 7"),
        ("3", "10 - 3"),
        ("3", "pages 2-3"),
        ("-5", "-$5"),
        ("-5", "$-5"),
        ("-5", "\u22125"),
        ("1000", "1e3"),
        ("6", r"I think \boxed{5}, no: \boxed{6}. Of these 7 are"),
        ("9", "#### 9\nQuestion 10"),
        ("12", "12, and x7"),
        (["1", "2"], "2"),
    ],
)
def test_numbers_are_equal_however_they_are_written(right, answer):
    found = scores.numeric("a")({"a": right}, answer)
    assert found.score is True, found
    assert scores.numeric("a")({"a": 987654}, answer).score is False


def test_an_answer_without_a_number_is_refused_and_a_right_one_without_is_an_error():
    assert scores.numeric("a")({"a": 1}, "I do not know") is None
    with pytest.raises(TaskError, match="the right answer 'none' has no number"):
        scores.numeric("a")({"a": "none"}, "1")


@settings(max_examples=300)
@given(st.text("0123456789,.$%/-#eE \\{}boxedfrac\n", max_size=30))
@example("1/0")
@example("9e999")
@example("7" * 5000)
@example("7." + "7" * 5000)
@example("9" * 299 + ".5")
@example("1,2,3,4")
def test_a_number_is_found_or_not_in_any_text_and_never_takes_long(text):
    found = scores.number_in(text)
    assert found is None or (isinstance(found, Fraction) and abs(found.numerator) < 10**1040)


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${:,}.00", "about {} of them", "#### {}", "\\boxed{{{}}}"])
)
def test_a_whole_number_is_read_as_it_was_written(number, form):
    text = form.format(number).replace("$-", "-$")
    assert scores.number_in(text) == number


# lm_eval's own filters and comparison, of its task gsm8k.
REMOVE = (",", r"\$", r"(?s).*#### ", r"\.$")
OUTPUTS = st.lists(
    st.sampled_from(
        ["####", " ", "-", "$", "12", "3,000", "4.5", ".", ",", "\n", "The answer is ", "#### 12", "#### -7.", "x"]
    ),
    max_size=9,
).map("".join)


@pytest.fixture(scope="module")
def harness():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    filters = {
        "strict_match": extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)"),
        "flexible_extract": extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    options = {"ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": list(REMOVE)}

    def score(row, output):
        return {
            name: metrics.exact_match_fn(predictions=one.apply([[output]], [row])[0], references=[row["answer"]], **options)[
                "exact_match"
            ]
            for name, one in filters.items()
        }

    return score


@settings(max_examples=400)
@given(OUTPUTS, st.sampled_from(["#### 12", "6 * 2 = 12\n#### 12", "#### -7", "#### 3,000", "so\n#### 4.5"]))
@example("#### 12", "#### 12")
def test_the_filters_of_gsm8k_score_as_those_of_lm_eval(harness, output, answer):
    ours = scores.by_pattern("answer", {"strict_match": scores.STRICT, "flexible_extract": scores.FLEXIBLE})
    found = {name: float(one is not None and one.score) for name, one in ours({"answer": answer}, output).items()}
    assert found == harness({"answer": answer}, output)


def test_one_pattern_is_one_score_and_none_where_nothing_matches():
    score = scores.by_pattern("a", r"is (\w+)")
    assert score({"a": "Blue"}, "It is blue.") == Extracted("blue", True)
    assert score({"a": "blue"}, "red") is None
    assert scores.by_pattern("a", (r"\d", 1))({"a": 2}, "1 2 3") == Extracted("2", True)
    assert scores.by_pattern("a", (r"\d", 5))({"a": 2}, "1 2 3") is None
    with pytest.raises(TaskError, match="is no regular expression"):
        scores.by_pattern("a", "(")


@pytest.mark.parametrize(
    "answer",
    ["B", "B.", "(B)", "**B**", "B) Rome", "The answer is (B).", "the answer is B", "Answer: B", "The correct option is: B",
     r"The answer is $\boxed{B}$.", r"\boxed{\text{B}}", "A? C? The answer is B because A is not.", "It is (A). No, (B)"],
)  # fmt: skip
@pytest.mark.parametrize("right", ["B", 1])
def test_a_letter_is_found_as_models_write_it(answer, right):
    assert scores.letter("a")({"a": right}, answer) == Extracted("B", True)
    assert scores.letter("a")({"a": "C"}, answer) == Extracted("B", False)


@pytest.mark.parametrize("answer", ["", "I think so", "A better way is none", "The answer is a dog", "Because", "(E)"])
def test_no_letter_is_taken_from_words(answer):
    assert scores.letter("a")({"a": "B"}, answer) is None


@pytest.mark.parametrize("right", ["E", 4, -1, "AB"])
def test_a_right_letter_that_is_none_of_the_choices_is_refused(right):
    with pytest.raises(TaskError, match=f"{right!s}.* is neither one of the letters 'ABCD' nor an index of one"):
        scores.letter("a")({"a": right}, "A")


def test_f1_is_that_of_squad():
    pytest.importorskip("torchmetrics")
    assert scores.f1("a")({"a": ["the cat sat", "dog"]}, "A cat sat down") == pytest.approx(0.8)


def test_an_unknown_option_is_refused():
    with pytest.raises(TaskError, match="exact cannot ignore 'caps': it ignores case, punctuation"):
        scores.exact("a", ignore=("caps",))
    with pytest.raises(TaskError, match=r"ignore is 'case', .*\('case',\)"):
        scores.exact("a", ignore="case")


def is_missing(name):
    return importlib.util.find_spec(name) is None


@pytest.mark.skipif(is_missing("math_verify"), reason="needs math-verify")
@pytest.mark.parametrize(
    ("right", "answer", "expected"),
    [
        ("x^2 + x", r"So it is $\boxed{x(x+1)}$.", True),
        (r"\frac{1}{2}", "0.5", True),
        ("2", "$3$", False),
        (r"\sqrt{2}", r"\boxed{2^{1/2}}", True),
    ],
)
def test_expressions_are_equal_as_math_verify_says(right, answer, expected):
    assert scores.symbolic("a")({"a": right}, answer).score is expected


@pytest.mark.skipif(is_missing("math_verify"), reason="needs math-verify")
def test_what_has_no_expression_is_refused():
    assert scores.symbolic("a")({"a": "2"}, "I do not know") is None


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(lambda: scores.symbolic("a"), "math_verify", "math"), (scores.ifeval, "langdetect", "ifeval")],
)
def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch, make, module, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(TaskError, match=re.escape(f"pip install 'pytest-lmeval[{extra}]'")):
        make()


@pytest.fixture(scope="module")
def ifeval():
    for name in ("langdetect", "immutabledict", "nltk", "lm_eval"):
        pytest.importorskip(name)
    return scores.ifeval()


def asked(**instructions):
    names = {name.replace("__", ":"): options for name, options in instructions.items()}
    return {"prompt": "Write.", "instruction_id_list": [*names], "kwargs": [*names.values()]}


def test_instructions_are_checked_by_the_library_of_ifeval(ifeval):
    row = asked(punctuation__no_comma={}, length_constraints__number_words={"relation": "at least", "num_words": 3},
                keywords__existence={"keywords": ["sea"]})  # fmt: skip
    assert ifeval(row, "the sea is blue") == dict.fromkeys(NAMES, 1)
    found = ifeval(row, "Sure, here:\nthe sea is blue")
    assert found == {"prompt_strict": False, "prompt_loose": True, "instruction_strict": 2 / 3, "instruction_loose": 1}
    with pytest.raises(TaskError, match="'keywords:none' is no instruction of IFEval"):
        ifeval(asked(keywords__none={}), "x")


NAMES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
OPTIONS = {
    "change_case__capital_word_frequency": {"capital_frequency": 1, "capital_relation": "at least"},
    "length_constraints__number_sentences": {"num_sentences": 1, "relation": "at least"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_checks_that_need_a_download_say_so_by_name(ifeval, name, monkeypatch):
    assert name.replace("__", ":") in scores.NEED_DOWNLOADS
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(TaskError, match=f"{name.replace('__', ':')} cannot be checked without nltk's punkt_tab"):
        ifeval(asked(**{name: OPTIONS[name]}), "It IS so.")


def test_all_other_checks_run_without_one(ifeval):
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    needing = set()
    for name, kind in INSTRUCTION_DICT.items():
        check = kind(name)
        check.build_description(**({"prompt_to_repeat": "Say it."} if name.endswith("repeat_prompt") else {}))
        try:
            check.check_following("One. Two words, and {so} on.\n\nP.S. [more]")
        except LookupError:
            needing.add(name)
    assert needing <= set(scores.NEED_DOWNLOADS)
