"""Conf strings as the releases' own binaries read them; cases and answers from conf_against_binary.py."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from conf_against_binary import differences, kept

from fragscope.allocator import Conf, parse_conf, rules_for
from fragscope.allocator.conf import effective_conf
from fragscope.errors import UnmodelledError, UsageError

SEQUENCES, STARTS, ANSWERS = kept()


def test_every_release_is_there_with_accepted_and_refused_strings() -> None:
    assert list(ANSWERS) == ["2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1"]
    for answers in ANSWERS.values():
        flat = [answer for sequence in answers["sequences"] for answer in sequence]
        assert sum(answer is None for answer in flat) > 400
        assert sum(answer is not None for answer in flat) > 400


@pytest.mark.parametrize("release", ANSWERS)
def test_each_string_is_accepted_and_has_the_effect_that_it_has_in_the_binary(release: str) -> None:
    assert list(differences(rules_for(release).rules, SEQUENCES, STARTS, ANSWERS[release])) == []


@pytest.mark.parametrize("release", ANSWERS)
def test_what_a_release_accepts_is_modelled_or_named(release: str) -> None:
    """The model's own refusals never look like torch's, and torch's always come first."""
    rules = rules_for(release).rules
    for texts in SEQUENCES:
        before: Conf | None = Conf()
        for text in texts:
            try:
                expected = effective_conf(text, rules, before)
            except UsageError as error:
                assert "\n" not in str(error)
                with pytest.raises(UsageError) as caught:
                    parse_conf(text, rules, before)
                assert not isinstance(caught.value, UnmodelledError)
                break
            try:
                assert parse_conf(text, rules, before) == expected
            except UnmodelledError as error:
                assert error.key in rules.conf_keys
            before = expected


def departures(release: str) -> list[Any]:
    """The release's rules, each time with one of those for conf strings changed."""
    row = rules_for(release).rules
    changed = [
        replace(row, conf=replace(row.conf, **{field.name: not getattr(row.conf, field.name)}))
        for field in fields(row.conf)
        if isinstance(getattr(row.conf, field.name), bool)
    ]
    changed.append(replace(row, conf=replace(row.conf, white_space=" \t" if row.conf.white_space == " " else " ")))
    changed.append(replace(row, conf_variables=(*row.conf_variables[::-1], "PYTORCH_HIP_ALLOC_CONF")))
    return changed + [replace(row, conf_keys=row.conf_keys - {key}) for key in sorted(row.conf_keys)]


@pytest.mark.parametrize("release", ["2.9.1", "2.14.1"])
def test_the_answers_hold_every_rule_for_conf_strings(release: str) -> None:
    """A rule that could be changed without a difference would be held by nothing."""
    answers = ANSWERS[release]
    free = [row for row in departures(release) if next(differences(row, SEQUENCES, STARTS, answers), None) is None]
    assert free == []
