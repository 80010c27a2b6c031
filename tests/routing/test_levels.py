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
    assert str(ReadLevel(Level.SNAPSHOT)) == "snapshot current"
    assert str(ReadLevel(Level.SNAPSHOT, snapshot_id=7)) == "snapshot 7"


def test_reads_are_of_one_snapshot_or_of_none() -> None:
    """Rules do not count where a listener or the mode gives level snapshot; a connection may still choose."""
    snapshot = ReadLevel(Level.SNAPSHOT)
    for choice in (LevelChoice(None, RULES, snapshot, STRONG), LevelChoice(None, RULES, None, snapshot)):
        assert choice.of_key(b"cache:1") == choice.usual == snapshot
        assert not choice.looks_at_keys
    assert LevelChoice(None, RULES, CAUGHT_UP, snapshot).of_key(b"cache:1") == EVENTUAL
    assert LevelChoice(STRONG, RULES, snapshot, snapshot).of_key(b"cache:1") == STRONG
