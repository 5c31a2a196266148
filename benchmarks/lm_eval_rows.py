"""Rows made for tasks of lm_eval, by the datasets that they read, and a mirror of them.

Tasks whose datasets have the same columns share their rows. Every split holds the same ones, so that no task lacks examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TEXTS = [
    "The function returns a list of names, and the module reads a file. An error is raised where the file is missing.",
    "A token ends where the next one begins . In Python , an object has a type ; its state may change : the type may not .",
    'Zwei Wörter, ein Satz. Où est l\'été? 今日は. It costs $ 12 , and " nothing " is lost ( or found ) .',
]
LETTERS = "ABCD"


QUESTIONS = [
    ("What returns a list", ["the function", "a file", "the state of a token", "an error in the module"], 0),
    ("Which of these may change", ["a type", "the state", "no name", "Python"], 1),
    ("Where does a token end", ["in a list", "never", "where the next begins", "at 12 dollars"], 2),
]
SUMS = [
    ("Tom has 3 apples and buys 4 more. How many apples does he have?", "He has 3 + 4 = 7.\n#### 7", 7),
    ("A box holds 1,200 eggs. How many eggs are in 5 boxes?", "5 boxes hold 5 * 1,200 = 6,000.\n#### 6,000", 6000),
]
PAIRS = [
    ("The file is missing .", "an error is raised", 0),
    ("A token ends .", "The next one begins.", 1),
    ("It costs 12 dollars , says the module .", "Nothing is lost", 0),
]
STORIES = [
    (["Ann opened a file.", "It was empty.", "She wrote a line.", "Then she closed it."], "The line was kept.", "It sang.", 1),
    (
        ["A list was long.", "Bob sorted it.", "It took an hour.", "He drank tea."],
        "He ate the list.",
        "The list was sorted.",
        2,
    ),
]
BLANKS = [
    ("The file did not fit into the list because _ was too large.", "the file", "the list", "1"),
    ("Ann thanked Bob because _ had helped her.", "Ann", "Bob", "2"),
]

CHOICES = [{"question": q, "choices": c, "answer": n} for q, c, n in QUESTIONS]
ARC = [{"question": f"{q}?", "choices": {"text": c, "label": list(LETTERS)}, "answerKey": LETTERS[n]} for q, c, n in QUESTIONS]
BELEBELE = [
    {
        "flores_passage": text, "question": f" {q}?", "correct_answer_num": str(n + 1),
        **{f"mc_answer{number}": choice for number, choice in enumerate(c, 1)},
    }
    for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
]  # fmt: skip
XNLI = [{"premise": first, "hypothesis": second, "label": (label + n) % 3} for n, (first, second, label) in enumerate(PAIRS)]
TWO = [{"sentence1": first, "sentence2": second, "label": label} for first, second, label in PAIRS]
ENTAILED = [{"premise": first, "hypothesis": second, "label": label} for first, second, label in PAIRS]
COPA = [
    {"premise": first, "choice1": second, "choice2": "Nobody reads it.", "question": kind, "label": label}
    for (first, second, label), kind in zip(PAIRS, ("cause", "effect", "cause"), strict=True)
]
CLOZE = [
    {
        **{f"input_sentence_{number}": text for number, text in enumerate(texts, 1)},
        "sentence_quiz1": first, "sentence_quiz2": second, "answer_right_ending": right,
    }
    for texts, first, second, right in STORIES
]  # fmt: skip
WINO = [{"sentence": text, "option1": first, "option2": second, "answer": right} for text, first, second, right in BLANKS]
SENTENCES = [{"sentence": text, "label": number % 2} for number, text in enumerate(TEXTS)]
ASKED = [{"question": q, "sentence": text, "label": n % 2} for text, (q, _, n) in zip(TEXTS, QUESTIONS, strict=True)]
GSM8K = [
    {"question": f"{question} ({number})", "answer": answer} for number in range(4) for question, answer, _ in SUMS
]  # more than the five examples that GSM8K shows
MATH = [
    {"problem": question, "solution": f"We count. The answer is $\\boxed{{{number}}}$.", "level": "Level 1", "type": "Algebra"}
    for question, _, number in SUMS
]
MC_OF_TRUTH = [
    {
        "question": f"{q}?", "mc1_targets": {"choices": c, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": c, "labels": [1, 0, int(n > 0), 0]},
    }
    for q, c, n in QUESTIONS
]  # fmt: skip
SQUAD = [
    {
        "id": f"english-{number}", "title": "Files", "context": text, "question": f"{q}?",
        "answers": {"text": [c[n], "the"], "answer_start": [0, 0]},
    }
    for number, (text, (q, c, n)) in enumerate(zip(TEXTS, QUESTIONS, strict=True))
]  # fmt: skip
RACE = [
    {
        "article": text,
        "problems": str([
            {"question": "What is read  _  .", "answer": "B", "options": ["a list", "a file", "a name", "tea"]},
            {"question": f"{q}?", "answer": LETTERS[n], "options": c},
        ]),
    }
    for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
]  # fmt: skip
MATHQA = [
    {"Problem": question, "options": f"a ) {n} , b ) {n + 1} , c ) 12 , d ) 0 , e ) none of these", "correct": "abcde"[n % 5]}
    for question, _, n in SUMS
]
DROP = [
    {
        "query_id": str(number), "passage": text, "question": f"{q}?",
        "answer": {"number": "12" if n == 2 else "", "date": {"day": "", "month": "", "year": ""}, "spans": [c[n]]},
        "validated_answers": {"number": [""], "date": [{"day": "1", "month": "May", "year": "1999"}], "spans": [c[:2]]},
    }
    for number, (text, (q, c, n)) in enumerate(zip(TEXTS, QUESTIONS, strict=True))
]  # fmt: skip
COQA = [
    {
        "story": text, "questions": {"input_text": ["What is it?", f"{q}?"]}, "answers": {"input_text": ["a text", c[n]]},
        "additional_answers": {"0": {"input_text": ["a text", c[0]]}, "1": {"input_text": ["a page", "the list"]}},
    }
    for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
]  # fmt: skip
QASPER = [
    {
        "title": "On files", "abstract": text,
        "qas": {
            "question": [f"{q}?", "Is it short?"],
            "answers": [
                {"answer": [{"unanswerable": False, "yes_no": None, "free_form_answer": c[n], "extractive_spans": []}]},
                {"answer": [{"unanswerable": False, "yes_no": n == 0, "free_form_answer": "", "extractive_spans": []}]},
            ],
        },
    }
    for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
]  # fmt: skip
RECORD = [
    {
        "passage": f"{text}\n@highlight\nIt is short",
        "query": "@placeholder is read .",
        "entities": [*c, c[0]],
        "answers": [c[n]],
    }
    for text, (_, c, n) in zip(TEXTS, QUESTIONS, strict=True)
]
WSC = [
    {"text": "Ann thanked Bob because he had helped .", "span1_text": "Bob", "span2_text": "he", "span2_index": 4, "label": 1},
    {"text": "The list and the file fit , as it is small .", "span1_text": "The list", "span2_text": "it", "span2_index": 8,
     "label": 0},
]  # fmt: skip
WSC273 = [
    {
        "text": "The file did not fit into the  list because it was too large.", "pronoun": "it", "pronoun_loc": 44,
        "options": ["The file", "The list"], "label": 0,
    },
    {
        "text": "Ann thanked Bob because his advice had helped her.", "pronoun": "his", "pronoun_loc": 24,
        "options": ["Ann", "Bob"], "label": 1,
    },
]  # fmt: skip
LONG = [{"page": (text + "\n ") * (1 + 14 * number), "text": text * (2 + 9 * number)} for number, text in enumerate(TEXTS)]
OF_AGIEVAL = [
    {"query": f"Q: {q}? A:", "choices": [f"({LETTERS[k]}){one}" for k, one in enumerate(c)], "gold": [n], "answer": c[n]}
    for q, c, n in QUESTIONS
]
BBQ = [
    {
        "example_id": number, "question_index": "1", "question_polarity": polarity, "context_condition": condition,
        "category": category, "context": text, "question": "Who forgot the file?", "ans0": "The grandfather",
        "ans1": "The grandson", "ans2": "Not known", "label": number % 3,
        "answer_info": {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"], "subcategory": "None", "version": "a", "source": "none"},
    }
    for number, (text, polarity, condition, category) in enumerate(
        zip(TEXTS, ("neg", "nonneg", "neg"), ("ambig", "disambig", "ambig"), ("Age", "Age", "SES"), strict=True)
    )
]  # fmt: skip
SEVERAL = "train validation test"

DATA: dict[str, tuple[list[Row], str]] = {  # folder of the mirror -> its rows, and the splits that hold them
    "cambridgeltl/xcopa/et": (COPA, SEVERAL),
    "cambridgeltl/xcopa/it": (COPA, SEVERAL),
    "haryoaw/COPAL/id": (COPA, SEVERAL),
    "facebook/xnli/en": (XNLI, SEVERAL),
    "facebook/xnli/de": (XNLI, SEVERAL),
    "facebook/anli/default": (XNLI, "train_r1 dev_r1 test_r1 train_r2 dev_r2 test_r2"),
    "allenai/ai2_arc/ARC-Easy": (ARC, SEVERAL),
    "allenai/ai2_arc/ARC-Challenge": (ARC, SEVERAL),
    "facebook/belebele/eng_Latn": (BELEBELE, "test"),
    "facebook/belebele/deu_Latn": (BELEBELE, "test"),
    "cais/mmlu/anatomy": (CHOICES, "test dev"),
    "cais/mmlu/astronomy": (CHOICES[:2], "test dev"),
    "cais/wmdp/wmdp-bio": (CHOICES, "test"),
    "cais/wmdp/wmdp-chem": (CHOICES[:1], "test"),
    "cais/wmdp/wmdp-cyber": (CHOICES[1:], "test"),
    "HAERAE-HUB/HAE_RAE_BENCH/general_knowledge": (
        [{"query": f"{q}? 정답:", "answer": f"({LETTERS[n]})"} for q, _, n in QUESTIONS],
        "test",
    ),
    **{
        f"HAERAE-HUB/HAE_RAE_BENCH/{name}": (
            [{"query": f"{q} 역사 {name}", "answer": "(B)"} for q, _, _ in QUESTIONS[:2]],
            "test",
        )
        for name in ("history", "loan_words", "rare_words", "standard_nomenclature")
    },
    **{
        f"nyu-mll/blimp/{name}": ([{"sentence_good": a, "sentence_bad": f"{b} a a"} for a, b, _ in PAIRS], "train")
        for name in ("causative", "anaphor_gender_agreement")
    },
    "nyu-mll/glue/cola": (SENTENCES, SEVERAL),
    "nyu-mll/glue/sst2": (SENTENCES, SEVERAL),
    "nyu-mll/glue/mrpc": (TWO, SEVERAL),
    "nyu-mll/glue/rte": (TWO, SEVERAL),
    "nyu-mll/glue/wnli": (TWO, SEVERAL),
    "nyu-mll/glue/qnli": (ASKED, SEVERAL),
    "nyu-mll/glue/qqp": ([{"question1": a, "question2": b, "label": label} for a, b, label in PAIRS], SEVERAL),
    "nyu-mll/glue/mnli": (XNLI, "train validation_matched validation_mismatched"),
    "aps/super_glue/boolq": (
        [
            {"passage": text * (1 + 20 * n), "question": q, "label": n % 2}  # the longest do not fit the context
            for text, (q, _, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "aps/super_glue/cb": (XNLI, SEVERAL),
    "aps/super_glue/rte": (ENTAILED, SEVERAL),
    "aps/super_glue/copa": (COPA, SEVERAL),
    "aps/super_glue/multirc": (
        [
            {"paragraph": text, "question": f"{q}?", "answer": c[1], "label": n % 2}
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "aps/super_glue/record": (RECORD, SEVERAL),
    "aps/super_glue/wic": (
        [{"sentence1": a, "sentence2": b, "start1": 4, "end1": 8, "label": label} for a, b, label in PAIRS],
        SEVERAL,
    ),
    "aps/super_glue/wsc.fixed": (WSC, SEVERAL),
    "truthfulqa/truthful_qa/multiple_choice": (MC_OF_TRUTH, "validation"),
    "truthfulqa/truthful_qa/generation": (
        [{"question": f"{q}?", "correct_answers": c[:2], "incorrect_answers": [f"{c[2]}.", c[3]]} for q, c, _ in QUESTIONS[:2]],
        "validation",
    ),
    "allenai/winogrande/winogrande_xl": (WINO, SEVERAL),
    "Muennighoff/xwinograd/en": (WINO, "test"),
    "Muennighoff/xwinograd/fr": (WINO, "test"),
    "allenai/openbookqa/main": ([{"question_stem": row["question"], **row} for row in ARC], SEVERAL),
    "allenai/sciq/default": (
        [
            {
                "support": f" {text}",
                "question": f"{q}?",
                "correct_answer": c[0],
                "distractor1": c[1],
                "distractor2": c[2],
                "distractor3": c[3],
            }
            for text, (q, c, _) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "EleutherAI/race/high": (RACE, "test"),
    "EleutherAI/logiqa/logiqa": (
        [
            {"context": text, "question": f"{q}?", "options": c, "label": "abcd"[n]}
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "regisss/math_qa/default": (MATHQA, SEVERAL),
    "EleutherAI/asdiv/default": (
        [{"body": "Some are counted.", "question": question, "answer": f"{number} (apples)"} for question, _, number in SUMS],
        "validation",
    ),
    "openai/gsm8k/main": (GSM8K, "train test"),
    "qintongli/GSM-Plus/default": ([{**row, "solution": row["answer"]} for row in GSM8K], "test"),
    "juletxara/mgsm/de": (
        [{"question": q, "answer": None, "answer_number": number} for q, _, number in SUMS],
        "train test",
    ),
    **{
        f"EleutherAI/hendrycks_math/{name}": (MATH[: 1 + number % 2], "train test")
        for number, name in enumerate(
            (
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            )
        )
    },
    "SaylorTwift/bbh/boolean_expressions": (
        [{"input": "not ( True ) and ( True ) is", "target": "False"}, {"input": "True or False is", "target": "True"}],
        "test",
    ),
    "SaylorTwift/bbh/navigate": (
        [{"input": "If you take 3 steps left, are you back?\nOptions:\n- Yes\n- No", "target": "No"}],
        "test",
    ),
    "EleutherAI/drop/default": (DROP, "train validation"),
    "mandarjoshi/trivia_qa/rc.nocontext": (
        [{"question": q, "answer": {"aliases": c[:2], "value": c[0]}} for q, c, _ in QUESTIONS],
        SEVERAL,
    ),
    "google-research-datasets/nq_open/default": ([{"question": q, "answer": c[:2]} for q, c, _ in QUESTIONS], SEVERAL),
    "EleutherAI/coqa/default": (COQA, "train validation"),
    "facebook/mlqa/mlqa.en.en": (SQUAD, SEVERAL),
    "google-research-datasets/tydiqa/secondary_task": (SQUAD, SEVERAL),
    "hazyresearch/based-squad/default": (
        [{"text": f" {text} It reads", "value": "a file "} for text in TEXTS],
        SEVERAL,
    ),
    "hazyresearch/based-swde-v2/default": ([{"text": f"{text} Price:", "value": "12"} for text in TEXTS], SEVERAL),
    "EleutherAI/lambada_openai/default": ([{"text": text} for text in TEXTS], SEVERAL),
    "EleutherAI/lambada_openai/de": ([{"text": text} for text in TEXTS], SEVERAL),
    "cimec/lambada/default": ([{"text": text} for text in TEXTS], SEVERAL),
    "EleutherAI/wikitext_document_level/wikitext-2-raw-v1": (LONG, SEVERAL),
    "NeelNanda/pile-10k/default": (LONG, "train"),
    "baber/piqa/default": ([{"goal": a, "sol1": b, "sol2": "Do nothing.", "label": n} for a, b, n in PAIRS], SEVERAL),
    "Rowan/hellaswag/default": (
        [
            {
                "ctx_a": text,
                "ctx_b": "the reader",
                "activity_label": "Reading files",
                "endings": [f"{one} [title] ends." for one in c],
                "label": str(n),
            }
            for text, (_, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "lighteval/siqa/default": (
        [
            {"context": text, "question": f"{q}?", "answerA": c[0], "answerB": c[1], "answerC": c[2], "label": str(n + 1)}
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "tau/commonsense_qa/default": (
        [
            {"question": f"{q}? ", "choices": {"text": [*c, "tea"], "label": list("ABCDE")}, "answerKey": LETTERS[n]}
            for q, c, n in QUESTIONS
        ],
        SEVERAL,
    ),
    "openlifescienceai/medmcqa/default": (
        [
            {"question": f"{q}?", "cop": n, **{f"op{key}": one for key, one in zip("abcd", c, strict=True)}}
            for q, c, n in QUESTIONS
        ],
        SEVERAL,
    ),
    "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source": (
        [
            {"CONTEXTS": [text, "It was tried."], "QUESTION": f"{q}?", "final_decision": ["yes", "no", "maybe"][n]}
            for text, (q, _, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "EleutherAI/headqa/en": (
        [
            {"qtext": f"{q}?", "answers": [{"aid": k, "atext": one} for k, one in enumerate(c)], "ra": n + 1}
            for q, c, n in QUESTIONS
        ],
        SEVERAL,
    ),
    "EleutherAI/mutual/mutual": (
        [
            {"article": f"m : {text} f : do n't ask .", "options": [f"m : {one} ." for one in c], "answers": LETTERS[n]}
            for text, (_, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "allenai/qasper/default": (QASPER, SEVERAL),
    "allenai/swag/regular": (
        [
            {"startphrase": text, "label": n, **{f"ending{k}": one for k, one in enumerate(c)}}
            for text, (_, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        SEVERAL,
    ),
    "LSDSem/story_cloze/2016": (CLOZE, "validation test"),
    "juletxara/xstory_cloze/en": (CLOZE, "train eval"),
    "juletxara/xstory_cloze/es": (CLOZE, "train eval"),
    "skg/toxigen-data/annotated": (
        [{"text": text, "toxicity_ai": 2.0 * n, "toxicity_human": 1.0 + n} for n, text in enumerate(TEXTS)],
        "train test",
    ),
    **{
        f"EleutherAI/unscramble/{name}": (
            [{"context": f"Unscramble {word[::-1]}:", "completion": word} for word in ("file", "list")],
            "validation",
        )
        for name in ("mid_word_1_anagrams", "reversed_words")
    },
    "lighteval/winograd_wsc/wsc273": (WSC273, "test"),
    **{
        f"google-research-datasets/paws-x/{name}": (TWO[: 1 + number % 3], SEVERAL)
        for number, name in enumerate(("en", "de", "es", "fr", "ja", "ko", "zh"))
    },
    "stanfordnlp/web_questions/default": (
        [{"question": f"{q}?", "answers": [c[0], f"{c[0]} of it", c[1]]} for q, c, _ in QUESTIONS],
        "train test",
    ),
    "community-datasets/qa4mre/2011.main.EN": (
        [
            {
                "document_str": f" {text} ",
                "question_str": f"{q}?",
                "correct_answer_id": str(n + 1),
                "answer_options": {"answer_str": c},
            }
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        "train",
    ),
    "hails/agieval-aqua-rat/default": (OF_AGIEVAL, "test"),
    "hails/agieval-math/default": (OF_AGIEVAL, "test"),
    "jannalu/crows_pairs_multilingual/english": (
        [{"sent_more": a, "sent_less": b, "bias_type": "age"} for a, b, _ in PAIRS],
        "test",
    ),
    "oskarvanderwal/simple-cooccurrence-bias/default": (
        [{"sentence": f"The {one} is a"} for one in ("reader", "writer")],
        "test",
    ),
    "oskarvanderwal/winogender/all": (
        [
            {"sentence": a, "pronoun": "she", "occupation": "clerk", "participant": "client", "label": n, "gender": "female"}
            for a, _, n in PAIRS
        ],
        "test",
    ),
    "CogComp/mc_taco/default": (
        [
            {"sentence": text, "question": f"{q}?", "answer": c[0], "label": n % 2}
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        "validation test",
    ),
    "EleutherAI/hendrycks_ethics/commonsense": (
        [{"input": text, "label": n % 2} for n, text in enumerate(TEXTS)],
        "train test",
    ),
    "EleutherAI/hendrycks_ethics/utilitarianism": ([{"activity": a, "baseline": b} for a, b, _ in PAIRS], "train test"),
    "inverse-scaling/NeQA/default": (
        [{"prompt": f"{q}?\nAnswer:", "classes": [" A", " B"], "answer_index": n % 2} for q, _, n in QUESTIONS],
        "train",
    ),
    "HAERAE-HUB/KMMLU/Accounting": (
        [{"question": f"{q}?", "answer": n + 1, **dict(zip(LETTERS, c, strict=True))} for q, c, n in QUESTIONS],
        "dev test",
    ),
    "oskarvanderwal/bbq/All": (BBQ, "test"),
    "pbevan11/EQ-Bench/default": (
        [
            {
                "prompt": f"{text}\nScore: ",
                "reference_answer_fullscale": str(
                    {
                        key: value
                        for number, (emotion, score) in enumerate({"Joy": 3, "Fear": 1, "Hope": 5, "Rage": 2}.items(), 1)
                        for key, value in {f"emotion{number}": emotion, f"emotion{number}_score": score}.items()
                    }
                ),
            }
            for text in TEXTS[:2]
        ],
        "validation",
    ),
    "gneubig/aime-1983-2024/default": (
        [{"Question": question, "Answer": str(number)} for question, _, number in SUMS],
        "train",
    ),
    "wmt/wmt14/fr-en": ([{"translation": {"en": a, "fr": f"Le {b}"}} for a, b, _ in PAIRS], SEVERAL),
    "hazyresearch/based-fda/default": ([{"text": f"{text} Name:", "value": "file"} for text in TEXTS], SEVERAL),
    "Muennighoff/babi/default": (
        [
            {"passage": f"{text}\n", "question": f"{q}?", "answer": c[n]}
            for text, (q, c, n) in zip(TEXTS, QUESTIONS, strict=True)
        ],
        "train valid test",
    ),
    "baber/logiqa2/logieval": ([{"content": text, "ideal": "A"} for text in TEXTS], "train test"),
}


def write_mirror(root: Path) -> None:
    """Write all rows as lm_eval's tasks find them in a mirror: root/OWNER/NAME/CONFIG/SPLIT.jsonl."""
    for name, (rows, splits) in DATA.items():
        folder = root / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for split in splits.split():
            (folder / f"{split}.jsonl").write_text(text)
