"""The lineage of datasets and models as a tree."""

from typing import Any

from common.cache.lineage_tree import Node, dataset_tree, model_tree
from common.cache.lineage_view import as_html, as_json, as_lines, as_rich
from common.lineage import TEACHER_MISMATCH, DatasetRef, ModelIdentity, Provenance
from tests.common.rows import IDENTITY, make_plan


def model(name: str, digit: str) -> ModelIdentity:
    return ModelIdentity.model_validate(
        IDENTITY | {"name": name, "weights_sha256": digit * 64, "tensors_sha256": digit * 64}
    )


BASE, TEACHER, STUDENT, OTHER = (
    model("org/base", "1"),
    model("org/teacher", "2"),
    model("s3://bucket/sft/export", "3"),
    model("org/other", "4"),
)
SFT = Provenance(
    role="sft",
    base_model=BASE,
    teacher=TEACHER,
    sft_data=DatasetRef(manifest_sha256="5" * 64, url="s3://bucket/sft-data"),
    weights_sha256="3" * 64,
)
CLAIM = Provenance(role="attested", teacher=TEACHER, weights_sha256="3" * 64)


def distilled(parent: Provenance | None, digit: str, overrides: tuple[str, ...] = ()) -> Provenance:
    """What the trainer writes beside a student distilled from `parent`."""
    return Provenance(
        role="opd",
        base_model=parent.base_model if parent else None,
        teacher=parent.teacher if parent else None,
        sft_data=parent.sft_data if parent else None,
        scored_data=DatasetRef(manifest_sha256=digit * 64, url=f"s3://bucket/scored-{digit}"),
        parent=parent,
        overrides=overrides,
        weights_sha256=digit * 64,
    )


def scored(lineage: Provenance | None, teacher: ModelIdentity = TEACHER, overrides: tuple[str, ...] = ()) -> Node:
    plan = make_plan(
        policy=STUDENT.model_dump(),
        teacher=teacher.model_dump(),
        lineage=lineage.model_dump(mode="json") if lineage else None,
        parent="6" * 64,
        overrides=list(overrides),
    )
    return dataset_tree(plan, "s3://bucket/scored", "7" * 64)


def outline(node: Node) -> Any:
    """The tree without pins: (what, name, marks, children)."""
    marks = [mark.text for mark in node.marks]
    return (node.what, node.name, marks, [outline(child) for child in node.made_from])


SFT_OUTLINE = [
    ("base model", "org/base", [], []),
    ("SFT data", "s3://bucket/sft-data", [], [("teacher", "org/teacher", [], [])]),
]


def test_the_whole_chain_of_a_scored_dataset() -> None:
    assert outline(scored(SFT)) == (
        "scored rollouts",
        "s3://bucket/scored",
        [],
        [
            ("teacher", "org/teacher", ["the SFT teacher"], []),
            (
                "rollouts",
                "",
                [],
                [("SFT student", "s3://bucket/sft/export", [], SFT_OUTLINE), ("prompts", "", [], [])],
            ),
        ],
    )


def test_every_node_is_pinned() -> None:
    tree = as_json(scored(SFT))
    teacher, rollouts = tree["made_from"]
    student, prompts = rollouts["made_from"]
    assert tree["manifest_sha256"] == "7" * 64 and rollouts["manifest_sha256"] == "6" * 64
    assert (teacher["weights_sha256"], student["weights_sha256"]) == ("2" * 64, "3" * 64)
    assert student["made_from"][1]["manifest_sha256"] == "5" * 64 and prompts["sha256"] == "c" * 64


def test_a_claim_is_not_shown_as_knowledge() -> None:
    teacher, rollouts = scored(CLAIM).made_from
    assert [(mark.text, mark.level) for mark in teacher.marks] == [("the SFT teacher, as attested", "doubt")]
    (claimed,) = rollouts.made_from[0].made_from
    assert outline(claimed) == ("teacher", "org/teacher", ["attested, not verified"], [])


def test_another_teacher_is_called_so_though_it_was_allowed() -> None:
    tree = scored(SFT, OTHER, (TEACHER_MISMATCH,))
    assert [mark.text for mark in tree.marks] == [f"overridden: {TEACHER_MISMATCH}"]
    assert [(mark.text, mark.level) for mark in tree.made_from[0].marks] == [
        ("not the SFT teacher, which is org/teacher", "bad")
    ]


def test_a_student_without_lineage_is_called_so() -> None:
    teacher, rollouts = scored(None, overrides=(TEACHER_MISMATCH,)).made_from
    assert [mark.level for mark in teacher.marks] == ["bad"]
    assert outline(rollouts.made_from[0]) == ("student", "s3://bucket/sft/export", ["no lineage"], [])


