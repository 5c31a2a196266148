"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): examinations in 57 subjects, four choices each. Prompts of lm_eval.

Letters are scored, not texts. All questions of a subject show the first of its five few-shot examples (split `dev`). The
average of the suite gives every question the same weight, as lm_eval's does. A fine-tuning learns from `auxiliary_train`,
questions of other examinations, and is asked those of all subjects.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Suite, Task, by_name
from pytest_lmeval.tasks._checks import texts

SUBJECTS = [
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
]  # fmt: skip


def mmlu(row: Row) -> Choices:
    """A question, its four choices, and the letter of the right one."""
    a, b, c, d = texts("choices", row["choices"])
    prompt = f"{row['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    return Choices(prompt, (" A", " B", " C", " D"), row["answer"])


def _task(subject: str) -> Task:
    rows = Rows("cais/mmlu", subject, "test")
    return Task(
        f"mmlu_{subject}",
        rows,
        mmlu,
        ("accuracy",),
        shots=rows.of("dev"),
        fewshot_strategy="first",
        description=f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n",
        style="lm_eval",
        train=TRAIN,
        classes=False,
    )


ALL = Rows("cais/mmlu", "all", "test")
TRAIN = ALL.of("auxiliary_train")
SUITE = Suite(
    "mmlu",
    tuple(map(_task, SUBJECTS)),
    weighted=True,
    finetuned=Task("mmlu", ALL, mmlu, ("accuracy",), shots=ALL.of("dev"), train=TRAIN, classes=False),
)
REGISTERED = by_name(SUITE, *SUITE.tasks)
