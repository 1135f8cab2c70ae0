"""The boundaries of a prompt: behind a system text, behind pictures, and where replies begin."""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine.prefill_plan import find_boundaries

BEGIN, TURN, END, IMAGE, SOFT = 2, 5, 6, 7, 8
SPECIAL = {BEGIN, TURN, END, IMAGE, SOFT}
USER, MODEL, SYSTEM, NEWLINE = 20, 21, 22, 23


def turn(role: int, *ids: int) -> list[int]:
    return [TURN, role, NEWLINE, *ids, END, NEWLINE]


def boundaries_of(*parts: list[int], soft=(), lead=(TURN, MODEL, NEWLINE)):
    ids = [BEGIN, *(id for part in parts for id in part), *lead]
    return find_boundaries(np.array(ids), soft, SPECIAL, {END}), len(ids)


def test_a_single_question_has_none():
    found, _ = boundaries_of(turn(USER, 30, 31))
    assert (found.system, found.pictures, found.replies, found.all, found.shared) == (None, (), (), [], [])


def test_earlier_prompts_ended_where_replies_begin():
    turns = [turn(USER, 30, 31), turn(MODEL, 40, 41), turn(USER, 32), turn(MODEL, 42), turn(USER, 33)]
    found, _ = boundaries_of(*turns)
    earlier = [boundaries_of(*turns[:1])[1], boundaries_of(*turns[:3])[1]]
    assert list(found.replies) == earlier == found.all
    assert found.system is None


def test_a_system_text_that_is_worth_it():
    long, short = turn(SYSTEM, *range(100, 140)), turn(SYSTEM, *range(100, 110))
    found, _ = boundaries_of(long, turn(USER, 30))
    assert found.system == 1 + len(long) - 1  # behind the end of its turn
    assert found.shared == [found.system]
    assert boundaries_of(short, turn(USER, 30))[0].system is None
    # a long first question is no system text
    assert boundaries_of(turn(USER, *range(100, 140)))[0].system is None
    assert boundaries_of(turn(USER, *range(100, 140)), turn(MODEL, 40), turn(USER, 30))[0].system is None


def test_behind_pictures():
    soft = [(5, 9), (12, 16)]
    ids = [IMAGE, *[SOFT] * 4, IMAGE, 30, IMAGE, *[SOFT] * 4, IMAGE, 31]
    found, _ = boundaries_of(turn(USER, *ids), soft=soft)
    assert found.pictures == (9, 16)
    assert (found.all, found.shared) == ([9, 16], [16])


def test_a_prompt_that_ends_with_a_picture():
    found = find_boundaries(np.array([BEGIN, 30, SOFT, SOFT]), [(2, 4)], SPECIAL, {END})
    assert found.all == []


@pytest.mark.parametrize("ids", [[BEGIN], [30, 31], [BEGIN, *range(100, 140)], [TURN, 30, TURN, 30, TURN, *range(9)]])
def test_prompts_without_turns(ids):
    assert find_boundaries(np.array(ids), [], SPECIAL, {END}).all == []


def test_what_is_said_does_not_decide():
    """Roles without their control token are text."""
    found, _ = boundaries_of(turn(USER, MODEL, NEWLINE, 30, MODEL, NEWLINE))
    assert found.all == []
