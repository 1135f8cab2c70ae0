"""Where the run of a prompt rests: behind a system text, behind pictures, and where replies begin."""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine.rests import find_rests

BEGIN, TURN, END, IMAGE, SOFT = 2, 5, 6, 7, 8
SPECIAL = {BEGIN, TURN, END, IMAGE, SOFT}
USER, MODEL, SYSTEM, NEWLINE = 20, 21, 22, 23


def turn(role: int, *ids: int) -> list[int]:
    return [TURN, role, NEWLINE, *ids, END, NEWLINE]


def rests_of(*parts: list[int], soft=(), lead=(TURN, MODEL, NEWLINE)):
    ids = [BEGIN, *(id for part in parts for id in part), *lead]
    return find_rests(np.array(ids), soft, SPECIAL, {END}), len(ids)


def test_a_single_question_rests_nowhere():
    rests, _ = rests_of(turn(USER, 30, 31))
    assert (rests.system, rests.pictures, rests.replies, rests.all, rests.shared) == (None, (), (), [], [])


def test_earlier_prompts_ended_where_replies_begin():
    turns = [turn(USER, 30, 31), turn(MODEL, 40, 41), turn(USER, 32), turn(MODEL, 42), turn(USER, 33)]
    rests, _ = rests_of(*turns)
    earlier = [rests_of(*turns[:1])[1], rests_of(*turns[:3])[1]]
    assert list(rests.replies) == earlier == rests.all
    assert rests.system is None


def test_a_system_text_that_is_worth_it():
    long, short = turn(SYSTEM, *range(100, 140)), turn(SYSTEM, *range(100, 110))
    rests, _ = rests_of(long, turn(USER, 30))
    assert rests.system == 1 + len(long) - 1  # behind the end of its turn
    assert rests.shared == [rests.system]
    assert rests_of(short, turn(USER, 30))[0].system is None
    # a long first question is no system text
    assert rests_of(turn(USER, *range(100, 140)))[0].system is None
    assert rests_of(turn(USER, *range(100, 140)), turn(MODEL, 40), turn(USER, 30))[0].system is None


def test_behind_pictures():
    soft = [(5, 9), (12, 16)]
    ids = [IMAGE, *[SOFT] * 4, IMAGE, 30, IMAGE, *[SOFT] * 4, IMAGE, 31]
    rests, _ = rests_of(turn(USER, *ids), soft=soft)
    assert rests.pictures == (9, 16)
    assert (rests.all, rests.shared) == ([9, 16], [16])


def test_a_prompt_that_ends_with_a_picture():
    rests = find_rests(np.array([BEGIN, 30, SOFT, SOFT]), [(2, 4)], SPECIAL, {END})
    assert rests.all == []


@pytest.mark.parametrize("ids", [[BEGIN], [30, 31], [BEGIN, *range(100, 140)], [TURN, 30, TURN, 30, TURN, *range(9)]])
def test_prompts_without_turns(ids):
    assert find_rests(np.array(ids), [], SPECIAL, {END}).all == []


def test_what_is_said_does_not_decide():
    """Roles without their control token are text."""
    rests, _ = rests_of(turn(USER, MODEL, NEWLINE, 30, MODEL, NEWLINE))
    assert rests.all == []
