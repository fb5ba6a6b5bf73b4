"""What the tools for GSM8K do: a calculator, and a checker that knows the right answer (for verl: verl_tools.py)."""

from __future__ import annotations

import ast
import operator

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LONGEST = 200  # characters of an expression, which bounds the numbers in it


def calculate(expression: str) -> str:
    """The value of an expression with at most four decimals, or what is wrong with it."""
    if len(expression) > LONGEST:
        return f"This has more than {LONGEST} characters."
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return f"{value:.4f}".rstrip("0").rstrip(".")
    except ZeroDivisionError:
        return "This divides by 0."
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        return "This is no expression of numbers, + - * / and brackets."


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def check(answer: str, ground_truth: str, hint: str) -> str:
    """Whether an answer is the right number. ``hint`` goes with a wrong one."""
    given = answer.replace(",", "").strip().removeprefix("$")
    return f"{answer} is right." if _same(given, ground_truth) else f"{answer} is wrong. {hint}"


def _same(given: str, wanted: str) -> bool:
    try:
        return float(given) == float(wanted)
    except ValueError:
        return False