def test_two_rounds_of_distillation() -> None:
    first = distilled(SFT, "8")
    second = distilled(first, "9")
    assert outline(model_tree(second, name="s3://bucket/round-2/export")) == (
        "distilled student, round 2",
        "s3://bucket/round-2/export",
        [],
        [
            ("scored rollouts", "s3://bucket/scored-9", [], [("teacher", "org/teacher", ["the SFT teacher"], [])]),
            (
                "distilled student, round 1",
                "",
                [],
                [
                    (
                        "scored rollouts",
                        "s3://bucket/scored-8",
                        [],
                        [("teacher", "org/teacher", ["the SFT teacher"], [])],
                    ),
                    ("SFT student", "", [], SFT_OUTLINE),
                ],
            ),
        ],
    )


def test_rollouts_of_a_distilled_student_name_their_round() -> None:
    teacher, rollouts = scored(distilled(SFT, "8")).made_from
    assert [mark.text for mark in teacher.marks] == ["the SFT teacher"]
    assert rollouts.made_from[0].what == "distilled student, round 1"


def test_a_claim_is_handed_down_as_a_claim() -> None:
    teacher, _ = scored(distilled(CLAIM, "8")).made_from
    assert [mark.text for mark in teacher.marks] == ["the SFT teacher, as attested"]


def test_an_override_stands_where_it_was_made() -> None:
    first = distilled(SFT, "8", (TEACHER_MISMATCH,))
    tree = model_tree(distilled(first, "9", (TEACHER_MISMATCH,)))
    data, parent = tree.made_from
    assert tree.marks == () and [mark.text for mark in parent.marks] == [f"overridden: {TEACHER_MISMATCH}"]
    assert [mark.level for mark in data.made_from[0].marks] == ["bad"]


def test_distilled_from_a_student_of_unknown_descent() -> None:
    data, start = model_tree(distilled(None, "8", (TEACHER_MISMATCH,))).made_from
    assert data.name == "s3://bucket/scored-8" and outline(start) == ("student", "", ["no lineage"], [])


def test_a_base_that_was_itself_trained_shows_how() -> None:
    again = SFT.model_copy(update={"base_model": STUDENT, "parent": SFT})
    base, _ = model_tree(again).made_from
    assert outline(base) == ("base model", "s3://bucket/sft/export", [], SFT_OUTLINE)


def test_answers_and_rollouts_have_trees_of_their_own() -> None:
    answers = dataset_tree(make_plan(kind="sft", policy=TEACHER.model_dump()), "s3://bucket/sft-data", "5" * 64)
    assert outline(answers) == (
        "answers of a teacher",
        "s3://bucket/sft-data",
        [],
        [("teacher", "org/teacher", [], []), ("prompts", "", [], [])],
    )
    plan = make_plan(kind="rollouts", policy=STUDENT.model_dump(), lineage=SFT.model_dump(mode="json"))
    assert dataset_tree(plan, "s3://bucket/rollouts", "5" * 64).made_from[0].what == "SFT student"


def test_the_tree_in_lines() -> None:
    assert as_lines(scored(SFT)) == [
        "scored rollouts  s3://bucket/scored  manifest 777777777777",
        "├── teacher  org/teacher  weights 222222222222  [the SFT teacher]",
        "└── rollouts  manifest 666666666666",
        "    ├── SFT student  s3://bucket/sft/export  weights 333333333333",
        "    │   ├── base model  org/base  weights 111111111111",
        "    │   └── SFT data  s3://bucket/sft-data  manifest 555555555555",
        "    │       └── teacher  org/teacher  weights 222222222222",
        "    └── prompts  sha256 cccccccccccc",
    ]


def test_what_nobody_recorded_is_said_to_be_unknown() -> None:
    (line,) = as_lines(Node("student"))
    assert line == "student  (not recorded)" and "not recorded" in as_html(Node("student"))


def test_a_hostile_name_is_neither_obeyed_by_the_terminal_nor_by_the_page() -> None:
    tree = scored(SFT, model("\x1b[2J[red]<script>alert(1)</script>\u202e", "2"))
    (line,) = [line for line in as_lines(tree) if "script" in line]
    assert "\x1b" not in line and "\u202e" not in line and "␛[2J[red]<script>" in line
    labels = [str(child.label) for child in as_rich(tree).children]
    assert any("[red]<script>" in label for label in labels) and not any("\x1b" in label for label in labels)
    assert "<script>" not in as_html(tree) and "&lt;script&gt;" in as_html(tree)
