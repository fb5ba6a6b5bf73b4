import itertools
import json

import pyarrow.parquet as pq
import pytest

from kvshare.core.errors import UserError
from kvshare.tools import gsm8k
from kvshare.tools.problems import problems

PROBLEM = {"question": "How many?", "answer": "1,000 + 1 = <<1000+1=1001>>1001\n#### 1,001"}


def test_problems_are_the_same_for_a_seed_and_right():
    one, again, other = (list(itertools.islice(problems(seed), 300)) for seed in (7, 7, 8))
    assert one == again != other
    for problem in one:
        for step in problem["answer"].split("<<")[1:]:
            left, _, right = step.split(">>")[0].partition("=")
            assert eval(left) == int(right)
        assert problem["answer"].endswith(f"#### {gsm8k.final_answer(problem)}")
        assert int(gsm8k.final_answer(problem)) > -20


def test_rows_are_what_verl_trains_on(tmp_path):
    data = {"train": [PROBLEM, *itertools.islice(problems(0), 9)], "test": [PROBLEM]}
    gsm8k.write(data, tmp_path, shots=3, limit=4)
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(rows) == 4
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "1001"}
    content = rows[0]["prompt"][0]["content"]
    assert content.count("Question: ") == 4
    assert content.count("Answer: ") == 3
    assert content.endswith(f"Question: How many? {gsm8k.INSTRUCTION}")
    assert content.count("How many? ") == 1  # never its own example


def test_without_shots_the_prompt_is_verls_own(tmp_path):
    gsm8k.write({"train": [PROBLEM], "test": [PROBLEM]}, tmp_path, shots=0, limit=None)
    row = pq.read_table(tmp_path / "test.parquet").to_pylist()[0]
    assert row["prompt"][0]["content"] == f"How many? {gsm8k.INSTRUCTION}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing"),
        ("", "is empty"),
        ("{", "line 1: not a JSON object"),
        ('{"question": "q"}', "line 1"),
        (json.dumps(PROBLEM) + "\n[]", "line 2"),
    ],
)
def test_bad_folder_is_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        gsm8k.read_folder(tmp_path)


def test_answer_without_a_number_is_refused():
    with pytest.raises(UserError, match="####"):
        gsm8k.final_answer({"question": "q", "answer": "none"})


def test_more_shots_than_problems_is_refused(tmp_path):
    with pytest.raises(UserError, match="--shots 5"):
        gsm8k.write({"train": [PROBLEM], "test": [PROBLEM]}, tmp_path, shots=5, limit=None)
