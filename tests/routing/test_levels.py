from routing.levels import STRONG, Level, LevelChoice, PrefixRule, ReadLevel, ordered

CAUGHT_UP = ReadLevel(Level.CAUGHT_UP)
EVENTUAL = ReadLevel(Level.EVENTUAL)
BOUNDED = ReadLevel(Level.BOUNDED_STALENESS, 0.25)
RULES = ordered([PrefixRule(b"cache:", EVENTUAL), PrefixRule(b"cache:hot:", BOUNDED)])


def test_the_connection_comes_before_rules_these_before_the_listener_and_that_before_the_mode() -> None:
    choice = LevelChoice(CAUGHT_UP, RULES, EVENTUAL, STRONG)
    assert choice.of_key(b"cache:1") == choice.usual == CAUGHT_UP
    assert not choice.looks_at_keys
    choice = LevelChoice(None, RULES, EVENTUAL, STRONG)
    assert choice.usual == EVENTUAL
    choice = LevelChoice(None, RULES, None, CAUGHT_UP)
    assert choice.usual == CAUGHT_UP
    assert choice.looks_at_keys


def test_the_longest_prefix_that_fits_counts() -> None:
    choice = LevelChoice(None, RULES, None, STRONG)
    assert choice.of_key(b"cache:hot:1") == BOUNDED
    assert choice.of_key(b"cache:1") == EVENTUAL
    assert choice.of_key(b"user:1") == STRONG


def test_levels_are_written_as_people_name_them() -> None:
    assert str(BOUNDED) == "bounded_staleness 250"
    assert str(CAUGHT_UP) == "caught_up"
